"""`save_adapter` and `load_adapter`: `adapter_model.safetensors`, `adapter_config.json` and `selective.json`.

The first two use PEFT's names for tensors and settings; the third holds what PEFT does not know: gates, threshold, and
which base model the adapter belongs to. Only active blocks are written. Several blocks on one linear layer become one
LoRA pair of their summed rank: A stacked, B block-diagonal. Nothing is pickled.

Single parameters named in `modules_to_save` are saved under their own names, but not listed in `adapter_config.json`,
where PEFT expects modules only. PEFT 0.21 loads them, so its output is the same, but does not save them again.
"""

from __future__ import annotations

import hashlib
import math
import os
import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from slora.adapters.fit import base_weights, check_layers, injection_plan
from slora.adapters.peft import peft_config, stacked_pair
from slora.adapters.selective_json import CONFIG, FORMAT, PREFIX, SELECTIVE, WEIGHTS
from slora.adapters.tensors import (
    block_state,
    digest_of,
    forget_earlier,
    read_adapter,
    refuse_not_finite,
    saved_state,
    spread_sample,
)
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
from slora.models.exclusive import changing, signals_held
from slora.models.inject import adapt
from slora.models.injection_record import injection
from slora.models.lost_layers import config_of, refuse_all_lost, refuse_computed, warn_of_lost
from slora.models.modules_to_save import unsaved
from slora.module_tree.sharded import by_first, full, is_sharded, put, reshard
from slora.module_tree.wrappers import state_of, unwrapped
from slora.selection.strategy import freeze_gates, unfinished_selection

Model = TypeVar("Model", bound=nn.Module)


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapter of `model` into `directory`: all files, or none if one of them cannot be written.

    For a model sharded by `fully_shard`, all processes must call this; the first one writes.

    Warnings: `UnsavedParameterWarning` names parameters that require gradients but belong neither to a block nor to
    `modules_to_save`; `UnfinishedSelectionWarning` says that a strategy (`slora.selection`) has not chosen yet;
    `ReplacedLayerWarning` and `UntrainedLayerWarning` name adapted layers that were replaced or got no training.

    Raises:
        StateError: the model is not adapted, is merged, has lost all adapted layers, has pruned matrices, or a value to
            save is NaN or infinite; names it.
        WriteError: the folder cannot be written, or the disk is full; an earlier adapter is unchanged.
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
    with by_first(any(map(is_sharded, model.parameters()))) as first:
        if first:
            write_adapter(folder, tensors, for_peft, content)
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
            f"some parameters that require gradients are not saved in {folder}: {named}. Name them in modules_to_save "
            f"of the config for slora.inject, or freeze them",
            UnsavedParameterWarning,
            stacklevel=2,
        )


def write_adapter(
    folder: Path, tensors: Mapping[str, Tensor], for_peft: Mapping[str, Any], content: Mapping[str, Any]
) -> None:
    """Write the three files of an adapter: all, or none if one of them cannot be written.

    Args:
        tensors: by their names in the file, on the CPU.
        for_peft: content of `adapter_config.json`.
        content: of `selective.json`; the digest of `tensors` is added.

    Raises:
        WriteError: the folder cannot be written, or the disk is full; an earlier adapter is unchanged.
    """
    forget_earlier(folder)
    # The file with the digest last: until it is replaced, readers find the earlier tensors.
    write_together(
        {
            folder / WEIGHTS: lambda path: save_file(dict(tensors), path, metadata={"format": "pt"}),
            folder / CONFIG: text_writer(json_text(for_peft)),
            folder / SELECTIVE: text_writer(json_text({**content, "tensors_digest": digest_of(tensors)})),
        }
    )


def load_adapter(model: Model, directory: str | os.PathLike[str]) -> Model:
    """Load an adapter into `model`, in place, and return it; a plain model is injected first.

    Everything is read and checked before the first parameter changes; an error leaves the model unchanged. Layers,
    ranks, blocks and `lora_alpha` are those listed in the files: regular expressions from a file are not run. Blocks
    that were inactive when the adapter was saved get new matrices (`B = 0`) and their saved gate. If a budget chose the
    blocks, the gates are frozen.

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
            # Raises if `model` is a submodule of the injected model, or contains it: names would differ.
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
                f"{folder / WEIGHTS} holds {min(tensors)!r}, which this model does not have; load it into the plain "
                f"model, or inject with the same modules_to_save"
            )
        base_dtype = content.config.base_dtype if plan else None
        # In the order of the model, as when it was saved.
        ordered = [weights[name] for name in (plan.layers if plan else layers)]
        if (digest := _digest(ordered, base_dtype)) != content.base_digest:
            warnings.warn(
                f"{folder} was trained on other base weights ({content.base_digest[:12]}) than this "
                f"{type(unwrapped(model)).__name__} has ({digest[:12]}): the shapes agree, the values do not. Load the "
                f"same pretrained weights first.",
                BaseModelWarning,
                stacklevel=2,
            )
        with torch.no_grad(), signals_held():
            if plan is not None:
                adapt(model, plan)
            for name, layer in adapted_layers(model):
                layer.gate_cache.asked = content.asked
                for key, value in states[name].items():
                    put(getattr(layer, key), value)
            present = state_of(model) if values else {}
            for name, value in values.items():
                put(present[name], value)
            if content.asked:
                freeze_gates(model)
        return model


def _parameters(layer: LoRABlocks | None, weight: Tensor) -> dict[str, Tensor]:
    """Tensors with dtype and device of the parameters of `layer`, or of the layer that will adapt `weight`."""
    if layer is None:
        return dict.fromkeys(("lora_A", "lora_B", "gate"), weight.new_empty(0, dtype=torch.float32))
    return {key: getattr(layer, key) for key in (("gate",) if layer.released else ("lora_A", "lora_B", "gate"))}


def _copy(value: Tensor) -> Tensor:
    # safetensors refuses tensors that share memory, such as tied weights.
    return full(value.detach()).cpu().clone(memory_format=torch.contiguous_format)


def selective(model: nn.Module) -> dict[str, Any]:
    """Return the content of `selective.json`: config, `{layer: r, blocks, active, gate}`, fingerprint of the base.

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
        # Only if a budget chose the blocks.
        **({"asked": asked} if asked else {}),
        "config": config_of(model, layers).to_dict(),
        "layers": {name: _layer_entry(name, layer) for name, layer in layers.items()},
        "base": fingerprint(model),
    }


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return what identifies the base of an adapted model: the shapes of the adapted weights and a digest of values.

    The digest covers up to 256 elements of each weight, rounded to bf16, so it is the same for an fp32 and a bf16 base.
    """
    weights = {name: layer.base_weight.detach() for name, layer in adapted_layers(model)}
    shapes = {name: list(weight.shape) for name, weight in weights.items()}
    return {"class": type(unwrapped(model)).__name__, "shapes": shapes, "digest": _digest(weights.values())}


def _digest(weights: Iterable[Tensor], base_dtype: torch.dtype | None = None) -> str:
    """The digest of `weights`, in their own dtype or cast to `base_dtype`."""
    digest = hashlib.sha256()
    for weight in weights:
        sample = spread_sample(full(weight))
        sample = (sample if base_dtype is None else sample.to(base_dtype)).to(torch.bfloat16).float().cpu()
        digest.update(sample.numpy().tobytes())
    return digest.hexdigest()


def _layer_entry(name: str, layer: LoRABlocks) -> dict[str, Any]:
    gate = [float(value) for value in full(layer.gate.detach()).tolist()]
    if not all(map(math.isfinite, gate)):
        raise StateError(f"the gates of {name!r} are {gate}: training diverged; go back to an earlier checkpoint")
    active, ranks = layer.activity().active, layer.block_ranks()
    return {
        "r": layer.r,
        # Only if a rank-wise strategy has left fewer in some block.
        **({} if all(ranks[i] == layer.r for i in active) else {"ranks": ranks}),
        "blocks": layer.blocks,
        "active": list(active),
        "gate": gate,
        # The value, not the pattern: regular expressions from a file are not run.
        "lora_alpha": layer.lora_alpha,
    }
