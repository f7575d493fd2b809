"""Models, CLIPs and data sets that other packages register by name, such as `slora.demo`. Imports no torch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from slora.clip import Clip
    from slora.sources.data import Source
    from slora.sources.models import Built


class Model(NamedTuple):
    """How to build a registered model."""

    build: Callable[[int, bool, int | None, Mapping[str, Any]], Built]
    """`(classes, pretrained, img_size, model_args)`: the arguments of `slora.sources.models.build`."""
    classes: Callable[[], int]
    """Returns the number of outputs of the head in its pretrained weights."""


class ClipModel(NamedTuple):
    """How to build a registered CLIP."""

    build: Callable[[bool, int | None, Mapping[str, Any]], Clip]
    """`(pretrained, img_size, model_args)`: the arguments of `slora.sources.models.build_clip`, but `pretrained` only
    says whether to load its own weights. On the CPU, in fp32."""


MODELS: dict[str, Model] = {}
CLIPS: dict[str, ClipModel] = {}
DATA: dict[str, Callable[[], Source]] = {}


def register_model(name: str, model: Model) -> None:
    """Register `model` as `name`, of the form `source/model`."""
    MODELS[name] = model


def register_clip(name: str, clip: ClipModel) -> None:
    """Register `clip` as `name`, of the form `source/model`; as a model it is also its image tower with a new head."""
    CLIPS[name] = clip


def register_data(name: str, opened: Callable[[], Source]) -> None:
    """Register the data set that `opened` returns as `name`, of lower-case letters and digits."""
    DATA[name] = opened
