"""`SelectiveLoRALinear` under autocast and in other dtypes, and the cached cast of its frozen weight."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import slora
from slora.layers import SelectiveLoRALinear
from tests.layers.linear_by_hand import by_hand, layer_of

pytestmark = pytest.mark.usefixtures("poisoned")


class Casts(TorchDispatchMode):
    """How often a tensor of each shape is copied to another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype != args[0].dtype:
            self.shapes.append(tuple(args[0].shape))
        return result


LOW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("base_dtype", [None, torch.bfloat16], ids=["fp32 base", "bf16 base"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("active", [True, False], ids=["active", "inactive"])
def test_under_autocast_the_activations_dtype_rules_and_lora_stays_fp32(
    base_dtype: torch.dtype | None, dtype: torch.dtype, active: bool
) -> None:
    layer = layer_of(base_dtype=base_dtype, gate_init=0.15 if active else 0.05, inactive="exact")
    x = torch.randn(5, 10, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert layer.weight.dtype == (base_dtype or torch.float32)
    for p in (layer.lora_A, layer.lora_B, layer.gate):
        assert p.dtype == torch.float32
        assert p.grad is None or p.grad.dtype == torch.float32
    assert layer.gate.grad.any()


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_under_autocast_results_are_as_exact_as_those_of_eager_pytorch(
    dtype: torch.dtype, assert_as_exact_as: Callable[..., None]
) -> None:
    layer = layer_of(64, 96, r=4)
    x, dy = torch.randn(123, 64), torch.randn(123, 96)

    def peft(x: Tensor) -> Tensor:
        y = F.linear(x, layer.weight, layer.bias)
        updates = [F.linear(F.linear(x, A), B) * layer.scaling for A, B in zip(layer.lora_A, layer.lora_B, strict=True)]
        return y + torch.cat(updates, -1)

    def run(f: Callable[[Tensor], Tensor], wide: bool = False) -> list[Tensor]:
        leaf = (x.double() if wide else x).requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=not wide):
            y = f(leaf)
        return [y.detach(), *torch.autograd.grad(y, (leaf, layer.lora_A, layer.lora_B), dy.to(y.dtype))]

    ours, eager, exact = run(layer), run(peft), run(lambda x: by_hand(layer, x), wide=True)
    for what, *three in zip(("y", "dx", "dA", "dB"), ours, eager, exact, strict=True):
        low = torch.finfo(dtype).eps / torch.finfo(three[1].dtype).eps
        # The gradients come back in fp32 but were computed in the low dtype: its eps is what the floor goes by.
        assert_as_exact_as(*three, what, low * float(three[2].abs().max()))


def test_a_frozen_weight_is_cast_once_per_autocast_region_and_not_once_per_call() -> None:
    layer = layer_of(K=10, N=12)
    x = torch.randn(5, 10)
    with Casts() as casts, torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(4):
            layer(x)
    assert casts.shapes.count((12, 10)) == 1
    assert casts.shapes.count((12,)) == 1


def test_a_weight_kept_in_the_autocast_dtype_is_never_cast() -> None:
    layer = layer_of(K=10, N=12, base_dtype=torch.bfloat16)
    with Casts() as casts, torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(5, 10))
    assert (12, 10) not in casts.shapes
    assert (12,) not in casts.shapes


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.weight.mul_(2),
        lambda layer: layer.weight.copy_(torch.ones(12, 10)),
        lambda layer: layer.load_state_dict({**layer.state_dict(), "weight": torch.ones(12, 10)}),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(12, 10), requires_grad=False)),
        lambda layer: slora.merge(layer),
        lambda layer: slora.merge(layer, 0.5),
    ],
    ids=["in place", "copy", "load_state_dict", "new parameter", "merge", "merge with a scale"],
)
def test_the_cast_follows_a_weight_that_changes(change: Callable[[SelectiveLoRALinear], Any]) -> None:
    layer = layer_of()
    x = torch.randn(5, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        before = layer(x)
        change(layer)
        after = layer(x)
        layer._cast.clear()
        assert torch.equal(after, layer(x))
        assert layer.merged or not torch.equal(before, after)


def test_the_cast_follows_merges_whose_weights_reuse_an_address() -> None:
    layer = layer_of(64, 96)
    x = torch.randn(5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        for scale in (1.0, 0.5, -1.0, 2.0):
            slora.merge(layer, scale)
            y = layer(x)
            expected = F.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16())
            assert torch.equal(y, expected)
            slora.unmerge(layer)


def test_autocast_leaves_fp64_alone_and_nested_regions_each_have_their_dtype() -> None:
    layer = layer_of()
    x = torch.randn(5, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert layer(x).dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.float16):
            assert layer(x).dtype == torch.float16
        assert layer.double()(x.double()).dtype == torch.float64


def test_gradients_accumulate_in_fp32_over_micro_batches_under_autocast() -> None:
    # 2^-9 is lost when added to 1 in bf16.
    layer = SelectiveLoRALinear(1, 1, bias=False, r=1, lora_alpha=1)
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for value in (1.0, 2.0**-9):
            layer(torch.tensor([[value]])).sum().backward()
    assert float(layer.lora_A.grad) == 1.0 + 2.0**-9


def test_base_dtype_halves_the_frozen_weights_only() -> None:
    layer = layer_of(base_dtype=torch.bfloat16)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert layer.lora_A.dtype == layer.lora_B.dtype == layer.gate.dtype == torch.float32
    y = layer(torch.randn(3, 10).bfloat16())
    assert y.dtype == torch.bfloat16
