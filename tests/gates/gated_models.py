"""Small adapted models and their gates, for the tests beside this file."""

from __future__ import annotations

import copy
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import slora
from slora.gates.cache import GateCache
from slora.gates.values import gates
from slora.layers import adapted_layers

POLICIES = ["exact", "probe", "frozen"]


def adapted(make_mlp: Callable[..., nn.Module], *widths: int, **config: Any) -> nn.Module:
    config = {"r": 2, "target_modules": r"fc\d+", **config}
    return slora.inject(make_mlp(*widths), slora.SelectiveLoRAConfig(**config))


def gate_cache_of(model: nn.Module) -> GateCache:
    return next(iter(adapted_layers(model)))[1].gate_cache


def set_gates(model: nn.Module, *active: bool) -> None:
    with torch.no_grad():
        for (_, layer), on in zip(adapted_layers(model), active, strict=True):
            layer.gate.fill_(0.15 if on else 0.05)


def off(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for gate in gates(model):
            gate.zero_()
    return model


def open_blocks(model: nn.Module) -> list[bool]:
    return [bool(on.any()) for on in slora.active_blocks(model).values()]


def deep(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def step(model: nn.Module, *optimizers: torch.optim.Optimizer, inputs: Any = None) -> list[str]:
    """Take a training step and return the warnings about gates."""
    inputs = torch.randn(3, 6) if inputs is None else inputs
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        (model(inputs).square().mean() + slora.gate_penalty(model)).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    return [str(w.message) for w in caught if issubclass(w.category, slora.GateRuleWarning)]
