"""Freeing the LoRA matrices of layers that are switched off for good."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slora.errors import StateError
from slora.gates.cache import refresh_gates
from slora.gates.gated import gated_layers
from slora.gates.values import gates
from slora.module_tree.sharded import is_sharded


def release_frozen(model: nn.Module, *optimizers: torch.optim.Optimizer) -> int:
    """Free the LoRA matrices of layers that the policy "frozen" has switched off for good; return the bytes freed.

    Their parameters shrink to rank 0, stop requiring gradients, and leave `optimizers` with their state.
    Gates keep their values. Call it between two optimizer steps; a model with nothing to free is left alone.
    """
    if any(is_sharded(gate) for gate in gates(model)):
        raise StateError("parameters that fully_shard has sharded cannot be freed; free them before, or leave it out")
    refresh_gates(model)
    freed = 0
    gone: set[nn.Parameter] = set()
    for _, layer in gated_layers(model):
        if layer.inactive == "frozen" and not layer.released and not layer.activity().active:
            gone.update((layer.lora_A, layer.lora_B, layer.gate))
            gone.update(() if layer.rank_gate is None else (layer.rank_gate,))
            freed += layer.release()
    for optimizer in optimizers if gone else ():
        for group in optimizer.param_groups:
            group["params"] = [parameter for parameter in group["params"] if parameter not in gone]
        for parameter in gone:
            state = optimizer.state.pop(parameter, {})
            freed += sum(value.nbytes for value in state.values() if isinstance(value, Tensor))
    return freed
