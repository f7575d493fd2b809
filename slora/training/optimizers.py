"""The optimizers of a run: one for weights, one for gates."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW, Optimizer

from slora.gates.proximal import ProximalGates
from slora.gates.release import release_frozen
from slora.gates.values import gates
from slora.models.parameter_groups import parameter_groups
from slora.runs.settings import TrainSettings


class Optimizers:
    """The optimizers of a run.

    Attributes:
        weights: optimizes LoRA matrices, heads and, under method "full", everything; with `gate_rule="sgd"` it also
            has a group for the gates.
        gates: `slora.ProximalGates` under `gate_rule="proximal"`, else None.
        penalty_in_loss: whether the loss needs the penalty term.
    """

    def __init__(self, model: nn.Module, settings: TrainSettings) -> None:
        trainable_gates = [gate for gate in gates(model) if gate.requires_grad]
        proximal = settings.gate_rule == "proximal" and bool(trainable_gates)
        groups = parameter_groups(model, settings.lr, settings.gate_lr, settings.weight_decay)
        if proximal:
            groups = [group for group in groups if group["name"] != "gates"]
        if settings.optimizer == "adamw":
            # Fused: a loop over many small tensors would take most of the step, also on a CPU.
            self.weights: Optimizer = AdamW(groups, lr=settings.lr, fused=True)
        else:
            groups = [{"momentum": settings.momentum, **group} for group in groups]
            self.weights = SGD(groups, lr=settings.lr)
        self.gates = ProximalGates(trainable_gates, lr=settings.gate_lr) if proximal else None
        self.penalty_in_loss = bool(trainable_gates) and not proximal
        self._highest = [[float(group["lr"]) for group in optimizer.param_groups] for optimizer in self.all]

    @property
    def all(self) -> list[Optimizer]:
        """Every optimizer, in a fixed order."""
        return [self.weights] if self.gates is None else [self.weights, self.gates]

    def set(self, scale: float, penalty: float) -> None:
        """Set the learning rates of the weights to `scale` times their peak values, and the weight of the penalty.

        The learning rate of the gates is constant, so that the penalty moves them by the same at every step.
        """
        for optimizer, highest in zip(self.all, self._highest, strict=True):
            for group, lr in zip(optimizer.param_groups, highest, strict=True):
                if not self._is_gates(optimizer, group):
                    group["lr"] = lr * scale
        if self.gates is not None:
            for group in self.gates.param_groups:
                group["penalty"] = penalty

    def release(self, model: nn.Module) -> int:
        """Free layers that inactive="frozen" has switched off (`slora.release_frozen`); return the freed bytes."""
        return release_frozen(model, *self.all)

    def parameters(self) -> tuple[list[nn.Parameter], list[nn.Parameter]]:
        """Return `(weights, gates)`, which are clipped separately."""
        weights: list[nn.Parameter] = []
        own: list[nn.Parameter] = []
        for optimizer in self.all:
            for group in optimizer.param_groups:
                (own if self._is_gates(optimizer, group) else weights).extend(group["params"])
        return weights, own

    def _is_gates(self, optimizer: Optimizer, group: dict[str, Any]) -> bool:
        return optimizer is self.gates or group.get("name") == "gates"

    def state(self, names: Mapping[Tensor, str]) -> dict[str, Tensor]:
        """Return the optimizers' tensors as `{"<optimizer>.<parameter name>.<key>": tensor}`."""
        return {
            f"{i}.{names[parameter]}.{key}": value
            for i, optimizer in enumerate(self.all)
            for parameter, entries in optimizer.state.items()
            for key, value in entries.items()
            if isinstance(value, Tensor)
        }

    def stateless(self, names: Mapping[Tensor, str]) -> list[str]:
        """Return the parameters without optimizer state, because they have had no gradient so far."""
        return [
            names[parameter]
            for optimizer in self.all
            for group in optimizer.param_groups
            for parameter in group["params"]
            if _state_entries(optimizer, group) and not optimizer.state.get(parameter)
        ]

    def check_state(
        self, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor], stateless: Collection[str], step: int
    ) -> None:
        """Check that `tensors` can be what `state` returns after `step` steps of these optimizers; changes nothing.

        Optimizers themselves check nothing: a fused one writes past the end of a state that is too small.

        Args:
            stateless: parameters that had no gradient so far.

        Raises:
            ValueError: a tensor is missing, unknown, of another shape or dtype, or has an impossible value.
        """
        unread = dict(tensors)
        for i, optimizer in enumerate(self.all):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    name = names[parameter]
                    if name in stateless:
                        continue
                    for key, like in _state_entries(optimizer, group).items():
                        value = unread.pop(f"{i}.{name}.{key}", None)
                        _check_entry(f"{key!r} of {name!r}", value, parameter if like is None else like, key, step)
        if unread:
            raise ValueError(f"it holds {min(unread)!r}, which these optimizers do not have")

    def load_state(self, names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]) -> None:
        """Load what `state` returned, checked by `check_state`; parameters without an entry start without state."""
        for i, optimizer in enumerate(self.all):
            state: dict[int, dict[str, Any]] = {}
            index = 0
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    prefix = f"{i}.{names[parameter]}."
                    entries = {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}
                    if entries:
                        state[index] = entries
                    index += 1
            optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _state_entries(optimizer: Optimizer, group: Mapping[str, Any]) -> dict[str, Tensor | None]:
    """The state of a parameter by key, as a tensor of its shape and dtype; None stands for those of the parameter."""
    if isinstance(optimizer, AdamW):
        return {"step": torch.zeros((), dtype=torch.float32), "exp_avg": None, "exp_avg_sq": None}
    if isinstance(optimizer, SGD):
        return {"momentum_buffer": None} if group["momentum"] else {}
    return {}


def _check_entry(what: str, value: Tensor | None, like: Tensor, key: str, step: int) -> None:
    if value is None:
        raise ValueError(f"{what} is missing")
    if value.shape != like.shape or value.dtype != like.dtype:
        raise ValueError(
            f"{what} has shape {list(value.shape)} and dtype {value.dtype}, expected {list(like.shape)} and "
            f"{like.dtype}"
        )
    if not bool(torch.isfinite(value).all()):
        raise ValueError(f"{what} is not finite")
    if key == "exp_avg_sq" and bool((value < 0).any()):
        raise ValueError(f"{what} is negative, which a mean of squares cannot be")
    if key == "step" and not (1 <= value.item() <= step and value.item() == int(value.item())):
        raise ValueError(f"{what} is {value.item():g} after {step} steps")
