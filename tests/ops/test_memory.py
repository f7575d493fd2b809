"""What a call keeps for its backward, and what it allocates."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slora import ops
from slora.ops import operator
from tests.ops.problem import NAMES, SCALING, THRESHOLD, leaves, make, trainable

pytestmark = pytest.mark.usefixtures("poisoned")


class Allocations(TorchDispatchMode):
    """Shapes of the tensors that operators below this mode allocate."""

    def __init__(self, *known: Tensor | None) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        # Held, so that no address is used twice.
        self.held = {t.untyped_storage().data_ptr(): t for t in known if t is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.held:
                self.held[t.untyped_storage().data_ptr()] = t
                self.shapes.append(tuple(t.shape))
        return result


def kept_by(f: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = f()
    return y, kept


def test_the_graph_keeps_only_x_and_S_besides_the_parameters() -> None:
    M, K, N, r = 123, 37, 36, 4
    t = trainable(("x", "lora_A", "lora_B", "gate"), make((M,), active="some"))
    _, kept = kept_by(lambda: ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING, active=[0, 2]))
    parameters = {t[name].data_ptr() for name in NAMES if t[name] is not None and name != "x"}
    activations = [k for k in kept if k.data_ptr() not in parameters]
    assert sorted(tuple(k.shape) for k in activations) == sorted([(M, K), (M, 2 * r)])
    assert any(k.data_ptr() == t["x"].data_ptr() for k in activations), "x is kept as it is, not as a copy"
    assert not any(k.shape[-1:] == (N,) and k.shape[:-1] == (M,) for k in kept)


def test_x_is_not_kept_where_no_gradient_needs_it() -> None:
    t = trainable(("x", "lora_B", "gate"), make((123,)))
    _, kept = kept_by(lambda: ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING))
    assert not any(k.data_ptr() == t["x"].data_ptr() for k in kept)


def test_S_is_not_kept_where_no_gradient_needs_it() -> None:
    t = trainable(("x", "lora_A"), make((123,), active="all"))
    _, kept = kept_by(lambda: ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING))
    assert not any(tuple(k.shape) == (123, 12) for k in kept)


def test_nothing_is_kept_without_gradients() -> None:
    t = make((5,))
    with torch.no_grad():
        _, kept = kept_by(lambda: ops.selective_linear(**leaves(t), threshold=THRESHOLD, scaling=SCALING))
    assert kept == []
    _, kept = kept_by(lambda: ops.selective_linear(**trainable((), t), threshold=THRESHOLD, scaling=SCALING))
    assert kept == []


@pytest.mark.parametrize("active", [[], [0, 2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["no dropout", "dropout"])
def test_nothing_of_size_M_x_N_is_allocated_but_the_output(active: list[int], dropout: float) -> None:
    M, K, N = 123, 37, 36
    t = trainable(("x", "lora_A", "lora_B", "gate"), make((M,), active="all"))
    t["gate"].data = torch.tensor([0.15 if i in active else 0.05 for i in range(3)])
    args = [t[name] for name in NAMES]
    seed = torch.tensor(5) if dropout else None
    with Allocations(*args) as forward:
        _, S = operator._forward(*args, THRESHOLD, SCALING, active, dropout, seed)
    # With dropout also masked x and, by pairs of columns, its mask.
    large = [shape for shape in forward.shapes if math.prod(shape) >= M * N and not {K, (K + 1) // 2} & set(shape)]
    assert large == [(M, N)]
    dy = torch.randn(M, N)
    with Allocations(*args, S, dy) as backward:
        operator._backward(
            dy, t["x"], S, t["weight"], [True] * 4, t["lora_A"], t["lora_B"], t["gate"], THRESHOLD, SCALING, active,
            dropout, seed,
        )  # fmt: skip
    # N = 36 < K = 37, so what is as large as dy either is dx or is something else of M rows: masked x, its mask.
    assert [shape for shape in backward.shapes if shape[-1:] == (N,) and math.prod(shape) >= M * N] == []
    if not dropout:
        assert [shape for shape in backward.shapes if shape[:1] == (M,) and math.prod(shape) >= M * N] == [(M, K)]
