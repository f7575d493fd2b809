"""`merge`, `unmerge`, `merge_and_unload`: the active blocks of a model into its base weights and out again."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from slora.adapters.tensors import refuse_not_finite
from slora.errors import ConfigError, StateError, UnfinishedSelectionWarning
from slora.gates.cache import refresh_gates
from slora.gates.gated import version
from slora.gates.values import gate_values
from slora.layers import LoRABlocks, adapted_layers
from slora.layers.base import Update
from slora.merging import batched
from slora.merging.overflow import refuse_overflow
from slora.merging.terms import Term, check, disjoint, is_plain, real, span
from slora.models.adaptable import refuse_parametrized, refuse_replaced_forward
from slora.models.exclusive import changing, signals_held
from slora.models.inject import refuse_layer, remove_blocks
from slora.models.injection_record import find_injection
from slora.models.lost_layers import refuse_computed, refuse_fused, warn_of_lost
from slora.module_tree import sharded
from slora.module_tree.wrappers import named_modules
from slora.selection.strategy import unfinished_selection

Model = TypeVar("Model", bound=nn.Module)
Keep = Literal["device", "cpu"]

_WHOLE = "save the adapter, load it into a model that is not, and merge there"


@torch.no_grad()
def merge(model: Model, scale: float = 1.0, *, keep: Keep | None = "device") -> Model:
    """Fold `scale` times the update of every active block into its base weight, in place; return `model`.

    All weights of a device are merged in one call (`slora.merging.batched_merge_`): the sum is formed in fp32 and
    rounded once to the dtype of the weight. Parameters keep their addresses, layers without an active block are left
    untouched, and so is the whole model when anything fails; Ctrl-C waits until the model is merged. While merged,
    gates and LoRA parameters have no effect on the output. One thread at a time merges.

    A merged model is for inference. `load_state_dict` refuses it, since `unmerge` would put the old weights back over
    the loaded ones. Its own `state_dict()` holds the merged weights beside the matrices and is marked, so that no
    adapted model takes it and adds the update again. To save what an adapted model can load, unmerge first; to save
    plain merged weights, call `merge_and_unload`.

    Args:
        model: an adapted model.
        scale: factor in front of all updates.
        keep: what `unmerge` restores from: a copy of each weight that changes, beside it ("device") or in CPU memory
            ("cpu"), or None: no copy, only the update, which unmerging then subtracts, see there.

    Raises:
        StateError: the model has no adapted layer, is merged already, shares a weight that would change, or would hold
            NaN or infinity where it did not, as after an overflow of fp16; a gate is not finite; or a weight is pruned
            or parametrized, or was fused with others. Names the layer.
        ShapeError: two weights that would change share memory.
        ConfigError: `scale` is not finite, or `keep` is unknown.
    """
    with changing:
        layers = _adapted(model)
        if keep not in ("device", "cpu", None):
            raise ConfigError(f'keep={keep!r} is unknown; use "device", "cpu" or None')
        updates, calls = _checked_updates(model, layers, scale)
        warn_of_lost(model, layers, stacklevel=3)
        # Everything that needs memory comes before the first weight changes.
        backups: dict[str, Tensor] = {}
        negated: dict[str, list[Update]] = {}
        for name, update in updates.items():
            if keep is None:
                # Copies: the parameters may be trained or loaded over before the model is unmerged.
                negated[name] = [(A.clone(), B.clone(), -c, row) for A, B, c, row in update]
            else:
                backups[name] = _backup_buffer(layers[name].base_weight, keep)
        with signals_held():
            _run(calls, backups)
            for name, layer in layers.items():
                layer.mark_merged(backups.get(name), negated.get(name, ()))
        return model


@torch.no_grad()
def unmerge(model: Model) -> Model:
    """Put the base weights back as they were before `merge`, bit for bit, in place; return `model`.

    After `merge(model, keep=None)` the update is subtracted instead. Two roundings then separate a weight from its
    base: at most one unit in the last place of the larger of the base and the merged weight, in their dtype, and
    for fp32 twice the error of the sums (`slora.merging.batched`) more. What overflowed does not come back.
    Ctrl-C waits until the model is unmerged.

    Raises:
        StateError: the model has no adapted layer, or is not merged.
    """
    with changing:
        layers = _adapted(model)
        if not any(layer.merged for layer in layers.values()):
            raise StateError("the model is not merged; there is nothing to undo")
        negated: dict[str, list[Update]] = {}
        for name, layer in layers.items():
            device = layer.base_weight.device
            if layer.unmerge_updates:
                negated[name] = [(A.to(device), B.to(device), c, row) for A, B, c, row in layer.unmerge_updates]
        with signals_held():
            _run(_calls(layers, negated))
            # Each layer by itself, so that after a failure the next call goes on where this one stopped.
            for name in negated:
                layers[name].mark_unmerged()
            for layer in layers.values():
                if layer.weight_backup is not None:
                    layer.base_weight.copy_(layer.weight_backup)
                layer.mark_unmerged()
        return model


@torch.no_grad()
def merge_and_unload(model: Model, scale: float = 1.0) -> Model:
    """Merge and remove every trace of slora, in place; return the model with plain layers and plain keys.

    For a wrapped model the module inside the wrapper is returned: what DDP or torch.compile know of it is out of date.
    The weights are written in place, without a copy: whatever can fail does so before the first of them changes, and
    Ctrl-C waits until the last module is plain. A model that is merged already keeps its weights as they are.

    A strategy (`slora.selection`) that has not made its choice yet gives an `UnfinishedSelectionWarning`.

    Raises:
        StateError: the model has no adapted layer, is itself one, is merged in part, shares a weight that would change,
            is merged already and `scale` is given, or would overflow; a gate or a module to save is not finite; or a
            weight is pruned or parametrized, or was fused with others.
        ShapeError: two weights that would change share memory.
        ConfigError: `scale` is not finite.
    """
    with changing:
        layers = _adapted(model)
        refuse_layer(model)
        refuse_parametrized(layers)
        refuse_replaced_forward(layers)
        record = find_injection(model)
        if record is not None:
            refuse_not_finite(record.saved.tensors(model), record.saved.buffers(model))
        selecting = unfinished_selection(model)
        if selecting:
            warnings.warn(
                f"the blocks that are active now are merged, but {selecting}", UnfinishedSelectionWarning, stacklevel=3
            )
        if all(layer.merged for layer in layers.values()):
            if scale != 1.0:
                raise StateError(
                    f"the model is merged already, so scale={scale!r} has no effect; call slora.unmerge first"
                )
            sharded.refuse(model, _WHOLE)
            calls: list[_Call] = []
        else:
            _, calls = _checked_updates(model, layers, scale)
            warn_of_lost(model, layers, stacklevel=3)
        with signals_held():
            _run(calls)
            for layer in layers.values():
                layer.mark_unmerged()
            return remove_blocks(model, layers.values())


class _Call(NamedTuple):
    """Arguments of `batched.merge_terms_` for the weights of one device."""

    weights: list[Tensor]
    terms: list[Term]
    names: list[str]


def _checked_updates(
    model: nn.Module, layers: Mapping[str, LoRABlocks], scale: float
) -> tuple[dict[str, list[Update]], list[_Call]]:
    """The updates of all layers with an active block, and the calls that merge them, after all checks that they can."""
    merged = [name for name, layer in layers.items() if layer.merged]
    if merged:
        raise StateError(f"{merged[0]!r} is merged already; call slora.unmerge(model) first")
    number = real(scale)
    if number is None:
        raise ConfigError(f"scale={scale!r} is not a number; 1.0 merges the full update")
    if not math.isfinite(number):
        raise ConfigError(f"scale={scale} is not finite; 1.0 merges the full update")
    sharded.refuse(model, _WHOLE)
    refresh_gates(model)
    for name, gate in gate_values(model).items():
        if not all(map(math.isfinite, gate)):
            raise StateError(f"the gates of {name!r} are {gate}: training diverged; go back to an earlier checkpoint")
    _refuse_shared(model, layers)
    merging = {name: layer for name, layer in layers.items() if layer.activity().active}
    refuse_computed(merging, "the update would be lost", weight=True)
    refuse_fused(model, layers)
    updates = {name: _updates(layer, number) for name, layer in layers.items() if layer.activity().active}
    calls = _calls(layers, updates)
    # A call checks its own weights; where there are several devices, the last is checked before the first is merged.
    for weights, terms, names in calls if len(calls) > 1 else []:
        check(weights, terms, names, in_place=True, whole=False)
    refuse_overflow({name: layers[name].base_weight.detach() for name in updates}, updates)
    return updates, calls


def _updates(layer: LoRABlocks, scale: float) -> list[Update]:
    n, factor = layer.base_weight.shape[0] // layer.blocks, scale * layer.scaling
    lora_A, lora_B = layer.lora_A.detach(), layer.effective_B.detach()
    return [(lora_A[i], lora_B[i], factor, i * n) for i in layer.activity().active]


def _calls(layers: Mapping[str, LoRABlocks], updates: Mapping[str, Sequence[Update]]) -> list[_Call]:
    calls: dict[torch.device, _Call] = {}
    for name, mine in updates.items():
        weight = layers[name].base_weight
        call = calls.setdefault(weight.device, _Call([], [], []))
        call.terms.extend(Term(len(call.weights), A, B, c, row) for A, B, c, row in mine)
        call.weights.append(weight)
        call.names.append(name)
    return list(calls.values())


def _backup_buffer(weight: Tensor, keep: Keep) -> Tensor:
    """A tensor that merging fills with a copy of `weight`; in CPU memory for a weight on a GPU, the copy already."""
    if keep == "cpu" and weight.device.type != "cpu":
        return weight.detach().cpu().contiguous()
    return torch.empty(weight.shape, dtype=weight.dtype, device=weight.device)


def _run(calls: Sequence[_Call], backups: Mapping[str, Tensor] | None = None) -> None:
    """Merge device after device, filling `backups` by name; on failure, restore what was written."""
    before: list[tuple[Tensor, int, Tensor]] = []
    try:
        for i, (weights, terms, names) in enumerate(calls):
            copies = None
            if backups:
                copies = [backups[name] for name in names]
            elif i + 1 < len(calls):
                copies = [torch.empty_like(weight, memory_format=torch.contiguous_format) for weight in weights]
            if copies is not None:
                before += zip(weights, map(version, weights), copies, strict=True)
            here = copies is not None and copies[0].device == weights[0].device
            batched.merge_terms_(weights, terms, names, copies=copies if here else None)
    except BaseException:
        for weight, written, copy in before:
            # Where the version counter is unchanged, nothing was written, and the copy may still be empty.
            if version(weight) != written:
                weight.copy_(copy)
        raise


def _adapted(model: nn.Module) -> dict[str, LoRABlocks]:
    layers = dict(adapted_layers(model))
    if not layers:
        raise StateError("the model has no adapted layer; call slora.inject(model, config) first")
    for name, layer in layers.items():
        if "meta" in (layer.base_weight.device.type, layer.gate.device.type):
            raise StateError(f"{name!r} is on meta, where weights have no values; materialise the model first")
    return layers


def _refuse_shared(model: nn.Module, layers: Mapping[str, LoRABlocks]) -> None:
    """Raise if writing a weight in place would change a tensor of another module, or of another name."""
    changing = {name: layer.base_weight for name, layer in layers.items() if layer.activity().active}
    held: list[tuple[int, int, str, Any]] = []
    tensor: Any
    for name, module in named_modules(model):
        for tensor in (*module._parameters.values(), *module._buffers.values()):
            # A tensor of another kind (quantised, distributed) has no bytes of its own to compare.
            if is_plain(tensor) and tensor.numel() and tensor.device.type != "meta":
                begin = tensor.data_ptr()
                end = begin + tensor.nbytes if tensor.is_contiguous() else span(tensor, name).end
                held.append((begin, end, name, tensor))
    held.sort(key=lambda entry: entry[:3])
    for i, (_, end, name, tensor) in enumerate(held):
        changes = changing.get(name) is tensor
        for begin, _, other_name, other in held[i + 1 :]:
            if begin >= end:
                break
            too = changing.get(other_name) is other
            if (changes or too) and not disjoint(span(tensor, name), span(other, other_name)):
                adapted, name = (name, other_name) if changes else (other_name, name)
                raise StateError(
                    f"the weight of {adapted!r} is shared with {name!r}, which merging would change, too; "
                    f"give one of them a copy of its own, or exclude {adapted!r} from the adapter"
                )
