"""The images of `retain_data`, on which a model should stay as it was, as its inputs."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor

from slora.errors import DataError
from slora.models.input_spec import InputSpec
from slora.retention import generic_samples, mixed_samples
from slora.runs.settings import TrainSettings
from slora.sources.batches import DamagedImage
from slora.sources.data import Source, as_input, open_data
from slora.sources.data_names import GENERIC, PROXIES, TARGET, check_retained, is_folder
from slora.sources.folders import UNREADABLE, described

# Settings that need them.
USERS = ("retain_weight", "drift_penalty", "ewc_penalty", "log_drift")

ENDINGS = {".bmp", ".jpeg", ".jpg", ".png", ".ppm", ".tif", ".tiff", ".webp"}


def retained_images(settings: TrainSettings, spec: InputSpec, source: Source) -> Tensor | None:
    """Return up to `retain_samples` images `[n, c, h, w]` as `spec` asks for, or None without `retain_data`.

    They are spread evenly over the folder or the training part of the data set; "generic", "mixed" and "target" make
    them from training images of `source`, or take those.

    Raises:
        ConfigError: `retain_data` is not the name of anything.
        DataError: there are fewer than two images, or the data set cannot be opened.
    """
    name, count, where = settings.retain_data, settings.retain_samples, f"retain_data={settings.retain_data!r}"
    used = settings.drift_data == "retained" or any(getattr(settings, user) for user in USERS)
    if name is None or not used:
        return None
    check_retained(name)
    if name in PROXIES:
        images = spread_over(source.data(spec, training=True), count if name == TARGET else 256, where)[0]
        if name == GENERIC:
            return generic_samples(images, count, patch=max(1, spec.size // 4), seed=settings.seed)
        return images if name == TARGET else mixed_samples(images, count, seed=settings.seed)
    if is_folder(name):
        return _of_folder(Path(name).expanduser(), spec, count)
    other = open_data(name, settings.data_root, settings.download)
    return spread_over(other.data(spec, training=True), count, where)[0]


def spread_over(data: Any, count: int, where: str) -> tuple[Tensor, list[int]]:
    """Return up to `count` images of a data set and their labels, spread evenly over it; damaged ones are skipped.

    Raises:
        DataError: fewer than two images are readable; `where` names the data set.
    """
    images, labels = [], []
    for index in _spread(len(data), count):
        try:
            image, label = data[index]
        except DamagedImage:
            continue
        images.append(image)
        labels.append(int(label))
    return _stacked(images, where), labels


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
    return _stacked(images, f"retain_data={str(folder)!r}")


def _spread(total: int, count: int) -> Sequence[int]:
    return range(total) if total <= count else [i * total // count for i in range(count)]


def _stacked(images: list[Tensor], where: str) -> Tensor:
    if len(images) < 2:
        raise DataError(
            f"{where} has {len(images)} readable image{'s' * (len(images) != 1)}; give 2 or more, or use "
            f"retain_data={GENERIC!r}"
        )
    return torch.stack(images)
