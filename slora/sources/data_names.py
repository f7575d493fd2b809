"""Names of data sets, and how torchvision opens them. Nothing here imports torch."""

from __future__ import annotations

import difflib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slora.errors import ConfigError
from slora.sources.registry import DATA


@dataclass(frozen=True)
class Entry:
    """A data set of torchvision: its class, its splits as keyword arguments, and a suitable augmentation."""

    kind: str
    classes: int
    training: tuple[dict[str, Any], ...]
    evaluation: tuple[dict[str, Any], ...]
    """Empty if the data set has no split; then 10 % of each class are held out."""
    augment: str = "crop-flip"
    downloads: bool = True


def _flag(kind: str, classes: int, **kwargs: Any) -> Entry:
    return Entry(kind, classes, ({"train": True},), ({"train": False},), **kwargs)


def _split(kind: str, classes: int, training: str, evaluation: str, **kwargs: Any) -> Entry:
    return Entry(
        kind, classes, tuple({"split": name} for name in training.split("+")), ({"split": evaluation},), **kwargs
    )


TORCHVISION = {
    "cifar10": _flag("CIFAR10", 10),
    "cifar100": _flag("CIFAR100", 100),
    "dtd": _split("DTD", 47, "train+val", "test"),
    "eurosat": Entry("EuroSAT", 10, ({},), ()),
    "flowers102": _split("Flowers102", 102, "train+val", "test"),
    "food101": _split("Food101", 101, "train", "test"),
    # Flipped, a sign or digit has another meaning.
    "gtsrb": _split("GTSRB", 43, "train", "test", augment="crop"),
    "imagenet": _split("ImageNet", 1000, "train", "val", downloads=False),
    "mnist": _flag("MNIST", 10, augment="none"),
    "pets": _split("OxfordIIITPet", 37, "trainval", "test"),
    "stl10": _split("STL10", 10, "train", "test"),
    "svhn": _split("SVHN", 10, "train", "test", augment="none"),
}
FOLDER = "imagefolder:"
# What `retain_data` may name beside data: proxies of old images that are made from the training images.
GENERIC, MIXED, TARGET = "generic", "mixed", "target"
PROXIES = (GENERIC, MIXED, TARGET)


def names() -> list[str]:
    """Return all names that `open_data` takes, except `imagefolder:PATH`."""
    return sorted([*TORCHVISION, *DATA])


def check_name(name: str | None) -> str:
    """Return `name` as `names()` spells it: an early check, before anything is loaded.

    Raises:
        ConfigError: the name is unknown; lists near names.
    """
    if not name:
        raise ConfigError(f"no data set was named; use one of {', '.join(names())} or imagefolder:PATH")
    if name.startswith(FOLDER):
        return name
    plain = name.lower().replace("-", "").replace("_", "")
    plain = {"oxfordiiitpet": "pets", "oxfordpets": "pets", "flowers": "flowers102", "in1k": "imagenet"}.get(
        plain, plain
    )
    if plain not in names():
        if Path(name).is_dir():
            raise ConfigError(f"data={name!r} is a folder; write imagefolder:{name}")
        near = difflib.get_close_matches(plain, names(), n=3)
        known = f"near names are {', '.join(near)}" if near else f"use one of {', '.join(names())}"
        raise ConfigError(f"data={name!r} is unknown; {known}, or imagefolder:PATH")
    return plain


def check_replayed(name: str) -> str:
    """Return `replay_data` as `names()` spells it.

    Raises:
        ConfigError: it is not a data set.
    """
    try:
        return check_name(name)
    except ConfigError as error:
        raise ConfigError(f"replay_data={name!r} is no data set with labels: {error}") from error


def is_folder(name: str) -> bool:
    """Whether `retain_data` means a folder: it exists and is not the name of a data set."""
    return name not in names() and Path(name).expanduser().is_dir()


def check_retained(name: str | None) -> None:
    """Check `retain_data`, before anything is loaded.

    Raises:
        ConfigError: it is neither the name of a proxy, nor a folder, nor a data set.
    """
    if name is not None and name not in PROXIES and not is_folder(name):
        try:
            check_name(name)
        except ConfigError as error:
            raise ConfigError(
                f"retain_data={name!r} is neither {', '.join(map(repr, PROXIES))}, nor a folder of images, nor a data "
                f"set by name"
            ) from error
