"""Images with captions, for retrieval: `open_captions`."""

from __future__ import annotations

import csv
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slora.errors import DataError
from slora.models.input_spec import InputSpec
from slora.sources.batches import Damage, Data
from slora.sources.data import Source
from slora.sources.eval_sets import ImageFiles
from slora.sources.optional import imported
from slora.sources.tar_shards import TarImages, shards

FORMS = (
    'a file captions.jsonl with {"image": "a.jpg", "captions": ["...", "..."]} a line, a JSON file like those of COCO, '
    "a CSV file with the columns image and caption, images with a text file of captions each (a.jpg, a.txt), or "
    "CLIP-benchmark's webdataset layout (test/0.tar)"
)


@dataclass(frozen=True)
class Captions:
    """Images, each with one or more captions.

    Attributes:
        name: for tables.
        images: a data set of `(PIL image, its number)`.
        texts: all captions.
        image_of_text: the number of the image of each.
    """

    name: str
    images: Any
    texts: tuple[str, ...]
    image_of_text: tuple[int, ...]

    def data(self, spec: InputSpec) -> Data:
        """Return the images in the format `spec`, labelled by their numbers."""
        source = Source(self.name, (), None, self.images, "none", Damage(len(self.images)))
        return source.data(spec, training=False)


def open_captions(path: str | Path) -> Captions:
    """Open images with captions, in one of `FORMS`.

    Names of images are relative to the file, to `images/` beside it or, as in COCO, to `../val2017/` of a file
    `captions_val2017.json`.

    Raises:
        DataError: there is none, an image is missing or has no caption, or the file is damaged.
    """
    path = Path(path).expanduser()
    if not path.exists():
        raise DataError(f"{path} does not exist; give {FORMS}")
    if path.is_dir():
        if found := shards(path):
            tars = TarImages(found)
            if not tars.captioned:
                raise DataError(f"{found[0]} holds labels instead of captions; evaluate it with --zero-shot {path}")
            return _captions(path.name, tars, zip((name for name, _ in tars.samples), tars.captions(), strict=True))
        file = next(
            filter(Path.is_file, (path / f"captions{end}" for end in (".jsonl", ".json", ".csv", ".txt"))), None
        )
        pairs = _beside(path) if file is None else _of_file(file)
    else:
        file, pairs = path, _of_file(path)
    folder = path if path.is_dir() else path.parent
    collected: dict[str, list[str]] = {}
    for image, captions in pairs:
        collected.setdefault(str(_image(image, folder, file)), []).extend(captions)
    images = ImageFiles([(each, number) for number, each in enumerate(collected)])
    return _captions(folder.name if file is None or path.is_dir() else path.stem, images, collected.items())


def _captions(name: str, images: Any, pairs: Iterable[tuple[str, list[str]]]) -> Captions:
    texts: list[str] = []
    numbers: list[int] = []
    for number, (image, captions) in enumerate(pairs):
        given = [" ".join(caption.split()) for caption in captions if caption.strip()]
        if not given:
            raise DataError(f"{image} has no caption; add one, or leave it out")
        texts += given
        numbers += [number] * len(given)
    if not texts:
        raise DataError(f"the evaluation set {name} is empty: it holds no image with a caption; give {FORMS}")
    return Captions(name, images, tuple(texts), tuple(numbers))


def _image(name: str, folder: Path, file: Path | None) -> Path:
    places = [folder / name, folder / "images" / name]
    if file is not None:
        # As COCO: annotations/captions_val2017.json beside val2017/.
        places.append(folder.parent / file.stem.rpartition("_")[2] / name)
    if found := next(filter(Path.is_file, places), None):
        return found
    raise DataError(f"{file} names the image {name}, which is neither {' nor '.join(map(str, places))}")


def _beside(folder: Path) -> Iterator[tuple[str, list[str]]]:
    endings = imported("torchvision.datasets.folder").IMG_EXTENSIONS
    for image in sorted(path for path in folder.rglob("*") if path.suffix.lower() in endings):
        text = image.with_suffix(".txt")
        if not text.is_file():
            raise DataError(f"{image} has no captions: {text.name} does not exist beside it; give {FORMS}")
        yield str(image.relative_to(folder)), text.read_text(encoding="utf-8").splitlines()


def _of_file(file: Path) -> list[tuple[str, list[str]]]:
    """The images of a file of captions, in order; an image may stand there more than once."""
    try:
        text = file.read_text(encoding="utf-8")
        if file.suffix == ".jsonl":
            return [_of_line(json.loads(line)) for line in text.splitlines() if line.strip()]
        if file.suffix == ".json":
            content = json.loads(text)
            names = {each["id"]: str(each["file_name"]) for each in content["images"]}
            return [(names[each["image_id"]], [str(each["caption"])]) for each in content["annotations"]]
        rows = csv.DictReader(text.splitlines(), skipinitialspace=True)
        return [(row["image"], [row["caption"]]) for row in rows]
    except (ValueError, KeyError, TypeError, AttributeError, csv.Error) as error:
        raise DataError(f"{file} is not in a form known here ({error!r}); give {FORMS}") from error


def _of_line(entry: dict[str, Any]) -> tuple[str, list[str]]:
    captions = entry["captions"] if "captions" in entry else entry["caption"]
    captions = [captions] if isinstance(captions, str) else captions
    if not all(isinstance(caption, str) for caption in captions):
        raise TypeError(f"captions of {entry['image']!r} are not text")
    return str(entry["image"]), list(captions)
