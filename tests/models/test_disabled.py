"""`disabled`: the base model for a while, exactly, and back."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import slora
from slora.errors import StateError
from slora.gates.values import gates
from slora.layers import adapted_layers
from slora.ops.flops import count_flops


def test_disabled_runs_the_base_model_and_comes_back(model: nn.Module, vit: nn.Module) -> None:
    x = torch.randn(2, 3, 16, 16)
    adapted = model(x)
    with torch.no_grad():
        for gate in gates(model):
            gate.sub_(1.0)
    base = model(x)
    with torch.no_grad():
        for gate in gates(model):
            gate.add_(1.0)
    assert not torch.equal(adapted, base)
    with slora.disabled(model) as same:
        assert same is model
        assert torch.equal(model(x), base)
        with slora.disabled(model):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), adapted)


def test_disabled_ends_with_an_error_inside(model: nn.Module) -> None:
    x = torch.randn(2, 3, 16, 16)
    adapted = model(x)
    with pytest.raises(RuntimeError, match="inside"), slora.disabled(model):
        raise RuntimeError("inside")
    assert torch.equal(model(x), adapted)


def test_disabled_of_a_part_leaves_the_rest_on(model: nn.Module) -> None:
    with slora.disabled(model.blocks[0]):
        assert [layer.enabled for _, layer in adapted_layers(model)] == [False] * 4 + [True] * 4


def test_disabled_needs_no_more_than_the_base_and_gives_the_adapter_no_gradient(model: nn.Module) -> None:
    x = torch.randn(2, 3, 16, 16)
    with slora.disabled(model):
        off = count_flops(model, x)
        model(x).sum().backward()
    assert all(layer.lora_A.grad is None for _, layer in adapted_layers(model))
    assert off < count_flops(model, x)


def test_disabled_of_a_merged_model_is_refused(model: nn.Module) -> None:
    slora.merge(model)
    with (
        pytest.raises(StateError, match=r"its base cannot be run; call slora.unmerge"),
        slora.disabled(model),
    ):
        pass
    assert all(layer.enabled for _, layer in adapted_layers(model))


def test_disabled_runs_the_base_of_released_layers_too(vit: nn.Module) -> None:
    model = slora.inject(vit, slora.SelectiveLoRAConfig(r=2, inactive="frozen"))
    with torch.no_grad():
        for gate in gates(model):
            gate.zero_()
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    assert slora.release_frozen(model) > 0
    with slora.disabled(model):
        assert torch.equal(model(x), expected)
