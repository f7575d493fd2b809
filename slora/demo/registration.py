"""Registers the demo's model and data sets by name. Imports torch only when they are used."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from slora.errors import ConfigError
from slora.sources.registry import ClipModel, Model, register_clip, register_data, register_model

if TYPE_CHECKING:
    from slora.clip import Clip
    from slora.sources.data import Source
    from slora.sources.models import Built

MODEL = "demo/letters_vit"
CLIP = "demo/glyph_clip"


def _model(classes: int, pretrained: bool, img_size: int | None, model_args: Mapping[str, Any]) -> Built:
    from slora.demo.letters import IMAGE_SIZE
    from slora.demo.model import build, load_pretrained
    from slora.models.input_spec import InputSpec
    from slora.sources.models import Built

    _no_arguments(MODEL, img_size, model_args)
    model = load_pretrained(classes) if pretrained else build(classes)
    return Built(model, InputSpec(1, IMAGE_SIZE, (0.0,), (1.0,), "bilinear"))


def _clip(pretrained: bool, img_size: int | None, model_args: Mapping[str, Any]) -> Clip:
    from slora.clip import Clip
    from slora.demo.captions import TEMPLATES, GlyphTokenizer
    from slora.demo.glyph_clip import build_clip, load_clip
    from slora.demo.letters import IMAGE_SIZE
    from slora.models.input_spec import InputSpec

    _no_arguments(CLIP, img_size, model_args)
    model = load_clip() if pretrained else build_clip()
    # The grey value of an image is given three times: open_clip's image towers have three channels.
    return Clip(model, GlyphTokenizer(), InputSpec(3, IMAGE_SIZE, (0.0,) * 3, (1.0,) * 3, "bilinear"), TEMPLATES)


def _no_arguments(name: str, img_size: int | None, model_args: Mapping[str, Any]) -> None:
    from slora.demo.letters import IMAGE_SIZE
    from slora.sources.models import arguments_text

    if model_args or img_size not in (None, IMAGE_SIZE):
        raise ConfigError(
            f"{name} takes no arguments and images of {IMAGE_SIZE} x {IMAGE_SIZE} pixels, but "
            f"{arguments_text(img_size, model_args)} was given; remove it"
        )


def _classes() -> int:
    from slora.demo.letters import CLASSES

    return len(CLASSES)


def _digits() -> Source:
    from torch.utils.data import TensorDataset

    from slora.demo.digits import CLASSES, digits
    from slora.sources.data import Source

    training, evaluation = digits(seed=0)
    return Source("digits", tuple(CLASSES), TensorDataset(*training), TensorDataset(*evaluation), "none")


def _letters() -> Source:
    from torch.utils.data import TensorDataset

    from slora.demo.letters import CLASSES, letters
    from slora.sources.data import Source

    training, evaluation = letters(100, seed=1), letters(50, seed=2)
    return Source("letters", tuple(CLASSES), TensorDataset(*training), TensorDataset(*evaluation), "none")


register_model(MODEL, Model(_model, _classes))
register_clip(CLIP, ClipModel(_clip))
register_data("digits", _digits)
register_data("letters", _letters)
