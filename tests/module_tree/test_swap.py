"""Adapted layers stand wherever a model refers to the layers they took the place of: hooks, lists, bound methods."""

from __future__ import annotations

import copy
import functools
import types
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slora
from slora.errors import TargetError
from slora.layers import adapted_layers

Config = slora.SelectiveLoRAConfig


def mlp() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 8))


def dispatched(model: nn.Module, how: str = "once") -> nn.Module:
    accelerate = pytest.importorskip("accelerate")
    if how == "removed":
        model = dispatched(model)
        accelerate.hooks.remove_hook_from_module(model, recurse=True)
        return model
    model = accelerate.dispatch_model(
        model, {name: "cpu" for name, _ in model.named_children()}, main_device="cpu", force_hooks=True
    )
    if how == "twice":
        for child in model.children():
            accelerate.hooks.add_hook_to_module(child, accelerate.hooks.ModelHook(), append=True)
    return model


def assert_trained(model: nn.Module, x: Tensor) -> None:
    model(x).square().sum().backward()
    for name, layer in adapted_layers(model):
        assert layer.lora_B.grad is not None, name
        assert layer.lora_B.grad.any(), name


@pytest.mark.parametrize("how", ["once", "twice", "removed"])
def test_layers_with_hooks_of_accelerate_train_merge_and_unload(how: str, randomise: Any) -> None:
    base, x = mlp(), torch.randn(4, 16)
    expected = base(x)
    model = slora.inject(dispatched(base, how), Config(r=2, target_modules=["0"], modules_to_save=["2"]))
    assert torch.equal(model(x), expected)
    assert_trained(model, x)
    adapted = randomise(model)(x)
    assert not torch.allclose(adapted, expected)
    torch.testing.assert_close(copy.deepcopy(model)(x), adapted)
    merged = slora.merge_and_unload(copy.deepcopy(model))
    torch.testing.assert_close(merged(x), adapted, rtol=1e-5, atol=1e-5)
    slora.unload(model)
    assert type(model[0]) is nn.Linear
    assert torch.equal(model(x), expected)
    with torch.no_grad():
        model[0].weight.zero_()
        model[2].weight.zero_()
    assert torch.equal(model(x), model[2].bias.expand(4, 8))


def test_hooks_that_are_added_or_removed_after_inject_leave_the_blocks_in_force(randomise: Any) -> None:
    accelerate = pytest.importorskip("accelerate")
    model, x = randomise(slora.inject(mlp(), Config(r=2, target_modules=["0", "2"]))), torch.randn(4, 16)
    expected = model(x)
    dispatched(model)
    assert torch.equal(model(x), expected)
    slora.unload(model)
    assert torch.equal(model(x), mlp()(x))
    model = slora.inject(dispatched(mlp()), Config(r=2, target_modules=["0", "2"]))
    accelerate.hooks.remove_hook_from_module(model, recurse=True)
    assert_trained(model, x)


def test_a_reader_of_weights_with_a_hook_of_accelerate_sees_the_blocks(randomise: Any) -> None:
    timm = pytest.importorskip("timm")
    base, x = timm.models.beit.Attention(8, num_heads=2, qkv_bias=True), torch.randn(2, 5, 8)
    model = nn.Sequential(base)
    expected = model(x)
    accelerate = pytest.importorskip("accelerate")
    accelerate.hooks.add_hook_to_module(base, accelerate.hooks.ModelHook())
    slora.inject(model, Config(r=2))
    assert torch.equal(model(x), expected)
    assert_trained(model, x)
    torch.testing.assert_close(slora.merge(randomise(model))(x), slora.unmerge(model)(x), rtol=1e-4, atol=1e-4)
    slora.unload(model)
    assert type(model[0]) is timm.models.beit.Attention
    assert torch.equal(model(x), expected)


def test_weights_that_accelerate_offloads_are_refused() -> None:
    accelerate = pytest.importorskip("accelerate")
    model = accelerate.cpu_offload(mlp(), execution_device="cpu")
    with pytest.raises(TargetError, match=r"'0' cannot: accelerate offloads its weights; load the model without"):
        slora.inject(model, Config(r=2))


class Holder(nn.Module):
    """Refers to its layers otherwise than as children."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.c, self.d = (nn.Linear(8, 8) for _ in range(4))
        self.listed = [self.a]
        self.by_name = {"b": (self.b, "b")}
        self.bound = self.c.forward
        self.partly = functools.partial(nn.Linear.forward, self.d)
        self.partly_called = functools.partial(_call, layer=self.d)

    def forward(self, x: Tensor) -> Tensor:
        return self.partly_called(self.bound(self.by_name["b"][0](self.listed[0](x))))


def _call(x: Tensor, layer: nn.Module) -> Tensor:
    return layer(x)


def test_layers_that_are_held_besides_are_replaced_there_and_back(randomise: Any) -> None:
    model, x = nn.Sequential(Holder()), torch.randn(3, 8)
    expected = model(x)
    held = model[0].listed
    slora.inject(model, Config(r=2))
    assert torch.equal(model(x), expected)
    assert_trained(model, x)
    assert held is model[0].listed
    adapted = randomise(model)(x)
    torch.testing.assert_close(slora.merge(model)(x), adapted, rtol=1e-4, atol=1e-5)
    slora.unload(slora.unmerge(model))
    assert torch.equal(model(x), expected)
    assert all(type(module) is nn.Linear for module in (held[0], model[0].by_name["b"][0], model[0].bound.__self__))


@pytest.mark.parametrize("how", ["lambda", "method", "partial"])
def test_a_forward_that_was_replaced_on_the_instance_is_refused(how: str) -> None:
    model = mlp()
    old = model[0].forward
    model[0].forward = {
        "lambda": lambda x: old(x) * 2,
        "method": types.MethodType(lambda self, x: nn.functional.linear(x, self.weight), model[0]),
        "partial": functools.partial(nn.functional.linear, weight=model[0].weight),
    }[how]
    with pytest.raises(TargetError, match=r"'0' \(Linear\): its forward was replaced on the instance"):
        slora.inject(model, Config(r=2, target_modules=["0"]))
    with pytest.warns(slora.SkippedLayerWarning, match="'0': its forward was replaced"):
        slora.inject(model, Config(r=2))
    assert type(model[0]) is nn.Linear
