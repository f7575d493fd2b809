"""Adapted layers whose training is lost: replaced, computed from other parameters at each call, or never trained."""

from __future__ import annotations

import dataclasses
import re
import warnings
from collections.abc import Mapping

import torch
from torch import Tensor, nn

from slora.config import SelectiveLoRAConfig
from slora.errors import ReplacedLayerWarning, StateError, UntrainedLayerWarning, quoted
from slora.layers import LoRABlocks
from slora.models.adaptable import computed
from slora.models.injection_record import find_injection, injection
from slora.module_tree.sharded import full, is_sharded
from slora.module_tree.wrappers import module_at


def warn_of_lost(model: nn.Module, layers: Mapping[str, LoRABlocks], stacklevel: int) -> None:
    """Warn of layers that `inject` adapted and that were replaced since, and of those that training has not changed.

    The latter have active blocks whose B is still all zero while that of others is not; each is named once, and not
    again if it was named at the first optimizer step (`slora.layers.optimizer_hook`).
    """
    replaced = _replaced(model, layers)
    if replaced:
        first, kind = next(iter(replaced.items()))
        warnings.warn(
            f"{_were(replaced)} adapted by slora.inject, but replaced since ({first!r} is {kind} now): what was "
            f"trained there is lost. Replace layers, resize embeddings and fuse projections before slora.inject",
            ReplacedLayerWarning,
            stacklevel=stacklevel + 1,
        )
    untrained = [name for name in _untrained(layers) if not layers[name].warned_untrained]
    if untrained:
        for name in untrained:
            layers[name].warned_untrained = True
        warnings.warn(
            f"{_were(untrained)} adapted and active, but not trained: B is still zero, because no forward of the "
            f"training reached the layer or no gradient came back. List what is not used in exclude_modules",
            UntrainedLayerWarning,
            stacklevel=stacklevel + 1,
        )


def refuse_all_lost(model: nn.Module, layers: Mapping[str, LoRABlocks]) -> None:
    """Raise `StateError` if all layers that `inject` adapted have been replaced."""
    replaced = {} if layers else _replaced(model, layers)
    if replaced:
        first, kind = next(iter(replaced.items()))
        raise StateError(
            f"there is nothing to save: no adapted layer is left, all {len(replaced)} have been replaced since "
            f"slora.inject ({first!r} is {kind} now). Replace or quantise layers before slora.inject, or on what "
            f"slora.merge_and_unload returns"
        )


def config_of(model: nn.Module, layers: Mapping[str, LoRABlocks]) -> SelectiveLoRAConfig:
    """Return the config of an adapted model, with the layers that were replaced since in `exclude_modules`.

    Where a rank-wise strategy has removed ranks, `rank_pattern` and `alpha_pattern` name the layers one by one.
    """
    config = injection(model).config
    if any((layer.r, layer.lora_alpha) != (config.rank_of(n), config.alpha_of(n)) for n, layer in layers.items()):
        ranks = {f"^{re.escape(n)}$": layer.r for n, layer in layers.items() if layer.r != config.r}
        alphas = {
            f"^{re.escape(n)}$": layer.lora_alpha
            for n, layer in layers.items()
            if layer.lora_alpha != config.lora_alpha
        }
        config = dataclasses.replace(config, rank_pattern=ranks or None, alpha_pattern=alphas or None)
    replaced = _replaced(model, layers)
    if not replaced or isinstance(config.exclude_modules, str):
        return config
    return dataclasses.replace(config, exclude_modules=[*(config.exclude_modules or ()), *replaced])


def refuse_computed(layers: Mapping[str, LoRABlocks], what: str, weight: bool) -> None:
    """Raise `StateError` if a parameter of a layer is computed from others at each forward, as by pruning.

    Its present value may be older than the last optimizer step, and a write to it would be lost. With `weight` the base
    weight is checked, too. `what` is the consequence, for the message.
    """
    for name, layer in layers.items():
        names = ["lora_A", "lora_B", "gate", *([layer.weight_name] if weight else [])]
        for part in names:
            if isinstance(layer.__dict__.get(part), Tensor) or (
                part == layer.weight_name and part not in layer._parameters
            ):
                raise StateError(f"{what}: {part} of {name!r} {computed(layer, part)}")


def refuse_fused(model: nn.Module, layers: Mapping[str, LoRABlocks]) -> None:
    """Raise `StateError` if a layer that is not adapted holds a copy of the weight of an adapted one beside it.

    Projections were fused from the base weights then, without the blocks, and merging would not change the fused one.
    """
    for name, layer in layers.items():
        parent = module_at(model, name.rpartition(".")[0])
        weight = layer.base_weight
        if not layer.activity().active or is_sharded(weight):
            continue
        for key, child in parent.named_children():
            other = None if isinstance(child, LoRABlocks) else child._parameters.get("weight")
            if other is None or other.dim() != 2 or other.shape[1] != weight.shape[1] or len(other) <= len(weight):
                continue
            if bool((other.detach() == weight[0].to(other)).all(1).any()):
                raise StateError(
                    f"{key!r} beside {name!r} was fused from its weight, without the blocks, and merging would not "
                    f"change it; merge before projections are fused, or remove {key!r}"
                )


def _replaced(model: nn.Module, layers: Mapping[str, LoRABlocks]) -> dict[str, str]:
    record = find_injection(model)
    found = {}
    for name in record.layers if record is not None else ():
        if name not in layers:
            try:
                module = module_at(model, name)
            except AttributeError:
                found[name] = "gone"
            else:
                if not isinstance(module, LoRABlocks):
                    found[name] = f"a {type(module).__name__}"
    return found


@torch.no_grad()
def _untrained(layers: Mapping[str, LoRABlocks]) -> list[str]:
    moved: dict[torch.device, dict[str, Tensor]] = {}
    for name, layer in layers.items():
        if layer.activity().active and layer.lora_B.requires_grad:
            B = full(layer.lora_B)
            moved.setdefault(B.device, {})[name] = B.flatten(1).any(1)
    known: dict[str, bool] = {}
    for of_device in moved.values():
        # One copy from each device, of a flag for every block.
        flags = iter(torch.cat(list(of_device.values())).tolist())
        for name, blocks in of_device.items():
            mine = [next(flags) for _ in range(len(blocks))]
            known[name] = any(mine[i] for i in layers[name].activity().active)
    return [name for name in layers if not known.get(name, True)] if any(known.values()) else []


def _were(names: Mapping[str, str] | list[str]) -> str:
    return f"{quoted(names)} {'was' if len(names) == 1 else 'were'}"
