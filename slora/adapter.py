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
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from slora.adapter_files import CONFIG, FORMAT, PREFIX, SELECTIVE, WEIGHTS
from slora.config import SelectiveLoRAConfig
from slora.errors import (
    BaseModelWarning,
    CheckpointError,
    SLoRAError,
    StateError,
    UnfinishedSelectionWarning,
    UnsavedParameterWarning,
)
from slora.files import json_text, text_writer, write_together
from slora.gate import reread
from slora.inject import inject, injection, unchanged_on_error, unload
from slora.layers import LoRABlocks, adapted_layers
from slora.peft_format import peft_config, stacked_pair
from slora.reading import read_json
from slora.saved import Saved, unsaved
from slora.selection.strategy import freeze_gates, unfinished_selection
from slora.wrappers import module_at, named_modules, parameter_at, state_of, unwrapped

Model = TypeVar("Model", bound=nn.Module)


def save_adapter(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write the adapter of `model` into `directory`: all files, or none where one of them cannot be written.

    Parameters that require gradients but belong neither to a block nor to `modules_to_save` are not saved: an
    `UnsavedParameterWarning` names them. A strategy (`slora.selection`) that has not made its choice yet gives an
    `UnfinishedSelectionWarning`.

    Raises:
        StateError: the model is not adapted, or is merged.
        WriteError: the folder cannot be written, or the disk is full; an earlier adapter is left as it was.
    """
    record = injection(model)
    layers = dict(adapted_layers(model))
    content = selective(model)
    folder = Path(directory)
    tensors: dict[str, Tensor] = {}
    for name, layer in layers.items():
        if layer.activity().active:
            A, B = stacked_pair(layer)
            tensors[f"{PREFIX}{name}.lora_A.weight"], tensors[f"{PREFIX}{name}.lora_B.weight"] = A, B
    for name in record.saved.modules:
        for key, value in state_of(module_at(model, name)).items():
            tensors[f"{PREFIX}{name}.{key}"] = _copy(value)
    for name in record.saved.parameters:
        tensors[f"{PREFIX}{name}"] = _copy(parameter_at(model, name))
    write_together(
        {
            folder / WEIGHTS: lambda path: save_file(tensors, path, metadata={"format": "pt"}),
            folder / CONFIG: text_writer(json_text(peft_config(record.config, layers, record.saved.modules))),
            folder / SELECTIVE: text_writer(json_text(content)),
        }
    )
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
        named = ", ".join(map(repr, forgotten[:5])) + (f" and {len(forgotten) - 5} more" if len(forgotten) > 5 else "")
        warnings.warn(
            f"not all that requires gradients is saved in {folder}; missing: {named}. Name it "
            f"in modules_to_save of the config that slora.inject gets, or freeze it",
            UnsavedParameterWarning,
            stacklevel=2,
        )


def load_adapter(model: Model, directory: str | os.PathLike[str]) -> Model:
    """Load an adapter into `model`, in place, and return it; a plain model is injected first.

    Everything is read and checked before the first parameter changes. Blocks that were inactive when the
    adapter was saved get fresh matrices (`B = 0`) and their saved gate. Where a budget chose the blocks, the gates are
    frozen: the choice stands.

    Raises:
        CheckpointError: a file is missing or damaged, or the adapter belongs to another model; the first
            layer that differs is named.
        StateError: the model is merged.
    """
    folder = Path(directory)
    if not (folder / SELECTIVE).exists():
        raise CheckpointError(f"{folder / SELECTIVE} does not exist; give a directory that slora.save_adapter wrote")
    content = read_json(folder / SELECTIVE)
    tensors = _read_tensors(folder / WEIGHTS)
    try:
        if content["format"] != FORMAT:
            raise CheckpointError(f"{folder / SELECTIVE} has format {content['format']!r}; this version reads {FORMAT}")
        config = SelectiveLoRAConfig.from_dict(content["config"])
        entries, base = dict(content["layers"]), content["base"]
        base = {"class": base["class"], "shapes": dict(base["shapes"]), "digest": base["digest"]}
        asked = str(content.get("asked", ""))
        if not re.fullmatch(r"(budget=[\d.e-]+)?", asked):
            raise ValueError(f"asked={asked!r}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{folder / SELECTIVE} is incomplete or damaged ({error!r})") from error
    _check_base(model, base, folder)
    if any(True for _ in adapted_layers(model)):
        _fill(model, config, entries, tensors, folder)
    else:
        with unchanged_on_error(model):
            inject(model, config)
            try:
                _fill(model, config, entries, tensors, folder)
            except BaseException:
                unload(model)
                raise
    for _, layer in adapted_layers(model):
        layer._mirror.asked = asked
    if asked:
        freeze_gates(model)
    if fingerprint(model)["digest"] != base["digest"]:
        warnings.warn(
            f"{folder} was trained on other base weights than this {type(unwrapped(model)).__name__} has: shapes "
            f"agree, values do not. Load the same pretrained weights first.",
            BaseModelWarning,
            stacklevel=2,
        )
    return model


def _fill(
    model: nn.Module,
    config: SelectiveLoRAConfig,
    entries: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    folder: Path,
) -> None:
    layers = dict(adapted_layers(model))
    if any(layer.merged for layer in layers.values()):
        raise StateError("the model is merged; call slora.unmerge(model) before loading an adapter")
    if set(layers) != set(entries):
        odd = sorted(set(layers) ^ set(entries))
        where = "only in the model" if odd[0] in layers else "only in the adapter"
        raise CheckpointError(f"{folder} adapts {len(entries)} layers, the model {len(layers)}; {odd[0]!r} is {where}")
    unread = dict(tensors)
    states = {}
    for name, layer in layers.items():
        _check_settings(name, layer, config, folder)
        try:
            states[name] = _block_state(name, layer, entries[name], unread, folder)
        except SLoRAError:
            raise
        except (KeyError, TypeError, ValueError, IndexError) as error:
            raise CheckpointError(f"{folder / SELECTIVE}: the entry of {name!r} is damaged ({error!r})") from error
    saved = _saved_state(model, injection(model).saved, unread, folder)
    if unread:
        raise CheckpointError(
            f"{folder / WEIGHTS} holds {min(unread)!r}, which has no place in this model; load it into the plain "
            f"model, or inject with the same modules_to_save"
        )
    with torch.no_grad():
        for name, layer in layers.items():
            for key, value in states[name].items():
                getattr(layer, key).copy_(value)
        present = state_of(model)
        for key, value in saved.items():
            present[key].copy_(value)


def _copy(value: Tensor) -> Tensor:
    # safetensors refuses tensors that share memory, as tied weights do.
    return value.detach().cpu().clone(memory_format=torch.contiguous_format)


def selective(model: nn.Module) -> dict[str, Any]:
    """Return the content of `selective.json`: config, `{layer: r, blocks, active, gate}`, the base's fingerprint.

    Raises:
        StateError: the model is not adapted, is merged, or a gate is not finite.
    """
    layers = dict(adapted_layers(model))
    if any(layer.merged for layer in layers.values()):
        raise StateError("the model is merged; call slora.unmerge(model) before saving its adapter")
    reread(model)
    asked = next((layer._mirror.asked for layer in layers.values()), "")
    return {
        "format": FORMAT,
        # Only where a budget chose the blocks.
        **({"asked": asked} if asked else {}),
        "config": injection(model).config.to_dict(),
        "layers": {name: _layer_entry(name, layer) for name, layer in layers.items()},
        "base": fingerprint(model),
    }


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return what identifies the base of an adapted model: shapes of the adapted weights and a digest of their values.

    The digest covers up to 256 elements of each weight, rounded to bf16, so it is the same whether the base is
    kept in fp32 or bf16.
    """
    digest = hashlib.sha256()
    shapes = {}
    for name, layer in adapted_layers(model):
        weight = layer.base_weight.detach()
        shapes[name] = list(weight.shape)
        flat = weight.reshape(-1)
        sample = flat[:: max(1, flat.numel() // 256)][:256].to(torch.bfloat16).float().cpu()
        digest.update(sample.numpy().tobytes())
    return {"class": type(unwrapped(model)).__name__, "shapes": shapes, "digest": digest.hexdigest()}


def _layer_entry(name: str, layer: LoRABlocks) -> dict[str, Any]:
    gate = [float(value) for value in layer.gate.detach().tolist()]
    if not all(map(math.isfinite, gate)):
        raise StateError(f"the gates of {name!r} are {gate}: training diverged; go back to an earlier checkpoint")
    return {
        "r": layer.r,
        "blocks": layer.blocks,
        "active": list(layer.activity().active),
        "gate": gate,
    }


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (SafetensorError, OSError) as error:
        raise CheckpointError(f"{path} is not a readable safetensors file ({error}); it may be damaged") from error


def _check_base(model: nn.Module, base: Mapping[str, Any], folder: Path) -> None:
    modules = dict(named_modules(model))
    for name, shape in base["shapes"].items():
        module = modules.get(name)
        weight = getattr(module, getattr(module, "weight_name", "weight"), None)
        if not isinstance(weight, Tensor):
            weight = getattr(module, "in_proj_weight", None)
        found = list(weight.shape) if isinstance(weight, Tensor) else None
        if found != shape:
            what = f"has shape {found}" if found else "does not exist"
            raise CheckpointError(
                f"{folder} belongs to a {base['class']} whose {name!r} has shape {shape}; in this "
                f"{type(unwrapped(model)).__name__} it {what}. Load the base model that the adapter was trained on."
            )


def _check_settings(name: str, layer: LoRABlocks, config: SelectiveLoRAConfig, folder: Path) -> None:
    """Refuse an adapter whose matrices would mean something else in `layer`."""
    wanted = {
        "lora_alpha": config.alpha_of(name),
        "use_rslora": config.use_rslora,
        "threshold": config.threshold,
    }
    for setting, value in wanted.items():
        if getattr(layer, setting) != value:
            raise CheckpointError(
                f"{folder} has {setting}={value} for {name!r}, the model {setting}={getattr(layer, setting)}; "
                f"load it into the plain model, which is then injected to fit"
            )


def _block_state(
    name: str, layer: LoRABlocks, entry: Mapping[str, Any], tensors: dict[str, Tensor], folder: Path
) -> dict[str, Tensor]:
    r, blocks, active, gate = entry["r"], entry["blocks"], entry["active"], entry["gate"]
    if (r, blocks, len(gate)) != (layer.r, layer.blocks, layer.blocks):
        raise CheckpointError(
            f"{folder} has r={r}, blocks={blocks} for {name!r}, the model r={layer.r}, blocks={layer.blocks}; "
            f"load it into the plain model, which is then injected to fit"
        )
    state = {"gate": torch.tensor(gate)}
    if layer.released:
        if active:
            raise CheckpointError(f"{name!r} was freed by inactive='frozen'; load {folder} into the plain model")
        return state
    n = layer.lora_B.shape[1]
    state["lora_A"] = torch.empty(blocks, r, layer.lora_A.shape[2])
    state["lora_B"] = torch.zeros(blocks, n, r)
    for A_i in state["lora_A"]:
        nn.init.kaiming_uniform_(A_i, a=5**0.5)
    if active:
        A, B = (_tensor(tensors, f"{PREFIX}{name}.lora_{letter}.weight", folder) for letter in "AB")
        expected = [len(active) * r, layer.lora_A.shape[2]], [blocks * n, len(active) * r]
        if (list(A.shape), list(B.shape)) != expected:
            raise CheckpointError(
                f"{folder / WEIGHTS}: A and B of {name!r} have shapes {list(A.shape)} and {list(B.shape)}; "
                f"expected {expected[0]} and {expected[1]}"
            )
        for j, i in enumerate(active):
            state["lora_A"][i] = A[j * r : (j + 1) * r]
            state["lora_B"][i] = B[i * n : (i + 1) * n, j * r : (j + 1) * r]
    return state


def _saved_state(model: nn.Module, saved: Saved, tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Take what `modules_to_save` saved out of `tensors`."""
    present: dict[str, Tensor] = {name: parameter_at(model, name) for name in saved.parameters}
    for name in saved.modules:
        present |= {f"{name}.{key}": value for key, value in state_of(module_at(model, name)).items()}
    state = {}
    for name, value in present.items():
        state[name] = _tensor(tensors, f"{PREFIX}{name}", folder)
        if state[name].shape != value.shape:
            raise CheckpointError(
                f"{folder / WEIGHTS}: {name} has shape {list(state[name].shape)}, the model's has "
                f"{list(value.shape)}; build the model with the same number of outputs"
            )
    return state


def _tensor(tensors: dict[str, Tensor], key: str, folder: Path) -> Tensor:
    """Take `key` out of `tensors`."""
    if key not in tensors:
        raise CheckpointError(f"{folder / WEIGHTS} lacks {key!r}; the file is incomplete")
    return tensors.pop(key)
