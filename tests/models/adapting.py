"""What the tests of models share: a small config, the names of adapted layers, the state of a model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

import slora
from slora.layers import adapted_layers

Config = slora.SelectiveLoRAConfig


def small(**settings: Any) -> Config:
    return Config(**{"r": 3, **settings})


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in adapted_layers(model)]


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a failed call must leave as it was."""
    return {
        "modules": [(name, type(module), id(module)) for name, module in model.named_modules()],
        "parameters": [(n, id(p), p.requires_grad, p.dtype, p.data_ptr()) for n, p in model.named_parameters()],
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "attributes": sorted(model.__dict__),
        "fused": [
            (name, getattr(module, "activation_relu_or_gelu", None), getattr(module, "use_nested_tensor", None))
            for name, module in model.named_modules()
        ],
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(model)
    values, old = after.pop("values"), before.pop("values")
    assert after == before
    assert values.keys() == old.keys()
    for name, value in values.items():
        assert torch.equal(value, old[name]), name
