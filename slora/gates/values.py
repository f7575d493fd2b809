"""The gates of a model: their parameters, their values, all of them set at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from slora.gates.cache import GateCache
from slora.gates.gated import AnyGated, Gated, gated_layers
from slora.module_tree.sharded import full, put


def gates(model: nn.Module) -> list[nn.Parameter]:
    """Return the gate parameters of `model`, one `[blocks]` tensor per adapted layer."""
    return [layer.gate_parameter for _, layer in gated_layers(model)]


@torch.no_grad()
def set_gates(values: Mapping[AnyGated, Sequence[float]]) -> None:
    """Set the gates of all adapted layers of a model, one number per block.

    One copy to each device, and none back: which blocks are active is known from `values`.
    """
    by_device: dict[torch.device, list[AnyGated]] = {}
    by_cache: dict[GateCache, dict[Gated, list[bool]]] = {}
    for layer, numbers in values.items():
        by_device.setdefault(layer.gate_parameter.device, []).append(layer)
        # As the kernels compare: in the dtype of the gate.
        on = torch.tensor(numbers, dtype=layer.gate_parameter.dtype) >= layer.threshold
        by_cache.setdefault(layer.gate_cache, {})[layer] = on.tolist()
    for device, layers in by_device.items():
        flat = [number for layer in layers for number in values[layer]]
        new = torch.tensor(flat, dtype=torch.float32).to(device, non_blocking=True)
        for layer, own in zip(layers, new.split([layer.blocks for layer in layers]), strict=True):
            put(layer.gate_parameter, own)
            if layer.gate is not layer.gate_parameter:
                layer.gate.copy_(own)
    for cache, active in by_cache.items():
        cache.set_active(active)


def gate_values(model: nn.Module) -> dict[str, list[float]]:
    """Return `{layer name: the scores of its blocks}` of `model`, read by one device-to-host copy per device."""
    by_device: dict[torch.device, list[tuple[str, Tensor]]] = {}
    for name, layer in gated_layers(model):
        gate = full(layer.gate_parameter.detach())
        by_device.setdefault(gate.device, []).append((name, gate))
    values: dict[str, list[float]] = {}
    for found in by_device.values():
        numbers = torch.cat([gate for _, gate in found]).tolist()
        first = 0
        for name, gate in found:
            values[name] = numbers[first : (first := first + len(gate))]
    return values
