"""`parameter_groups`: optimizer groups of an adapted model, with settings of their own for the gates."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from slora.errors import ConfigError
from slora.io.plain import plain
from slora.layers import LoRABlocks, adapted_layers
from slora.module_tree.sharded import reshard


def parameter_groups(
    model: nn.Module, lr: float = 1e-3, gate_lr: float | None = 1e-2, weight_decay: float = 0.0
) -> list[dict[str, Any]]:
    """Return optimizer groups for the trainable parameters of `model`, with settings of their own for the gates.

    Groups: "lora" (A and B), "rank_gates" (of rank-wise strategies), "saved" (other trainable matrices),
    "saved_no_decay" (biases, norms) and "gates"; empty ones are left out. Adam divides a gradient by its own size, so
    under it a penalty alone would move every gate by `lr` per step however small the penalty is. The group of the gates
    therefore carries settings that make Adam take `lr * grad / (1 + |grad|)`, in effect plain SGD, and switch off
    momentum in SGD.

    Adam, AdamW, NAdam, RAdam, Adamax, RMSprop and SGD of torch and timm respect them. Any other optimizer gives a
    `GateRuleWarning`, and uses its own settings where it cannot read these. For such an optimizer, and for a
    learning-rate schedule that should not change the gates' rate, leave the gates out by `gate_lr=None` and step
    `slora.ProximalGates` beside it.

    What `modules_to_save` trains is kept in fp32 if the model had 16 bits at inject, but not if it was cast after it: a
    `NarrowParameterWarning` says so.

    `torch.optim.Muon` takes matrices only, and A and B are stacks of them: give it the group "saved", the others to
    AdamW. LBFGS takes one group: the parameters of all of them.

    Args:
        lr: learning rate of everything but the gates.
        gate_lr: learning rate of the gates; None leaves them out, where another optimizer or nobody moves them.
        weight_decay: of matrices; gates, biases and norms have none.

    Raises:
        ConfigError: nothing in the model is trainable, or a value is negative.
    """
    lr, gate_lr, weight_decay = (
        value if isinstance(value, Tensor) else plain(value) for value in (lr, gate_lr, weight_decay)
    )
    for name, value in (("lr", lr), ("gate_lr", gate_lr), ("weight_decay", weight_decay)):
        if value is not None and not value >= 0:
            raise ConfigError(f"{name}={value} is negative or not a number; use 0 or more")
    reshard(model)
    lora: list[nn.Parameter] = []
    gate: list[nn.Parameter] = []
    rank_gate: list[nn.Parameter] = []
    for _, layer in adapted_layers(model):
        lora += [layer.lora_A, layer.lora_B]
        gate.append(layer.gate)
        rank_gate += [] if layer.rank_gate is None else [layer.rank_gate]
    special = {*lora, *gate, *rank_gate}
    other = [p for p in model.parameters() if p.requires_grad and p not in special]
    groups: list[dict[str, Any]] = [
        {"name": "lora", "params": lora, "lr": lr, "weight_decay": weight_decay},
        {"name": "rank_gates", "params": rank_gate, "lr": lr, "weight_decay": 0.0},
        {
            "name": "saved",
            "params": [p for p in other if p.dim() > 1],
            "lr": lr,
            "weight_decay": weight_decay,
        },
        {
            "name": "saved_no_decay",
            "params": [p for p in other if p.dim() <= 1],
            "lr": lr,
            "weight_decay": 0.0,
        },
        {
            "name": "gates",
            "params": [] if gate_lr is None else gate,
            "lr": gate_lr,
            "weight_decay": 0.0,
            "betas": (0.0, 0.0),
            "eps": 1.0,
            "momentum": 0.0,
        },
    ]
    for group in groups:
        group["params"] = [p for p in group["params"] if p.requires_grad]
    groups = [group for group in groups if group["params"]]
    for cache in {layer.gate_cache for _, layer in adapted_layers(model)}:
        cache.warn_of_narrow({id(p) for p in other}, stacklevel=2)
    if not groups:
        raise ConfigError("the model has no trainable parameter; call slora.inject(model, config) first")
    return groups


def trainable_parameters(model: nn.Module) -> int:
    """Return how many elements of the parameters of `model` training can still change.

    Those that require gradients, except inactive blocks that stay inactive: under the policy "frozen", or with gates
    that require no gradient.
    """
    count = sum(parameter.numel() for parameter in model.parameters() if parameter.requires_grad)
    for _, layer in adapted_layers(model):
        if layer.inactive == "frozen" or not layer.gate.requires_grad:
            parts = [part for part in _parts(layer) if part.requires_grad]
            count -= len(layer.activity().inactive) * sum(part.numel() // layer.blocks for part in parts)
    return count


def _parts(layer: LoRABlocks) -> list[nn.Parameter]:
    parts = [layer.lora_A, layer.lora_B, layer.gate]
    return parts if layer.rank_gate is None else [*parts, layer.rank_gate]
