"""`prepare`: makes trainable what one of the four methods trains."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar, get_args

from torch import nn

from slora.clip.towers import SCALE, parameters_of_tower, targets_of_tower
from slora.errors import ConfigError
from slora.layers import adapted_layers
from slora.models.inject import inject
from slora.models.modules_to_save import saved_parts
from slora.models.targets import head_names
from slora.module_tree.wrappers import module_at
from slora.runs.settings import Method, TrainSettings

Model = TypeVar("Model", bound=nn.Module)


def prepare(model: Model, method: Method | None = None, settings: TrainSettings | None = None) -> Model:
    """Make the parameters that `method` trains trainable, in place, and return `model`.

    - "selective": gated LoRA blocks (`slora.inject`) and the classifier head.
    - "lora": the same blocks, always active: gates are 1 and not trained.
    - "full": every parameter.
    - "linear": the classifier head only.

    With `settings.head="zero-shot"`, the blocks or parameters of `settings.tower` of a CLIP, and in place of a head
    `logit_scale`.

    `lora_A` is initialised from torch's global generator: seed it first for a repeatable run.

    Args:
        method: one of the above; None for `settings.method`.
        settings: those of the adapter, and `modules_to_save` if the head is not found automatically.

    Raises:
        ConfigError: the method is unknown, "linear" finds no head, or a zero-shot head needs a CLIP.
        TargetError: a pattern matches nothing.
        StateError: the model is adapted already.
    """
    settings = TrainSettings() if settings is None else settings
    method = settings.method if method is None else method
    if method not in get_args(Method):
        raise ConfigError(f"method={method!r} is unknown; use one of {', '.join(get_args(Method))}")
    prompted = settings.head == "zero-shot"
    if method == "full":
        chosen = list(parameters_of_tower(model, settings.tower) if prompted else model.parameters())
        model.requires_grad_(False)
        for parameter in chosen:
            parameter.requires_grad_(True)
        return model
    heads = (SCALE,) if prompted else heads_of(model)
    heads = heads if settings.modules_to_save is None else tuple(settings.modules_to_save)
    if method == "linear":
        return _only(model, heads, settings)
    config = settings.replace(method=method).lora_config(heads)
    model = inject(model, targets_of_tower(model, config, settings.tower) if prompted else config)
    if method == "lora":
        for _, layer in adapted_layers(model):
            layer.gate.requires_grad_(False)
    return model


def heads_of(model: nn.Module) -> tuple[str, ...]:
    """Return the names of the output heads of `model` that have parameters; none is inside another."""
    names = dict.fromkeys(head_names(model))
    owned = [name for name in names if any(True for _ in module_at(model, name).parameters())]
    return tuple(name for name in owned if not any(name.startswith(other + ".") for other in owned))


def _only(model: Model, heads: Sequence[str], settings: TrainSettings) -> Model:
    chosen = list(saved_parts(model, settings.lora_config(heads)).of(model))
    if not chosen:
        raise ConfigError(
            f"method='linear' trains the head, but {type(model).__name__} has none that is called head, fc or "
            f"classifier; name it in modules_to_save"
        )
    model.requires_grad_(False)
    for parameter in chosen:
        parameter.requires_grad_(True)
    return model
