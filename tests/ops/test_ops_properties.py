"""A property of the operator `torch.ops.slora.selective_linear`: it agrees with `slora.reference` on any shape."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from slora import ops, reference

pytestmark = pytest.mark.usefixtures("poisoned")

THRESHOLD, SCALING = 0.1, 1.7


def results(f: Callable[..., Tensor], t: dict[str, Tensor], dy: Tensor) -> dict[str, Tensor]:
    """Output and every gradient of `f`."""
    leaves = {name: value.clone().requires_grad_() for name, value in t.items()}
    y = f(**leaves)
    y.backward(dy)
    return {"y": y.detach(), **{name: value.grad for name, value in leaves.items()}}


@settings(max_examples=60, deadline=None)
@given(
    M=st.integers(0, 40),
    K=st.integers(1, 50),
    n=st.integers(1, 17),
    blocks=st.integers(1, 5),
    data=st.data(),
)
def test_any_shape_rank_and_set_of_active_blocks(M: int, K: int, n: int, blocks: int, data: st.DataObject) -> None:
    r = data.draw(st.integers(1, 9))
    active = data.draw(st.lists(st.integers(0, blocks - 1), unique=True).map(sorted))
    listed = active if data.draw(st.booleans()) else None
    shapes = {
        "x": (M, K), "weight": (n * blocks, K), "bias": (n * blocks,),
        "lora_A": (blocks, r, K), "lora_B": (blocks, n, r),
    }  # fmt: skip
    t = {name: torch.randn(shape).double() / shape[-1] ** 0.5 for name, shape in shapes.items()}
    t["gate"] = torch.tensor([0.15 if i in active else 0.05 for i in range(blocks)])
    dy = torch.randn(M, n * blocks).double()

    def ours(**t: Tensor) -> Tensor:
        return ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING, active=listed)

    def exact(gate: Tensor, **t: Tensor) -> Tensor:
        return reference.selective_lora_linear(**t, gate=gate.double(), threshold=THRESHOLD, scaling=SCALING)

    found, wanted = results(ours, t, dy), results(exact, t, dy)
    # The operator leaves the gates of inactive blocks to `slora.gates`.
    wanted["gate"] = wanted["gate"] * (t["gate"] >= THRESHOLD)
    for name, value in found.items():
        # fp64 against fp64: only the order of the sums differs, at most M + K + n terms each.
        torch.testing.assert_close(value, wanted[name].to(value.dtype), rtol=1e-6, atol=1e-6, msg=name)
