"""What an adapted layer returns can be changed in place, and what it was given cannot unnoticed."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import slora
from slora.layers import SelectiveLoRALinear, adapted_layers

RESIDUAL = torch.linspace(-1, 1, 12)
CHANGES: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": lambda y: F.relu(y, inplace=True),
    "gelu": F.gelu,
    "silu": lambda y: F.silu(y, inplace=True),
    "add_": lambda y: y.add_(RESIDUAL),
    "mul_": lambda y: y.mul_(RESIDUAL),
    "a part": lambda y: y[..., :3].zero_().sum() + y,
}
ACTIVE: dict[str, tuple[str, list[bool]]] = {
    "all": ("probe", [True, True, True]),
    "some": ("probe", [True, False, True]),
    "none, probed": ("probe", [False, False, False]),
    "none, exact": ("exact", [False, False, False]),
    "none, frozen": ("frozen", [False, False, False]),
}
SHAPES = [(8,), (5, 8), (2, 4, 8), (2, 3, 4, 8)]


def make(policy: str, active: list[bool], **settings: Any) -> SelectiveLoRALinear:
    layer = SelectiveLoRALinear(8, 12, r=2, blocks=3, inactive=policy, probe_rows=2, **settings)
    nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        layer.gate.copy_(torch.where(torch.tensor(active), 0.15, 0.05))
    return layer


def by_hand(layer: SelectiveLoRALinear, x: Tensor) -> Tensor:
    on = (layer.gate >= layer.threshold)[:, None, None]
    delta = torch.where(on, layer.lora_B @ layer.lora_A, 0.0).flatten(0, 1)
    return F.linear(x, layer.weight + layer.scaling * delta, layer.bias)


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("active", ACTIVE)
def test_the_output_can_be_changed_in_place(
    active: str, shape: tuple[int, ...], bias: bool, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLORA_BACKEND", backend)
    layer = make(*ACTIVE[active], bias=bias).double()
    for change in CHANGES.values():
        for needs_x in (True, False):
            x = torch.randn(shape, dtype=torch.float64, requires_grad=needs_x)
            wanted = [t for t in (x, layer.lora_A, layer.lora_B) if t.requires_grad]
            y, expected = change(layer(x)), change(by_hand(layer, x).clone())
            torch.testing.assert_close(y, expected)
            if not y.requires_grad:
                continue
            dy = torch.randn_like(y)
            found = torch.autograd.grad(y, wanted, dy, allow_unused=True, materialize_grads=True)
            torch.testing.assert_close(found, torch.autograd.grad(expected, wanted, dy))


@pytest.mark.parametrize("active", ACTIVE)
def test_the_output_can_be_changed_in_place_where_a_flop_counter_watches(active: str) -> None:
    layer, x = make(*ACTIVE[active]), torch.randn(2, 4, 8, requires_grad=True)
    with FlopCounterMode(display=False):
        F.relu(layer(x), inplace=True).sum().backward()
    (dx,) = torch.autograd.grad(by_hand(layer, x).relu().sum(), x)
    torch.testing.assert_close(x.grad, dx)


def test_the_output_can_be_changed_in_place_under_autocast() -> None:
    layer, x = make(*ACTIVE["some"]), torch.randn(2, 4, 8, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16):
        F.relu(layer(x), inplace=True).sum().backward()
    assert x.grad is not None


@pytest.mark.parametrize("active", ["all", "some", "none, probed"])
def test_the_output_can_be_changed_in_place_in_a_graph(active: str, fresh_dynamo: Any) -> None:
    layer, x = make(*ACTIVE[active]), torch.randn(2, 4, 8, requires_grad=True)
    torch.compile(lambda x: F.relu(layer(x), inplace=True), backend="aot_eager")(x).sum().backward()
    (dx,) = torch.autograd.grad(by_hand(layer, x).relu().sum(), x)
    torch.testing.assert_close(x.grad, dx)


@pytest.mark.parametrize("batch_first", [True, False])
def test_what_attention_returns_can_be_changed_in_place(batch_first: bool) -> None:
    model = nn.ModuleDict({"attention": nn.MultiheadAttention(8, 2, batch_first=batch_first)})
    slora.inject(model, slora.SelectiveLoRAConfig(r=2))
    x = torch.randn(3, 4, 8, requires_grad=True)
    y = model["attention"](x, x, x)[0]
    y.add_(x)
    F.relu(y, inplace=True).sum().backward()
    assert all(layer.lora_B.grad is not None for _, layer in adapted_layers(model))


def test_an_in_place_activation_between_layers_and_a_residual_in_place_train_a_whole_model() -> None:
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.act, self.down = nn.Linear(8, 12), nn.ReLU(inplace=True), nn.Linear(12, 8)

        def forward(self, x: Tensor) -> Tensor:
            return self.down(self.act(self.up(x))).add_(x)

    plain = nn.Sequential(Block(), Block()).double()
    model = slora.inject(copy.deepcopy(plain), slora.SelectiveLoRAConfig(r=2))
    for name, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_B)
        plain.get_submodule(name).weight = nn.Parameter(layer.merged_weight())
    x = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    found, expected = (torch.autograd.grad(m(x).square().sum(), x)[0] for m in (model, plain))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("active", ["all", "some", "none, exact"])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_an_input_changed_after_the_layer_read_it_is_an_error(active: str, shape: tuple[int, ...]) -> None:
    layer = make(*ACTIVE[active])
    x = torch.randn(shape)
    y = layer(x)
    x.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


def test_rows_of_a_probe_are_those_that_the_layer_read() -> None:
    layer, x = make(*ACTIVE["none, probed"]), torch.randn(2, 4, 8)
    gradients = []
    for change in (False, True):
        y = layer(x)
        if change:
            x.zero_()
        gradients.append(torch.autograd.grad(y.sum(), layer.gate)[0])
    assert gradients[0].any()
    assert torch.equal(*gradients)
