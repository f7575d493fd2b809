"""Before every optimizer step: is the rule by which the optimizer moves the gates one that can select blocks?"""

from __future__ import annotations

import warnings
import weakref
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from slora.errors import GateRuleWarning
from slora.gates import optimizer_rules
from slora.gates.cache import GatesOfGroup, find_gates, mirrors
from slora.gates.proximal import ProximalGates

# optimizer: (parameters in each of its groups, {group: the gates in it, with their models})
_gates_in: weakref.WeakKeyDictionary[torch.optim.Optimizer, tuple[list[int], dict[int, GatesOfGroup]]]
_gates_in = weakref.WeakKeyDictionary()


def _before_optimizer_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if torch.compiler.is_compiling():
        return
    for mirror in mirrors():
        # With a zero in place of no gradient momentum and weight decay would move matrices of blocks that are off.
        for parameter in mirror.idle:
            parameter.grad = None
        mirror.idle.clear()
    # Before rather than after: an optimizer that cannot read the settings of the gates would fail without a reason.
    groups = optimizer.param_groups
    sizes = [len(group["params"]) for group in groups]
    known = _gates_in.get(optimizer)
    if known is None or known[0] != sizes:
        known = _gates_in[optimizer] = sizes, find_gates(groups)
        for i, members in known[1].items():
            optimizer_rules.make_readable(optimizer, groups[i])
            for gate, mirror in members:
                if (reason := optimizer_rules.too_narrow(gate.dtype)) and not mirror.warned:
                    mirror.warned = True
                    warnings.warn(reason, GateRuleWarning, stacklevel=3)
        trained = {id(parameter) for group in groups for parameter in group["params"]}
        for mirror in mirrors():
            mirror.warn_of_narrow(trained, stacklevel=3)
    if isinstance(optimizer, ProximalGates):
        return
    for i, members in known[1].items():
        reason = optimizer_rules.fault(optimizer, groups[i]) if members else None
        if reason is None:
            continue
        # One that needs no gradient, or gets none, is held by someone else.
        for mirror in {mirror for gate, mirror in members if gate.requires_grad and gate.grad is not None}:
            if not mirror.warned:
                mirror.warned = True
                warnings.warn(reason, GateRuleWarning, stacklevel=3)
        members[:] = [member for member in members if not member[1].warned]


register_optimizer_step_pre_hook(_before_optimizer_step)
