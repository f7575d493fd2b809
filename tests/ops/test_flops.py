"""Only the products that are needed run, and the formulas of `slora.ops.flops` count them."""

from __future__ import annotations

import itertools
import math
from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from slora import ops
from slora.ops import flops
from slora.ops.backends import Needs
from slora.ops.backends.eager import EAGER
from slora.ops.operands import LoRAOperands
from tests.ops.problem import SCALING, THRESHOLD, exact, make, trainable

pytestmark = pytest.mark.usefixtures("poisoned")

GRADIENTS = ("x", "weight", "bias", "lora_A", "lora_B", "gate")


@pytest.mark.parametrize(
    "names",
    [c for n in range(1, 7) for c in itertools.combinations(GRADIENTS, n)],
    ids="-".join,
)
def test_only_the_gradients_asked_for_are_computed(names: tuple[str, ...]) -> None:
    base = make((6,), active="some")
    t = trainable(names, base)
    dy = torch.randn(6, 36)
    y = ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING, active=[0, 2])
    flops.register()
    with FlopCounterMode(display=False) as counter:
        y.backward(dy)
    wanted = exact(base, dy)
    for name in GRADIENTS:
        if name in names:
            torch.testing.assert_close(t[name].grad.double(), wanted[name].double(), rtol=1e-4, atol=1e-4, msg=name)
        else:
            assert t[name].grad is None, name
    M, N, K, r, n = 6, 36, 37, 4, 12
    narrow, wide = 2 * M * n * r, 2 * M * r * K
    per_block = (
        narrow * bool({"x", "lora_A"} & set(names))
        + wide * ("x" in names)
        + wide * ("lora_A" in names)
        + narrow * bool({"lora_B", "gate"} & set(names))
    )
    expected = 2 * M * N * K * (("x" in names) + ("weight" in names)) + 2 * per_block
    assert counter.get_total_flops() == expected


class Products(FlopCounterMode):
    """PyTorch's counter, which by itself overlooks the in-place `addmm_` and `baddbmm_`."""

    def __init__(self) -> None:
        missing = {torch.ops.aten.addmm_: self.addmm, torch.ops.aten.baddbmm_: self.addmm}
        super().__init__(display=False, custom_mapping=missing)

    @staticmethod
    def addmm(y: Any, a: Any, b: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 2 * math.prod(a) * b[-1]


@pytest.mark.parametrize("active", [[], [1], [0, 2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)), ids=str)
def test_flop_formulas_count_the_products_that_run(active: list[int], needs: tuple[bool, ...]) -> None:
    t = make((123,), active="all")
    operands = LoRAOperands(t["lora_A"], t["lora_B"], t["gate"], THRESHOLD, SCALING, active)
    with Products() as counter:
        _, S = EAGER.forward(t["x"], t["weight"], t["bias"], operands)
    assert counter.get_total_flops() == flops.forward_flops(123, 36, 37, 4, 3, len(active))
    dy = torch.randn(123, 36)
    with Products() as counter:
        EAGER.backward(dy, t["x"], S, t["weight"], operands, Needs(*needs))
    assert counter.get_total_flops() == flops.backward_flops(123, 36, 37, 4, 3, len(active), needs)
