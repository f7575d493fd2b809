"""The images of `retain_data`, on which distillation keeps the features, as inputs of the model."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from slora.errors import DataError
from slora.models.input_spec import InputSpec
from slora.retention import generic_samples
from slora.runs.settings import TrainSettings
from slora.sources.batches import DamagedImage
from slora.sources.data import Source, as_input, open_data
from slora.sources.data_names import GENERIC, check_retained, is_folder
from slora.sources.folders import UNREADABLE, described

ENDINGS = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def retained_images(settings: TrainSettings, spec: InputSpec, source: Source) -> Tensor | None:
    """Return up to `retain_samples` images `[n, c, h, w]` as `spec` asks for, or None without `retain_data`.

    They are spread evenly over the folder or the training part of the data set; "generic" makes them from training
    images of `source`.

    Raises:
        ConfigError: `retain_data` is not the name of anything.
        DataError: there are fewer than two images, or the data set cannot be opened.
    """
    name, count = settings.retain_data, settings.retain_samples
    if name is None or not settings.retain_weight:
        return None
    check_retained(name)
    if name == GENERIC:
        images = _first(source.data(spec, training=True), 256)
        return generic_samples(images, count, patch=max(1, spec.size // 4), seed=settings.seed)
    if is_folder(name):
        return _of_folder(Path(name).expanduser(), spec, count)
    other = open_data(name, settings.data_root, settings.download)
    return _first(other.data(spec, training=True), count)


def _first(data: Any, count: int) -> Tensor:
    """Up to `count` images of a data set, spread evenly over it; damaged ones are skipped."""
    images = []
    for index in _spread(len(data), count):
        try:
            images.append(data[index][0])
        except DamagedImage:
            continue
    return _stacked(images, "the data set")


def _of_folder(folder: Path, spec: InputSpec, count: int) -> Tensor:
    files = sorted(path for path in folder.rglob("*") if path.suffix.lower() in ENDINGS)
    images = []
    for index in _spread(len(files), count):
        try:
            with Image.open(files[index]) as image:
                images.append(as_input(image, spec))
        except UNREADABLE as error:
            raise DataError(
                f"{files[index]} cannot be read ({described(error)}); repair it, or remove it from retain_data"
            ) from error
    return _stacked(images, str(folder))


def _spread(total: int, count: int) -> Sequence[int]:
    return range(total) if total <= count else [i * total // count for i in range(count)]


def _stacked(images: list[Tensor], where: str) -> Tensor:
    if len(images) < 2:
        raise DataError(
            f"retain_data: {where} has {len(images)} readable image{'s' * (len(images) != 1)}; give 2 or more, or use "
            f"retain_data={GENERIC!r}"
        )
    return torch.stack(images)
