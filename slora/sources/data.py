"""`open_data`: data sets by name, and the transforms from their images to a model's input."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

from slora.errors import DataError
from slora.evaluation.few_shot import few_shot_indices
from slora.models.input_spec import InputSpec
from slora.sources.batches import Damage, DamagedImage, Data
from slora.sources.data_names import FOLDER, TORCHVISION, Entry, check_name
from slora.sources.folders import UNREADABLE, described, image_folder, name_of, split
from slora.sources.labels import labels_of
from slora.sources.optional import first_line, imported
from slora.sources.registry import DATA


@dataclass
class Source:
    """An opened data set, its images not yet transformed to a model's input.

    Attributes:
        name: as `names()` lists it.
        classes: names of the classes, or their numbers.
        training: images to train on, or to vote in k-NN: `(PIL image or [c, h, w] tensor, label)`.
        evaluation: images to evaluate on.
        augment: the augmentation used for "auto".
        damage: images that could not be read so far.
    """

    name: str
    classes: tuple[str, ...]
    training: Any
    evaluation: Any
    augment: str
    damage: Damage = field(default_factory=lambda: Damage(0))

    def data(self, spec: InputSpec, augment: str = "none", *, training: bool) -> Data:
        """Return the training or evaluation images in the format `spec`, augmented unless `augment` is "none"."""
        raw = self.training if training else self.evaluation
        augment = self.augment if augment == "auto" else augment
        if isinstance(raw, TensorDataset) and augment == "none" and _fits(raw.tensors[0], spec):
            return raw
        return Transformed(raw, _transform(spec, augment), self.damage)

    def few_shot(self, shots: int | None, seed: int) -> Source:
        """Return the same data set with `shots` training images per class, drawn by `seed`; None keeps all.

        Raises:
            ConfigError: a class has fewer training images; names it.
        """
        if shots is None:
            return self
        rows = few_shot_indices(labels_of(self.training), shots, seed, self.classes)
        if isinstance(self.training, TensorDataset):
            return dataclasses.replace(self, training=TensorDataset(*(t[rows] for t in self.training.tensors)))
        return dataclasses.replace(self, training=Subset(self.training, rows))


def open_data(name: str, root: str | Path = "data", download: bool = True) -> Source:
    """Open a data set by name; a missing one is downloaded into `root` if `download` is true.

    Registered data sets, such as `digits` and `letters` of `slora.demo`, are generated.

    Raises:
        ConfigError: the name is unknown.
        DataError: the data set is missing, incomplete, or could not be downloaded.
        MissingDependencyError: torchvision is not installed.
    """
    name = check_name(name)
    if name.startswith(FOLDER):
        training, evaluation, classes, damage = image_folder(Path(name.removeprefix(FOLDER)).expanduser())
        return Source(name, classes, training, evaluation, "crop-flip", damage)
    if name in DATA:
        return DATA[name]()
    entry = TORCHVISION[name]
    splits = [_opened(name, entry, Path(root), download, options) for options in entry.training]
    classes, training = _class_names(splits[0], entry.classes), _joined(splits)
    if entry.evaluation:
        evaluation = _joined([_opened(name, entry, Path(root), download, options) for options in entry.evaluation])
    else:
        rows, held_out = split(list(training.targets))
        training, evaluation = Subset(training, rows), Subset(training, held_out)
    damage = Damage(len(training) + len(evaluation))
    return Source(name, classes, training, evaluation, entry.augment, damage)


class Transformed(Dataset[tuple[Tensor, int]]):
    """`raw` with `transform` applied to its images; unreadable ones raise `DamagedImage`."""

    def __init__(self, raw: Any, transform: Callable[[Any], Tensor], damage: Damage) -> None:
        self.raw, self.transform, self.damage = raw, transform, damage

    def __len__(self) -> int:
        return len(self.raw)

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        try:
            image, label = self.raw[index]
        except UNREADABLE as error:
            raise DamagedImage(name_of(self.raw, index), described(error)) from error
        return self.transform(image), int(label)


def as_input(image: Image.Image, spec: InputSpec) -> Tensor:
    """Return an image in the format `spec`, `[c, h, w]`, not augmented."""
    return _transform(spec, "none")(image)


class ToColour:
    """Converts a PIL image or tensor to 1 or 3 channels."""

    def __init__(self, channels: int) -> None:
        self.channels = channels

    def __call__(self, image: Any) -> Any:
        if isinstance(image, Image.Image):
            return image.convert("L" if self.channels == 1 else "RGB")
        if image.shape[-3] == self.channels:
            return image
        if self.channels == 1:
            return image.mean(-3, keepdim=True)
        return image.expand(*image.shape[:-3], self.channels, *image.shape[-2:])


def _transform(spec: InputSpec, augment: str) -> Callable[[Any], Tensor]:
    v2 = imported("torchvision.transforms.v2")
    mode = getattr(v2.InterpolationMode, spec.interpolation.upper(), v2.InterpolationMode.BICUBIC)
    steps: list[Any] = [ToColour(spec.channels)]
    if augment == "none":
        # Without a crop: the whole image, resized to a square.
        if spec.crop >= 1.0:
            steps.append(v2.Resize((spec.size, spec.size), interpolation=mode, antialias=True))
        else:
            steps.append(v2.Resize(round(spec.size / spec.crop), interpolation=mode, antialias=True))
            steps.append(v2.CenterCrop(spec.size))
    else:
        steps.append(v2.RandomResizedCrop(spec.size, scale=(0.5, 1.0), interpolation=mode, antialias=True))
        if augment == "crop-flip":
            steps.append(v2.RandomHorizontalFlip())
    steps += [v2.ToImage(), v2.ToDtype(torch.float32, scale=True), v2.Normalize(spec.mean, spec.std), v2.ToPureTensor()]
    transform: Callable[[Any], Tensor] = v2.Compose(steps)
    return transform


def _fits(images: Tensor, spec: InputSpec) -> bool:
    plain = all(value == 0 for value in spec.mean) and all(value == 1 for value in spec.std)
    return plain and tuple(images.shape[1:]) == (spec.channels, spec.size, spec.size)


def _class_names(dataset: Any, count: int) -> tuple[str, ...]:
    """The class names of a torchvision data set, or numbers if it has none."""
    names = getattr(dataset, "classes", None)
    if not isinstance(names, (list, tuple)) or len(names) != count:
        return tuple(str(number) for number in range(count))
    # ImageNet has several names for a class.
    return tuple(name if isinstance(name, str) else ", ".join(name) for name in names)


def _joined(splits: list[Any]) -> Any:
    return splits[0] if len(splits) == 1 else ConcatDataset(splits)


def _opened(name: str, entry: Entry, root: Path, download: bool, options: dict[str, Any]) -> Any:
    dataset = getattr(imported("torchvision.datasets"), entry.kind)
    if entry.downloads:
        options = {**options, "download": download}
    try:
        return dataset(str(root), **options)
    # Each data set reports a missing, damaged or unreachable file with other exceptions.
    except Exception as error:
        if entry.downloads and not download:
            remedy = f"run again with --download, or put its files into {root}"
        elif entry.downloads:
            remedy = f"check the network and the free space, or put its files into {root} and use --no-download"
        else:
            remedy = f"it cannot be downloaded: put its archives into {root}"
        raise DataError(f"data set {name!r} could not be opened in {root} ({first_line(error)}); {remedy}") from error
