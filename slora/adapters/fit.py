"""Whether an adapter fits a model, and how to inject a plain model so that it does."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from slora.adapters.selective_json import Selective
from slora.errors import CheckpointError, ConfigError, StateError, TargetError
from slora.layers import LoRABlocks
from slora.models.inject import Plan, plan_for, targets_by_name
from slora.module_tree.wrappers import named_modules, unwrapped


def injection_plan(model: nn.Module, content: Selective, folder: Path) -> Plan:
    """Return the injection of the plain `model` that gives the layers of an adapter.

    Raises:
        CheckpointError: a layer does not fit, or the adapter's config selects other layers in this model; names it.
    """
    configs = {
        name: dataclasses.replace(
            content.config,
            r=entry.r,
            lora_alpha=entry.lora_alpha,
            blocks=entry.blocks,
            rank_pattern=None,
            alpha_pattern=None,
            target_modules=[name],
            exclude_modules=None,
        )
        for name, entry in content.layers.items()
    }
    try:
        chosen = targets_by_name(model, content.config)
        plan = plan_for(model, content.config, configs)
    except (TargetError, ConfigError) as error:
        raise CheckpointError(f"{folder} does not fit this {type(unwrapped(model)).__name__}: {error}") from error
    missing = sorted(chosen - content.layers.keys())
    if missing:
        raise CheckpointError(
            f"{folder} adapts {len(content.layers)} layers, the model {len(chosen)}; {missing[0]!r} is only in the "
            f"model"
        )
    return plan


def check_layers(layers: Mapping[str, LoRABlocks], content: Selective, folder: Path) -> None:
    """Check that an adapter was saved from layers like the adapted `layers`.

    Raises:
        CheckpointError: names the first layer that differs.
        StateError: the model is merged.
    """
    if any(layer.merged for layer in layers.values()):
        raise StateError("the model is merged; call slora.unmerge(model) before loading an adapter")
    if any(layer.rank_gate is not None for layer in layers.values()):
        raise StateError(
            "a rank-wise strategy is at work on the model, and would scale what is loaded; call finish() of the "
            "strategy, or slora.freeze_gates(model), first"
        )
    odd = sorted(layers.keys() ^ content.layers.keys())
    if odd:
        where = "only in the model" if odd[0] in layers else "only in the adapter"
        raise CheckpointError(
            f"{folder} adapts {len(content.layers)} layers, the model {len(layers)}; {odd[0]!r} is {where}"
        )
    remedy = "load it into the plain model, which is then injected accordingly"
    for name, layer in layers.items():
        entry = content.layers[name]
        wanted = {
            "lora_alpha": entry.lora_alpha,
            "use_rslora": content.config.use_rslora,
            "threshold": content.config.threshold,
        }
        for setting, value in wanted.items():
            if getattr(layer, setting) != value:
                raise CheckpointError(
                    f"{folder} has {setting}={value} for {name!r}, the model {setting}={getattr(layer, setting)}; "
                    f"{remedy}"
                )
        if (entry.r, entry.blocks) != (layer.r, layer.blocks):
            raise CheckpointError(
                f"{folder} has r={entry.r}, blocks={entry.blocks} for {name!r}, the model r={layer.r}, "
                f"blocks={layer.blocks}; {remedy}"
            )


def base_weights(model: nn.Module, content: Selective, folder: Path) -> dict[str, Tensor]:
    """Return the base weight of each layer of an adapter, after checking its shape.

    Raises:
        CheckpointError: a shape differs; names the layer.
        StateError: the model is on the meta device.
    """
    modules = dict(named_modules(model))
    found = {}
    for name, shape in content.shapes.items():
        module = modules.get(name)
        weight = getattr(module, getattr(module, "weight_name", "weight"), None)
        if not isinstance(weight, Tensor):
            weight = getattr(module, "in_proj_weight", None)
        if not isinstance(weight, Tensor) or list(weight.shape) != shape:
            what = f"has shape {list(weight.shape)}" if isinstance(weight, Tensor) else "does not exist"
            raise CheckpointError(
                f"{folder} belongs to a {content.base_class} whose {name!r} has shape {shape}; in this "
                f"{type(unwrapped(model)).__name__} it {what}. Load the base model that the adapter was trained on."
            )
        if weight.device.type == "meta":
            raise StateError(f"{name!r} is on meta, where weights have no values; materialise the model first")
        found[name] = weight.detach()
    return found
