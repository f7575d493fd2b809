"""What is checked before an optimizer steps: how it moves the gates, and whether the layers got a gradient.

A forward may never reach a layer, or read its weight in a way that slora does not see. The layer then stays as it was,
and counts as active all the same; the first optimizer step is where that shows.
"""

from __future__ import annotations

import warnings
import weakref

import torch
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from slora.errors import GateRuleWarning, UntrainedLayerWarning, quoted
from slora.gates import optimizer_rules
from slora.gates.cache import GatesOfGroup, find_gates, gate_caches
from slora.gates.gated import Gated, is_current
from slora.gates.proximal import ProximalGates
from slora.module_tree.sharded import is_sharded

# optimizer: (number of parameters in each of its groups, {number of a group: the gates in it})
_gates_in: weakref.WeakKeyDictionary[Optimizer, tuple[list[int], dict[int, GatesOfGroup]]]
_gates_in = weakref.WeakKeyDictionary()
_checked_gradients: weakref.WeakSet[Optimizer] = weakref.WeakSet()


def _before_optimizer_step(optimizer: Optimizer, *_: object) -> None:
    if torch.compiler.is_compiling():
        return
    for cache in gate_caches():
        # By the zeros that DDP made, momentum and weight decay would move the matrices of inactive blocks.
        for parameter in cache.without_gradient:
            parameter.grad = None
        cache.without_gradient.clear()
        if cache.strategy is not None:
            cache.strategy.before_step(optimizer)
    _check_gate_rule(optimizer)
    if optimizer not in _checked_gradients:
        _check_gradients(optimizer)


def _check_gate_rule(optimizer: Optimizer) -> None:
    """Warn once per model if the optimizer moves gates by a rule that cannot select blocks.

    Before the step rather than after it: an optimizer that cannot read the settings of the gates' group would fail in
    the step without naming the reason.
    """
    groups = optimizer.param_groups
    sizes = [len(group["params"]) for group in groups]
    known = _gates_in.get(optimizer)
    if known is None or known[0] != sizes:
        known = _gates_in[optimizer] = sizes, find_gates(groups)
        for i, members in known[1].items():
            optimizer_rules.make_readable(optimizer, groups[i])
            for gate, cache in members:
                if (reason := optimizer_rules.too_narrow(gate.dtype)) and not cache.warned:
                    cache.warned = True
                    warnings.warn(reason, GateRuleWarning, stacklevel=4)
        trained = {id(parameter) for group in groups for parameter in group["params"]}
        for cache in gate_caches():
            cache.warn_of_narrow(trained, stacklevel=4)
    if isinstance(optimizer, ProximalGates):
        return
    for i, members in known[1].items():
        reason = optimizer_rules.rule_problem(optimizer, groups[i]) if members else None
        if reason is None:
            continue
        # Gates that require no gradient, or got none, are moved by someone else.
        for cache in {cache for gate, cache in members if gate.requires_grad and gate.grad is not None}:
            if not cache.warned:
                cache.warned = True
                warnings.warn(reason, GateRuleWarning, stacklevel=4)
        members[:] = [member for member in members if not member[1].warned]


def _check_gradients(optimizer: Optimizer) -> None:
    """Warn, at the first step of the optimizer, of active layers that got no gradient; each is named once."""
    held = {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}
    # Where nothing has a gradient yet, a closure computes it within the step.
    if all(parameter.grad is None for parameter in held.values()):
        return
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    _checked_gradients.add(optimizer)
    for cache in gate_caches():
        layers = [layer for layer in cache.layers() if id(layer.lora_B) in held]
        untrained = [layer for layer in layers if not layer.warned_untrained and _without_gradient(layer)]
        if not untrained:
            continue
        for layer in untrained:
            layer.warned_untrained = True
        names = quoted(layer.injected_name or f"a {type(layer).__name__}" for layer in untrained)
        count = f"{len(untrained)} adapted and active layer{'' if len(untrained) == 1 else 's'}"
        warnings.warn(
            f"{count} got no gradient for the first optimizer step: {names}. No forward reached them, or their weight "
            f"was read in a way that slora does not see. Call the layer, or read `self.<layer>.weight` in the forward "
            f"of the module that holds it; list what is not used in exclude_modules",
            UntrainedLayerWarning,
            stacklevel=4,
        )


def _without_gradient(layer: Gated) -> bool:
    if layer.lora_B.grad is not None or not layer.lora_B.requires_grad or layer.merged:
        return False
    # Sharded gates can be read only by all processes together, and this one may be alone here.
    if is_sharded(layer.gate_parameter) and not (layer._activity and is_current(layer)):
        return False
    return bool(layer.activity().active)


register_optimizer_step_pre_hook(_before_optimizer_step)
