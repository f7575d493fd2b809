"""Whether an optimizer moves gates by a rule that can select blocks.

A gate has to move by its own gradient times the learning rate: the gradient says what its block is worth to the task,
and the penalty subtracts the same from each. A rule that divides a gradient by its size, or takes its sign, moves all
gates alike. The optimizers of torch and timm were tried one by one; `_RULES` holds those that respect the settings that
`slora.parameter_groups` gives to the gates.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch.optim import Optimizer

# By the names of classes, so that timm need not be there. "adam": lr * m / (sqrt(v) + eps), with momentum m.
_RULES = dict.fromkeys(
    ("Adam", "AdamW", "AdamWLegacy", "Adamax", "AdamP", "FusedAdam", "LaProp", "Muon", "NAdam", "NAdamW",
     "NAdamLegacy", "RAdam", "RAdamLegacy", "RMSprop"), "adam",
) | dict.fromkeys(("SGD", "SGDW", "SGDP", "FusedSGD"), "sgd")  # fmt: skip

# Above it, the gradient of a gate is small beside eps, and the step of Adam without momentum about lr * gradient / eps.
_LARGE_EPS = 0.1

_OWN_RULE = (
    "Give the gates a rule of their own: torch.optim.AdamW(slora.parameter_groups(model, lr=..., gate_lr=...)); or, "
    "for a number of blocks, slora.selection.Budget(model, blocks, steps=...), which needs no optimizer for the gates"
)
_APART = (
    "Leave the gates out, slora.parameter_groups(model, lr=..., gate_lr=None), and step "
    "slora.ProximalGates(slora.gates.gates(model), lr=..., penalty=...) beside it, with a zero_grad of its own; or, "
    "for a number of blocks, use slora.selection.Budget(model, blocks, steps=...), which needs no optimizer for the "
    "gates"
)
_CONSTANT = (
    'Keep their rate: torch.optim.lr_scheduler.LambdaLR(optimizer, [constant if group["name"] == "gates" else decay '
    "for group in optimizer.param_groups]), where constant returns 1.0. Or leave the gates out, "
    "slora.parameter_groups(model, lr=..., gate_lr=None), and step "
    "slora.ProximalGates(slora.gates.gates(model), lr=..., penalty=...) without a schedule"
)


def rule_problem(optimizer: Optimizer, group: Mapping[str, Any]) -> str | None:
    """Return what is wrong with the rule by which `optimizer` moves the gates in `group`, and the remedy; else None.

    Takes about a microsecond if nothing is wrong. The settings decide, not the name of the group.
    """
    rule = _rule(type(optimizer))
    lr, betas = group.get("lr"), group.get("betas") or (0.0,)
    name = type(optimizer).__name__
    if rule is None:
        if any(isinstance(value, Optimizer) for value in vars(optimizer).values()):
            # A wrapper, such as ZeroRedundancyOptimizer: what it holds takes steps of its own.
            return None
        return (
            f"slora does not know the rule by which {name} moves gates. One that takes the sign of a gradient, or "
            f"divides it by its size, moves all gates alike: with the penalty all blocks go below the threshold "
            f"almost together. {_APART}."
        )
    if rule == "adam" and not group.get("eps", 0.0) >= _LARGE_EPS:
        # Under a schedule: the initial rate, because lr is 0 in the first step of a warm-up.
        rate = float(group.get("initial_lr") or lr or 0.0)
        if not rate:
            return None
        return (
            f"{name} moves every gate by about lr={rate:.3g} per step whatever its gradient is: with the penalty all "
            f"blocks go below the threshold almost together, after about (gate - threshold) / lr steps, "
            f"{0.05 / rate:.0f} for a gate 0.05 above it. {_OWN_RULE}."
        )
    momentum = group.get("momentum") or betas[0]
    if momentum:
        return (
            f"momentum {_number(momentum)} in {name} moves every gate by its gradients of about the last "
            f"{1 / max(1e-3, 1 - momentum):.0f} steps: blocks are carried over the threshold after their gradient "
            f"has turned. {_OWN_RULE}."
        )
    if group.get("weight_decay"):
        return (
            f"weight_decay={_number(group['weight_decay'])} in {name} pulls every gate towards 0 beside the penalty, "
            f"during its warm-up too: useful blocks are switched off with the others. {_OWN_RULE}."
        )
    initial = group.get("initial_lr", lr)
    # A rate that is a tensor may be on a GPU, which a comparison would wait for.
    if isinstance(lr, (int, float)) and isinstance(initial, (int, float)) and lr != initial:
        return (
            f"a schedule has changed the rate of the gates in {name} from {_number(initial)} to {_number(lr)}: the "
            f"penalty switches blocks off at this rate, and none any more where it comes near 0. {_CONSTANT}."
        )
    return None


def make_readable(optimizer: Optimizer, group: dict[str, Any]) -> None:
    """Replace settings of `group`, which holds gates, that the optimizer cannot read by the optimizer's defaults.

    Some optimizers take three betas, or two eps. What they do to gates is unknown, and `rule_problem` says so.
    """
    for key in ("betas", "eps"):
        if key in optimizer.defaults and _length(optimizer.defaults[key]) != _length(group.get(key)):
            group[key] = optimizer.defaults[key]


def too_narrow(dtype: torch.dtype) -> str | None:
    """Return why gates of `dtype` lose steps, and the remedy; None where they do not."""
    if dtype.itemsize >= 4:
        return None
    lost = torch.finfo(dtype).eps / 16
    return (
        f"the gates are {dtype}, where a step of less than about {_number(lost)} is lost at the usual score 0.15; give "
        f"them fp32 back: for gate in slora.gates.gates(model): gate.data = gate.data.float()"
    )


def saved_too_narrow(dtype: torch.dtype) -> str:
    """Return why what `modules_to_save` trains loses steps in `dtype`, of 16 bits, and the remedy."""
    return (
        f"what modules_to_save trains is {dtype}, which loses small steps, and torch.amp.GradScaler takes no fp16 "
        f"gradients: the model was cast after slora.inject. Cast it before, and modules are kept in fp32"
    )


def _rule(kind: type[Optimizer]) -> str | None:
    return next((_RULES[base.__name__] for base in kind.__mro__ if base.__name__ in _RULES), None)


def _length(value: Any) -> int | None:
    return len(value) if isinstance(value, (tuple, list)) else None


def _number(value: Any) -> str:
    return f"{float(value):.3g}"
