"""Adapters on disk: `adapter_model.safetensors`, `adapter_config.json` and `selective.json`.

The first two use PEFT's names for tensors and settings; the third holds what PEFT does not know: gates,
threshold, and which base model the adapter belongs to. Only active blocks are written. Several blocks on one
linear become one LoRA pair of their summed rank: A stacked, B block-diagonal. Nothing is pickled.

Single parameters that `modules_to_save` names stand among the tensors under their own names, not in
`adapter_config.json`: there PEFT knows of modules only. PEFT 0.21 loads them into the model, so that its output is the
same, but takes them for the model's own and does not save them again.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from slora.adapters.files import CONFIG, FORMAT, PREFIX, SELECTIVE, WEIGHTS
from slora.adapters.fit import base_weights, check_layers, injection_plan
from slora.adapters.peft import peft_config, stacked_pair
from slora.adapters.tensors import block_state, digest_of, forget_earlier, read_adapter, refuse_not_finite, saved_state
from slora.errors import (
    BaseModelWarning,
    CheckpointError,
    StateError,
    UnfinishedSelectionWarning,
    UnsavedParameterWarning,
    quoted,
)
from slora.gates.cache import refresh_gates
from slora.io.atomic import json_text, text_writer, write_together
from slora.layers import LoRABlocks, adapted_layers
from slora.models.inject import adapt
from slora.models.injection import injection
from slora.models.lost_layers import config_of, refuse_all_lost, refuse_computed, warn_of_lost
from slora.models.modules_to_save import unsaved
from slora.module_tree.exclusive import changing, signals_held
from slora.module_tree.sharded import by_first, full, is_sharded, put, reshard
from slora.module_tree.wrappers import state_of, unwrapped
from slora.selection.strategy import freeze_gates, unfinished_selection

Model = TypeVar("Model", bound=nn.Module)


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapter of `model` into `directory`: all files, or none where one of them cannot be written.

    Of a model whose parameters `fully_shard` has sharded, all processes call this, and the first one writes.

    Parameters that require gradients but belong neither to a block nor to `modules_to_save` are not saved: an
    `UnsavedParameterWarning` names them. A strategy (`slora.selection`) that has not made its choice yet gives an
    `UnfinishedSelectionWarning`. Layers that were adapted and have been replaced since, or that training left as they
    were, are named by a `ReplacedLayerWarning` and an `UntrainedLayerWarning`.

    Raises:
        StateError: the model is not adapted, is merged, has lost all adapted layers, has pruned matrices, or holds NaN
            or infinity where it would be saved; names it.
        WriteError: the folder cannot be written, or the disk is full; an earlier adapter is left as it was.
    """
    with changing:
        record = injection(model)
        reshard(model)
        layers = dict(adapted_layers(model))
        refuse_all_lost(model, layers)
        refuse_computed(layers, "the last step would be lost", weight=False)
        content = selective(model)
        folder = Path(directory)
        tensors: dict[str, Tensor] = {}
        for name, layer in layers.items():
            if layer.activity().active:
                A, B = stacked_pair(layer)
                tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = A, B
        tensors |= {f"{PREFIX}{name}": _copy(value) for name, value in record.saved.tensors(model).items()}
        plain_names = {key.removeprefix(PREFIX): value for key, value in tensors.items()}
        refuse_not_finite(plain_names, record.saved.buffers(model))
        for_peft = peft_config(record.config, layers, record.saved.modules)
    content["tensors_digest"] = digest_of(tensors)
    with by_first(any(map(is_sharded, model.parameters()))) as first:
        if first:
            forget_earlier(folder)
            # The file with the digest last: until then a reader finds the earlier tensors.
            write_together(
                {
                    folder / WEIGHTS: lambda path: save_file(tensors, path, metadata={"format": "pt"}),
                    folder / CONFIG: text_writer(json_text(for_peft)),
                    folder / SELECTIVE: text_writer(json_text(content)),
                }
            )
    warn_of_lost(model, layers, stacklevel=2)
    selecting = unfinished_selection(model)
    if selecting:
        active = sum(len(layer.activity().active) for layer in layers.values())
        warnings.warn(
            f"{folder} holds the {active} blocks that are active now, but {selecting}. Call its step() after every "
            f"optimizer step, or choose at once with slora.keep_blocks(model, budget)",
            UnfinishedSelectionWarning,
            stacklevel=2,
        )
    forgotten = unsaved(model, record.saved)
    if forgotten:
        named = quoted(forgotten)
        warnings.warn(
            f"not all that requires gradients is saved in {folder}; missing: {named}. Name it "
            f"in modules_to_save of the config that slora.inject gets, or freeze it",
            UnsavedParameterWarning,
            stacklevel=2,
        )


def load_adapter(model: Model, directory: str | os.PathLike[str]) -> Model:
    """Load an adapter into `model`, in place, and return it; a plain model is injected first.

    Everything is read and checked before the first parameter changes, and an error leaves the model as it was. The
    layers are those that the files list, with the ranks, blocks and `lora_alpha` listed: regular expressions from a
    file are not run. Blocks that were inactive when the adapter was saved get fresh matrices (`B = 0`) and their
    saved gate. Where a budget chose the blocks, the gates are frozen: the choice stands.

    Raises:
        CheckpointError: a file is missing or damaged, holds NaN or infinity, or contradicts another, or the adapter
            belongs to another model; the first layer that differs is named.
        StateError: the model is merged.
    """
    folder = Path(directory)
    content, tensors = read_adapter(folder)
    with changing:
        reshard(model)
        layers = dict(adapted_layers(model))
        if layers:
            # Names in a module around it, or in a part of it, are others.
            injection(model)
        weights = base_weights(model, content, folder)
        plan = None if layers else injection_plan(model, content, folder)
        if plan is None:
            check_layers(layers, content, folder)
        states = {}
        for name, entry in content.layers.items():
            like = _parameters(layers.get(name), weights[name])
            states[name] = block_state(name, entry, content.shapes[name], like, tensors, folder)
        saved = injection(model).saved if plan is None else plan.saved
        values = saved_state(model, saved, tensors, folder, injected=plan is None)
        if tensors:
            raise CheckpointError(
                f"{folder / WEIGHTS} holds {min(tensors)!r}, which has no place in this model; load it into the plain "
                f"model, or inject with the same modules_to_save"
            )
        kept_in = content.config.base_dtype if plan else None
        # In the order of the model, which JSON does not keep.
        ordered = [weights[name] for name in (plan.layers if plan else layers)]
        if _sampled(ordered, kept_in) != content.base_digest:
            warnings.warn(
                f"{folder} was trained on other base weights than this {type(unwrapped(model)).__name__} has: shapes "
                f"agree, values do not. Load the same pretrained weights first.",
                BaseModelWarning,
                stacklevel=2,
            )
        with torch.no_grad(), signals_held():
            if plan is not None:
                adapt(model, plan)
            for name, layer in adapted_layers(model):
                layer.gate_cache.asked = content.asked
                for part, value in states[name].items():
                    put(getattr(layer, part), value)
            present = state_of(model) if values else {}
            for name, value in values.items():
                put(present[name], value)
            if content.asked:
                freeze_gates(model)
        return model


def _parameters(layer: LoRABlocks | None, weight: Tensor) -> dict[str, Tensor]:
    """What an adapter fills: the parameters of `layer`, or of the one that will adapt `weight`."""
    if layer is None:
        return dict.fromkeys(("lora_A", "lora_B", "gate"), weight.new_empty(0, dtype=torch.float32))
    return {part: getattr(layer, part) for part in (("gate",) if layer.released else ("lora_A", "lora_B", "gate"))}


def _copy(value: Tensor) -> Tensor:
    # safetensors refuses tensors that share memory, as tied weights do.
    return full(value.detach()).cpu().clone(memory_format=torch.contiguous_format)


def selective(model: nn.Module) -> dict[str, Any]:
    """Return the content of `selective.json`: config, `{layer: r, blocks, active, gate}`, the base's fingerprint.

    Raises:
        StateError: the model is not adapted, is merged, or a gate is not finite.
    """
    layers = dict(adapted_layers(model))
    if any(layer.merged for layer in layers.values()):
        raise StateError("the model is merged; call slora.unmerge(model) before saving its adapter")
    refresh_gates(model)
    asked = next((layer.gate_cache.asked for layer in layers.values()), "")
    return {
        "format": FORMAT,
        # Only where a budget chose the blocks.
        **({"asked": asked} if asked else {}),
        "config": config_of(model, layers).to_dict(),
        "layers": {name: _layer_entry(name, layer) for name, layer in layers.items()},
        "base": fingerprint(model),
    }


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return what identifies the base of an adapted model: shapes of the adapted weights and a digest of their values.

    The digest covers up to 256 elements of each weight, rounded to bf16, so it is the same whether the base is
    kept in fp32 or bf16.
    """
    weights = {name: layer.base_weight.detach() for name, layer in adapted_layers(model)}
    shapes = {name: list(weight.shape) for name, weight in weights.items()}
    return {"class": type(unwrapped(model)).__name__, "shapes": shapes, "digest": _sampled(weights.values())}


def _sampled(weights: Iterable[Tensor], kept_in: torch.dtype | None = None) -> str:
    """The digest of `weights` that are kept in their own dtype, or will be kept in another."""
    digest = hashlib.sha256()
    for weight in weights:
        flat = full(weight).reshape(-1)
        sample = flat[:: max(1, flat.numel() // 256)][:256]
        sample = (sample if kept_in is None else sample.to(kept_in)).to(torch.bfloat16).float().cpu()
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _layer_entry(name: str, layer: LoRABlocks) -> dict[str, Any]:
    gate = [float(value) for value in full(layer.gate.detach()).tolist()]
    if not all(map(math.isfinite, gate)):
        raise StateError(f"the gates of {name!r} are {gate}: training diverged; go back to an earlier checkpoint")
    return {
        "r": layer.r,
        "blocks": layer.blocks,
        "active": list(layer.activity().active),
        "gate": gate,
        # Not by the pattern that gave it, which is not run from a file.
        "lora_alpha": layer.lora_alpha,
    }
