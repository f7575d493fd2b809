"""Models and data sets that other packages add to those known by name, as `slora.demo` does. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from slora.sources.data import Source
    from slora.sources.models import Built


class Model(NamedTuple):
    """A model that is built by a function of its own."""

    build: Callable[[int, bool, int | None, Mapping[str, Any]], Built]
    """`(classes, pretrained, img_size, model_args)`: the arguments of `slora.sources.models.build`."""
    classes: Callable[[], int]
    """How many outputs the head of its pretrained weights has."""


MODELS: dict[str, Model] = {}
DATA: dict[str, Callable[[], Source]] = {}


def register_model(name: str, model: Model) -> None:
    """Make `model` known as `name`, written `source/model`."""
    MODELS[name] = model


def register_data(name: str, opened: Callable[[], Source]) -> None:
    """Make the data set that `opened` returns known as `name`, of lower-case letters and digits."""
    DATA[name] = opened
