"""`ProximalGates`: the optimizer of the gates, a gradient step and a soft threshold."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from slora.errors import ConfigError
from slora.gates.cache import find_gates, gate_caches
from slora.io.plain import plain
from slora.module_tree.sharded import local


class ProximalGates(torch.optim.Optimizer):
    """Optimizer of the gates: a gradient step, then a soft threshold that replaces the penalty term of the loss.

        gate <- gate - lr * grad
        gate <- sign(gate) * max(|gate| - lr * penalty / blocks, 0)

    where `blocks` is the number of gates that all groups were made with, so that `penalty` means the same as in
    `loss + penalty * gate_penalty(model)`, after `release_frozen`, too. Unlike a subgradient step it does not
    oscillate around 0, and unlike Adam it moves a gate by what the penalty asks for rather than by `lr` whatever
    the penalty is. Gates that the policy "frozen" has switched off keep their values.

    Where another optimizer has the other parameters, call `zero_grad` of both: each clears its own.

    Args:
        params: gate parameters, such as `slora.gates.gates(model)`.
        lr: learning rate of the gates.
        penalty: weight of the mean of |gate|; change `penalty` in `param_groups` for a warm-up.
    """

    def __init__(self, params: Iterable[Any], lr: float = 1e-2, penalty: float = 0.0) -> None:
        for name, value in (("lr", lr), ("penalty", penalty)):
            if not value >= 0:
                raise ConfigError(f"{name}={value} is negative or not a number; use 0 or more")
        super().__init__(params, {"lr": plain(lr), "penalty": plain(penalty)})

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add gates with settings of their own."""
        super().add_param_group(param_group)
        group = self.param_groups[-1]
        group.setdefault("blocks", sum(gate.numel() for gate in group["params"]))
        for members in find_gates([group]).values():
            for _, cache in members:
                cache.penalised = False

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """Take one step; returns the loss of `closure` if one is given."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        blocks = sum(int(group["blocks"]) for group in self.param_groups)
        layers = (layer for cache in gate_caches() for layer in cache.layers())
        frozen = {layer.gate_parameter: layer.threshold for layer in layers if layer.inactive == "frozen"}
        for group in self.param_groups:
            shrink = float(group["lr"]) * float(group["penalty"]) / blocks
            for gate in group["params"]:
                if not gate.requires_grad:
                    continue
                own = local(gate)
                moved = own if gate.grad is None else own.add(local(gate.grad), alpha=-float(group["lr"]))
                moved = nn.functional.softshrink(moved, shrink) if shrink else moved
                if gate in frozen:
                    moved = torch.where(own >= frozen[gate], moved, own)
                own.copy_(moved)
        return loss
