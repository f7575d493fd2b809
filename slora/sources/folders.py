"""Image folders: one subfolder per class; without a validation folder, a split is made."""

from __future__ import annotations

import bisect
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import torch
from PIL import Image, UnidentifiedImageError
from torch.utils.data import ConcatDataset, Dataset, Subset

from slora.errors import DataError
from slora.sources.batches import Damage, DamagedImage

EVALUATION_SHARE = 0.1

# Folders up to this size are checked for damaged images before training, larger ones during it.
_CHECKED_AT_ONCE = 100_000

# Raised by Pillow for files that are truncated, empty, or not images.
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)


def image_folder(path: Path) -> tuple[Dataset[Any], Dataset[Any], tuple[str, ...], Damage]:
    """Open `path/train/CLASS/*` and `path/val/CLASS/*`; without `val`, or without both, a split is made.

    The split is 90/10 within each class and depends only on the file names. File headers are read; damaged files are
    skipped.

    Returns:
        `(training, evaluation, classes, damage)`: data sets of `(PIL image, label)`.

    Raises:
        DataError: the folder is missing or has fewer than two classes, `val` has a class that `train` lacks, or
            more than 1 % of the images are damaged.
    """
    if not path.is_dir():
        raise DataError(f"imagefolder:{path}: {path} is not a folder; give one with a subfolder per class")
    root = path / "train" if (path / "train").is_dir() else path
    training = _opened(root)
    classes = tuple(training.classes)
    if len(classes) < 2:
        raise DataError(f"{root} has the class folders {list(classes)}; at least two are needed, each with images")
    evaluation = None
    if root != path and (path / "val").is_dir():
        evaluation = _opened(path / "val")
        unknown = sorted(set(evaluation.classes) - set(classes))
        if unknown:
            raise DataError(f"{path / 'val'} has the class {unknown[0]!r}, which {root} lacks; add it there")
        number = training.class_to_idx
        evaluation.samples = [(file, number[evaluation.classes[label]]) for file, label in evaluation.samples]
    folders = [training] if evaluation is None else [training, evaluation]
    damage = Damage(sum(len(folder.samples) for folder in folders))
    for folder in folders:
        _skip_damaged(folder, damage)
    if evaluation is not None:
        return training, evaluation, classes, damage
    train_rows, eval_rows = split([label for _, label in training.samples])
    return Subset(training, train_rows), Subset(training, eval_rows), classes, damage


def split(labels: Sequence[int], share: float = EVALUATION_SHARE) -> tuple[list[int], list[int]]:
    """Return the rows for training and for evaluation: `share` of each class, at least one if it has two images.

    The same labels give the same rows.
    """
    members: dict[int, list[int]] = defaultdict(list)
    for row, label in enumerate(labels):
        members[int(label)].append(row)
    generator = torch.Generator().manual_seed(0)
    chosen: set[int] = set()
    for label in sorted(members):
        rows = members[label]
        count = max(round(share * len(rows)), 1 if len(rows) > 1 else 0)
        chosen.update(rows[i] for i in torch.randperm(len(rows), generator=generator)[:count].tolist())
    return [row for row in range(len(labels)) if row not in chosen], sorted(chosen)


def name_of(dataset: Any, index: int) -> str:
    """Return the file name of an item of a data set, or its number if that is unknown."""
    if isinstance(dataset, Subset):
        return name_of(dataset.dataset, dataset.indices[index])
    if isinstance(dataset, ConcatDataset):
        number = bisect.bisect_right(dataset.cumulative_sizes, index)
        first = dataset.cumulative_sizes[number - 1] if number else 0
        return name_of(dataset.datasets[number], index - first)
    for attribute in ("samples", "_image_files", "_images", "_samples"):
        files = getattr(dataset, attribute, None)
        if files is not None and len(files) == len(dataset):
            return str(files[index][0] if isinstance(files[index], tuple) else files[index])
    return f"image {index} of {type(dataset).__name__}"


def _opened(root: Path) -> Any:
    from torchvision.datasets import ImageFolder

    try:
        folder = ImageFolder(str(root), allow_empty=True)
    except FileNotFoundError as error:
        raise DataError(f"{root} has no class folders; expected {root}/CLASS/IMAGE.jpg") from error
    present = {label for _, label in folder.samples}
    empty = [name for label, name in enumerate(folder.classes) if label not in present]
    if empty:
        raise DataError(
            f"the class folder {root / empty[0]} has no image with a known extension ({', '.join(folder.extensions)}); "
            f"remove it or add images"
        )
    return folder


def _skip_damaged(folder: Any, damage: Damage) -> None:
    if len(folder.samples) > _CHECKED_AT_ONCE:
        return
    with ThreadPoolExecutor(8) as pool:
        reasons = list(pool.map(_header_damage, [file for file, _ in folder.samples]))
    checked = list(zip(folder.samples, reasons, strict=True))
    damage.add(*(DamagedImage(file, reason) for (file, _), reason in checked if reason is not None))
    intact = [sample for sample, reason in checked if reason is None]
    folder.samples = intact
    folder.targets = [label for _, label in intact]


def _header_damage(file: str) -> str | None:
    try:
        with Image.open(file):
            return None
    except UNREADABLE as error:
        return described(error)


def described(error: Exception) -> str:
    """Return why an image cannot be read."""
    if isinstance(error, UnidentifiedImageError):
        return "not an image"
    return str(getattr(error, "strerror", None) or error) or type(error).__name__
