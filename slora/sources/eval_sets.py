"""Labelled images to evaluate on: `open_eval_set` of any image folder or data set, `EvalSet` of these and of suites."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch.utils.data import Dataset

from slora.errors import DataError
from slora.io.plain import shown
from slora.models.input_spec import InputSpec
from slora.sources.batches import Damage, Data
from slora.sources.data import Source, open_data
from slora.sources.data_names import FOLDER, check_name
from slora.sources.imagenet import prompt_names, wnids
from slora.sources.optional import imported
from slora.sources.suite_names import class_folders
from slora.sources.tar_shards import TarImages, shards

CLASS_NAMES, TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"


@dataclass(frozen=True)
class EvalSet:
    """Images with labels, not yet transformed to a model's input.

    Attributes:
        name: for tables.
        classes: their names as they stand in a prompt.
        images: a data set of `(PIL image, label)`.
        groups: for each class the classes of ImageNet that it stands for; None if they are not of ImageNet.
        templates: of prompts, with `{}` for the name of a class; empty: those of the model.
    """

    name: str
    classes: tuple[str, ...]
    images: Any
    groups: tuple[tuple[int, ...], ...] | None = None
    templates: tuple[str, ...] = ()

    def data(self, spec: InputSpec) -> Data:
        """Return the images in the format `spec`, not augmented."""
        source = Source(self.name, self.classes, None, self.images, "none", Damage(len(self.images)))
        return source.data(spec, training=False)


class ImageFiles(Dataset[Any]):
    """Image files with a label each.

    Args:
        samples: `(file, label)`.
        border: pixels to cut off at each side.
    """

    def __init__(self, samples: Sequence[tuple[str, int]], border: int = 0) -> None:
        self.samples, self.border = list(samples), border

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        file, label = self.samples[index]
        image = imported("torchvision.datasets.folder").default_loader(file)
        if self.border:
            width, height = image.size
            image = image.crop((self.border, self.border, width - self.border, height - self.border))
        return image, label


def image_files(root: Path, labels: Mapping[str, int], border: int = 0) -> ImageFiles:
    """Return the images in the class folders `labels` of `root`.

    Raises:
        DataError: a class folder has no image.
    """
    folder = imported("torchvision.datasets.folder")
    samples = folder.make_dataset(str(root), dict(labels), extensions=folder.IMG_EXTENSIONS, allow_empty=True)
    present = {Path(file).relative_to(root).parts[0] for file, _ in samples}
    for name in labels:
        if name not in present:
            raise DataError(
                f"the evaluation set {root} is incomplete: its class folder {name} has no image with a known extension "
                f"({', '.join(folder.IMG_EXTENSIONS)})"
            )
    return ImageFiles(samples, border)


def open_eval_set(name: str, data_root: str | Path = "data", download: bool = False) -> EvalSet:
    """Open labelled images by the path of a folder, or the evaluation images of a data set by its name.

    A folder has a subfolder per class, itself or in `test/`, `val/` or `validation/`; or it has CLIP-benchmark's
    webdataset layout, `test/0.tar` and so on. The names of the classes are the lines of its `classnames.txt`, in the
    order of the sorted subfolders (of the labels in a webdataset); without that file those of the subfolders, with
    spaces for `_`, and ImageNet's for its wnids. Its `zeroshot_classification_templates.txt` holds prompts, with `{c}`
    for the name.

    Raises:
        ConfigError: it is neither a folder nor the name of a data set.
        DataError: the folder holds no images in one of these layouts, a class has no image, or the class names do not
            match; or the data set is missing.
    """
    path = Path(name.removeprefix(FOLDER)).expanduser()
    if not (name.startswith(FOLDER) or path.is_dir()):
        if "/" in name or name.startswith("."):
            raise DataError(f"{name} is not a folder; expected {name}/CLASS/IMAGE.jpg")
        source = open_data(check_name(name), data_root, download)
        _check_names(source.name, source.classes)
        return EvalSet(source.name, prompt_names(source.name, source.classes), source.evaluation)
    templates = tuple(line.replace("{c}", "{}") for line in _lines(path / TEMPLATES))
    named = _lines(path / CLASS_NAMES)
    found = shards(path)
    if found:
        tars = TarImages(found)
        _check_labels(path, tars.labels(), named)
        return EvalSet(path.name, tuple(named), tars, templates=templates)
    root = next((path / each for each in ("test", "val", "validation") if class_folders(path / each)), path)
    folders = class_folders(root)
    if not folders:
        raise DataError(f"{path} has no class folders; expected {path}/CLASS/IMAGE.jpg, or {path}/test/0.tar")
    if named and len(named) != len(folders):
        raise DataError(
            f"{path / CLASS_NAMES} names {len(named)} classes, but {root} has {len(folders)} class folders "
            f"({', '.join(folders[:3])}, ...); give one name a line, in the order of the sorted folders"
        )
    if not named:
        _check_names(str(root), folders)
    images = image_files(root, {folder: label for label, folder in enumerate(folders)})
    return EvalSet(path.name, tuple(named) or prompt_names(None, folders), images, templates=templates)


def _check_names(where: str, names: Sequence[str]) -> None:
    """Refuse names that say nothing about their class."""
    known = set(wnids())
    strange = [n for n in names if n[:1] == "n" and n[1:].isdecimal() and len(n) == 9 and n not in known]
    # Ten digits are the names of digits.
    if strange or (len(names) > 10 and all(name.isdecimal() for name in names)):
        shown_names = ", ".join((strange or list(names))[:3])
        raise DataError(
            f"{where} has classes called {shown_names}, which say nothing about them; write their names into "
            f"{CLASS_NAMES} in a folder of images, one a line in the order of the sorted class folders"
        )


def _check_labels(path: Path, labels: Sequence[int], named: Sequence[str]) -> None:
    if not named:
        raise DataError(f"{path / CLASS_NAMES} is missing; it names the classes of the labels, one a line")
    if max(labels) >= len(named):
        raise DataError(
            f"{path / CLASS_NAMES} names {len(named)} classes, but {path} has the label {max(labels)}; give one name a "
            f"line, from label 0 on"
        )


def _lines(path: Path) -> list[str]:
    if not path.is_file():
        return []
    try:
        return [line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not text in UTF-8 ({shown(str(error))})") from error
