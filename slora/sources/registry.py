"""Models and data sets that other packages register by name, such as `slora.demo`. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from slora.sources.data import Source
    from slora.sources.models import Built


class Model(NamedTuple):
    """How to build a registered model."""

    build: Callable[[int, bool, int | None, Mapping[str, Any]], Built]
    """`(classes, pretrained, img_size, model_args)`: the arguments of `slora.sources.models.build`."""
    classes: Callable[[], int]
    """Returns the number of outputs of the head in its pretrained weights."""


MODELS: dict[str, Model] = {}
DATA: dict[str, Callable[[], Source]] = {}


def register_model(name: str, model: Model) -> None:
    """Register `model` as `name`, of the form `source/model`."""
    MODELS[name] = model


def register_data(name: str, opened: Callable[[], Source]) -> None:
    """Register the data set that `opened` returns as `name`, of lower-case letters and digits."""
    DATA[name] = opened
