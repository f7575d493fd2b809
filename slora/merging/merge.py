"""`merge`, `unmerge`, `merge_and_unload`: the active blocks of a model into its base weights and out again."""

from __future__ import annotations

import math
from typing import TypeVar

import torch
from torch import Tensor, nn

from slora.errors import ConfigError, StateError
from slora.gate import adapted_layers
from slora.inject import unload
from slora.layers import LoRABlocks

Model = TypeVar("Model", bound=nn.Module)


@torch.no_grad()
def merge(model: Model, scale: float = 1.0) -> Model:
    """Fold `scale` times the update of every active block into its base weight, in place; return `model`.

    The sum is formed in fp32 and rounded once to the dtype of the weight. A copy of each weight that changes
    is kept, so `unmerge` restores it bit for bit; layers without an active block are left untouched. While
    merged, gates and LoRA parameters have no effect on the output.

    Raises:
        StateError: the model has no adapted layer, is merged already, or shares a weight that would change.
        ConfigError: `scale` is not finite.
    """
    layers = _adapted(model)
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise StateError(f"{merged[0]!r} is merged already; call slora.unmerge(model) first")
    if not math.isfinite(scale):
        raise ConfigError(f"scale={scale} is not finite; 1.0 merges the full update")
    _refuse_shared(model, layers)
    # Everything that can fail, memory above all, happens before the first weight changes.
    new = {layer: layer.merged_weight(scale) for layer in layers.values() if layer.activity().active}
    for layer in layers.values():
        if layer in new:
            layer._kept_weight = layer.base_weight.data
            layer.replace_base_weight(new[layer])
        layer.merged = True
    return model


@torch.no_grad()
def unmerge(model: Model) -> Model:
    """Put the base weights back as they were before `merge`, bit for bit, in place; return `model`.

    Raises:
        StateError: the model has no adapted layer, or is not merged.
    """
    layers = _adapted(model)
    if not any(layer.merged for layer in layers.values()):
        raise StateError("the model is not merged; there is nothing to undo")
    for layer in layers.values():
        kept: Tensor | None = layer._kept_weight
        if kept is not None:
            layer.replace_base_weight(kept.to(layer.base_weight.device, layer.base_weight.dtype))
            layer._kept_weight = None
        layer.merged = False
    return model


@torch.no_grad()
def merge_and_unload(model: Model, scale: float = 1.0) -> Model:
    """Merge and remove every trace of slora, in place; return `model` with plain layers and plain keys.

    A model that is merged already keeps its weights as they are. Until the last weight is merged the old ones
    are kept, so a failure leaves the model as it was; the peak memory is that of the weights that change.

    Raises:
        StateError: the model has no adapted layer, is merged in part, or shares a weight that would change.
        ConfigError: `scale` is not finite.
    """
    layers = _adapted(model)
    if not all(layer.merged for layer in layers.values()):
        merge(model, scale)
    for layer in layers.values():
        layer.merged, layer._kept_weight = False, None
    return unload(model)


def _adapted(model: nn.Module) -> dict[str, LoRABlocks]:
    layers = dict(adapted_layers(model))
    if not layers:
        raise StateError("the model has no adapted layer; call slora.inject(model, config) first")
    return layers


def _refuse_shared(model: nn.Module, layers: dict[str, LoRABlocks]) -> None:
    changing = {id(layer.base_weight): name for name, layer in layers.items() if layer.activity().active}
    for name, module in model.named_modules():
        for parameter in module._parameters.values():
            adapted = changing.get(id(parameter))
            if adapted is not None and module is not layers[adapted]:
                raise StateError(
                    f"the weight of {adapted!r} is shared with {name!r}, which merging would change, too; "
                    f"give one of them a copy of its own, or exclude {adapted!r} from the adapter"
                )
