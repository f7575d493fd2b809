"""The penalty on the gates, `mean |gate|`, and its warm-up."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slora.errors import ConfigError
from slora.gates.gated import gated_layers
from slora.module_tree.sharded import full


def gate_penalty(model: nn.Module) -> Tensor:
    """Return `mean_i |gate_i|` over all blocks of `model`, a differentiable fp32 scalar.

    Add `penalty * gate_penalty(model)` to the task loss, after a warm-up: at the start `B = 0`, so the gates
    get no gradient from the task and the penalty alone would move them. Inactive blocks of the policy "frozen"
    count in the mean but get no gradient: under a plain optimizer the penalty makes gates oscillate around zero by
    one step, and a step longer than about the threshold would switch a block on again. Blocks of the other policies
    may revive that way; `ProximalGates` stops at zero.

    Raises:
        ConfigError: the model has no adapted layer.
    """
    # Gates of one device, dtype and rule together: call by call the host would take longer than for the layers.
    groups: dict[tuple[torch.device, torch.dtype, float | None], list[Tensor]] = {}
    for _, layer in gated_layers(model):
        gate = full(layer.gate)
        if torch.is_grad_enabled():
            layer.gate_cache.penalised = True
        threshold = layer.threshold if layer.inactive == "frozen" else None
        groups.setdefault((gate.device, gate.dtype, threshold), []).append(gate)
    if not groups:
        raise ConfigError("the model has no gates; call slora.inject(model, config) first")
    scores = []
    for (_, _, threshold), gates in groups.items():
        score = torch.cat(gates)
        if threshold is not None:
            score = torch.where(score >= threshold, score, score.detach())
        scores.append(score.float())
    device = scores[0].device
    return torch.cat([score.to(device) for score in scores]).abs().mean()


def penalty_at(step: int, penalty: float, warmup_steps: int, ramp_steps: int = 0) -> float:
    """Return the penalty weight at `step`: 0 during the warm-up, then a linear ramp of `ramp_steps` to `penalty`."""
    if step < warmup_steps:
        return 0.0
    if ramp_steps <= 0:
        return penalty
    return penalty * min(1.0, (step - warmup_steps + 1) / ramp_steps)
