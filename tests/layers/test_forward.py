"""A call takes its layer as it is now: changes behind parameters are noticed and checked."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slora.errors import ShapeError
from tests.layers.linear_by_hand import by_hand, layer_of

pytestmark = pytest.mark.usefixtures("poisoned")

CHANGES: dict[str, Callable[[Any], object]] = {
    "scaling": lambda layer: setattr(layer, "lora_alpha", 5.0),
    "threshold": lambda layer: setattr(layer, "threshold", 0.2),
    "another A": lambda layer: setattr(layer, "lora_A", nn.Parameter(torch.randn_like(layer.lora_A))),
    "another A behind attributes": lambda layer: layer._parameters.update(lora_A=torch.randn_like(layer.lora_A)),
    "A in place": lambda layer: layer.lora_A.data.mul_(2),
    "another weight": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn_like(layer.weight))),
    "a gate": lambda layer: nn.init.constant_(layer.gate, 0.0),
    "a state dict": lambda layer: layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()}),
    "disabled": lambda layer: setattr(layer, "enabled", False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_takes_what_the_layer_is_now(change: str) -> None:
    layer, x = layer_of(inactive="frozen"), torch.randn(7, 10)
    with torch.no_grad():
        layer.lora_B.normal_()
        before = layer(x)
        CHANGES[change](layer)
        found = layer(x)
        # A copy has not been called yet.
        assert torch.equal(found, copy.deepcopy(layer)(x))
    assert not torch.equal(found, before)


def test_what_does_not_fit_is_refused_at_any_call() -> None:
    layer = layer_of()
    for _ in range(2):
        layer(torch.randn(7, 10))
        with pytest.raises(ShapeError, match=r"x has shape \[7, 11\] and weight"):
            layer(torch.randn(7, 11))
        with pytest.raises(ShapeError, match=r"weight has shape .* torch.float32 but x has .* torch.float64"):
            layer(torch.randn(7, 10).double())
    layer.lora_B = nn.Parameter(torch.zeros(3, 4, 3))
    with pytest.raises(ShapeError, match=r"lora_B has shape \[3, 4, 3\]"):
        layer(torch.randn(7, 10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: setattr(layer.bias, "data", torch.randn(1)), r"bias has shape \[1\]; expected \[12\]"),
        (lambda layer: setattr(layer.bias, "data", layer.bias.data.half()), r"bias has .* torch.float16 but x has"),
        (lambda layer: setattr(layer.lora_A, "data", layer.lora_A.data.half()), r"lora_A has .* torch.float16"),
        (lambda layer: setattr(layer.lora_A, "data", torch.randn(3, 3, 10)), r"lora_B has shape \[3, 4, 2\]; expected"),
        (
            lambda layer: setattr(layer.gate, "data", torch.ones(4)),
            r"lora_A has shape \[3, 2, 10\]; expected \[4, r, 10\]",
        ),
    ],
    ids=["shape of bias", "dtype of bias", "dtype of A", "rank of A", "number of gates"],
)
def test_what_was_put_behind_a_parameter_is_checked_again(change: Callable[[Any], object], message: str) -> None:
    layer = layer_of()
    layer(torch.randn(7, 10))
    change(layer)
    with pytest.raises(ShapeError, match=message):
        layer(torch.randn(7, 10))


def test_after_a_step_the_new_values_are_used_whether_or_not_the_same_blocks_are_active() -> None:
    layer, x = layer_of(inactive="frozen"), torch.randn(7, 10)
    groups = [{"params": [layer.lora_A, layer.lora_B]}, {"params": [layer.gate], "lr": 0.0}]
    optimizer = torch.optim.SGD(groups, lr=0.01)
    for gates in ([0.2, 0.2, 0.2], [0.3, 0.2, 0.2], [0.3, 0.0, 0.2], [0.3, 0.0, 0.2], [0.0, 0.3, 0.2]):
        layer(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            layer.gate.copy_(torch.tensor(gates))
        torch.testing.assert_close(layer(x), by_hand(layer, x).float())


def replica_of(layer: Any) -> Any:
    """A replica as `DataParallel` makes it, with copies in place of parameters."""
    replica = layer._replicate_for_data_parallel()
    for name, value in layer._parameters.items():
        if value is None:
            replica._parameters[name] = None
        else:
            setattr(replica, name, value * 1)
    return replica


def test_replicas_have_rank_gates_too() -> None:
    layer, x = layer_of(inactive="frozen"), torch.randn(7, 10)
    layer.add_rank_gate().data.uniform_()
    y = layer(x)
    assert torch.equal(replica_of(layer)(x), y)


def test_parametrizations_replicas_and_deleted_parameters() -> None:
    layer, x = layer_of(inactive="frozen"), torch.randn(7, 10)
    y = layer(x)
    assert torch.equal(replica_of(layer)(x), y)

    class Twice(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return 2 * t

    for name in ("lora_A", "gate"):
        nn.utils.parametrize.register_parametrization(layer, name, Twice())
        for _ in range(2):
            found = layer(x)
    torch.testing.assert_close(found, by_hand(layer, x).float())
    plain = layer_of()
    plain(x)
    del plain.lora_A
    with pytest.raises(AttributeError, match="lora_A"):
        plain(x)
