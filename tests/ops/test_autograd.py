"""The operator within autograd: higher derivatives, checkpointing, forward mode, batched gradients, autocast."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from slora import ops
from slora.errors import StateError
from tests.ops.problem import NAMES, SCALING, THRESHOLD, active_of, leaves, make, name_of, ours, trainable

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("blocks", [1, 3])
def test_gradients_agree_with_finite_differences(blocks: int) -> None:
    t = leaves(make((4,), 5, 6, blocks, 2, dtype=torch.float64))
    gate = t.pop("gate").detach()
    names = list(t)

    def f(*values: Tensor) -> Tensor:
        return ops.selective_linear(
            **dict(zip(names, values, strict=True)), gate=gate, threshold=THRESHOLD, scaling=SCALING
        )

    assert torch.autograd.gradcheck(f, tuple(t.values()))


def test_a_second_derivative_is_refused_and_the_reference_backend_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    t = leaves(make((4,)))

    def twice() -> Tensor:
        y = ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING)
        (dx,) = torch.autograd.grad(y.square().sum(), t["x"], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), t["lora_A"])[0]

    with pytest.raises(StateError, match=r"differentiable once; set SLORA_BACKEND=reference"):
        twice()
    monkeypatch.setenv("SLORA_BACKEND", "reference")
    assert twice().isfinite().all()


@pytest.mark.parametrize("name", ["lora_A", "lora_B"])
def test_the_backward_in_16_bits_multiplies_by_the_matrices_of_the_forward(name: str) -> None:
    given, dy = make((4,), dtype=torch.bfloat16, lora_dtype=torch.float32), torch.randn(4, 36)
    expected, t = ours(given, dy), leaves(given)
    y = ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING)
    t[name].data.zero_()
    y.backward(dy.to(y.dtype))
    for other, value in t.items():
        assert torch.equal(value.grad, expected[other]), other
    y = ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING)
    with torch.no_grad():
        t[name].add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward(dy.to(y.dtype))


class Watching(TorchDispatchMode):
    """Names of the operators of slora that are seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "slora":
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lora", [None, torch.float32], ids=["lora of x", "lora fp32"])
@pytest.mark.parametrize("active", ["some", "all"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_eager_mode_and_the_operator_give_the_same_bits(
    dtype: torch.dtype, dropout: float, active: str, lora: torch.dtype | None
) -> None:
    t, dy = make((2, 7), active=active, dtype=dtype, lora_dtype=lora), torch.randn(2, 7, 36)
    more = {"active": active_of(t), "dropout": dropout, "seed": torch.tensor(3) if dropout else None}
    eager_mode = ours(t, dy, **more)
    with Watching() as watching:
        watched = ours(t, dy, **more)
    assert set(watching.seen) == {"slora::selective_linear", "slora::selective_linear_backward"}
    assert eager_mode.keys() == watched.keys() == {"y", *NAMES}
    assert all(torch.equal(eager_mode[name], watched[name]) for name in watched)


@pytest.mark.parametrize("trained", [("x",), ("lora_A", "lora_B"), ("x", "gate")], ids="-".join)
def test_a_second_derivative_of_cast_matrices_is_refused(trained: tuple[str, ...]) -> None:
    t = trainable(trained, make((7,), dtype=torch.bfloat16, lora_dtype=torch.float32))
    y = ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING)
    (gradient, *_) = torch.autograd.grad(y.float().sum(), [t[trained[0]]], create_graph=True)
    if gradient.requires_grad:
        with pytest.raises(StateError, match="differentiable once"):
            gradient.float().square().sum().backward()
    else:
        # The gradient of a sum by x alone has no parameter in it that could be differentiated.
        assert trained == ("x",)


@pytest.mark.parametrize("around", ["forward", "backward"])
@pytest.mark.parametrize("names", [("x", "lora_A"), ("x", "lora_A", "lora_B", "gate")], ids="-".join)
def test_checkpointed_layers_may_be_watched_in_one_direction_only(names: tuple[str, ...], around: str) -> None:
    from torch.utils.checkpoint import checkpoint

    t = trainable(names, make((7,), dtype=torch.bfloat16, lora_dtype=torch.float32, active="all"))

    def call(x: Tensor) -> Tensor:
        return ops.selective_linear(**(t | {"x": x}), threshold=THRESHOLD, scaling=SCALING)

    with Watching() if around == "forward" else contextlib.nullcontext():
        y = checkpoint(call, t["x"], use_reentrant=False)
    with Watching() if around == "backward" else contextlib.nullcontext():
        y.float().sum().backward()
    assert all(t[name].grad is not None for name in names)


def test_a_forward_mode_derivative_is_that_of_a_linear_map() -> None:
    t = make((5,), dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return ops.selective_linear(**(t | {"x": x}), threshold=THRESHOLD, scaling=SCALING)

    y, dy = torch.func.jvp(f, (t["x"],), (t["x"],))
    torch.testing.assert_close(y, f(t["x"]))
    torch.testing.assert_close(dy, y - f(0 * t["x"]))


def test_a_backward_inside_autocast_is_that_of_the_forward_outside() -> None:
    t, dy = make((5,)), torch.randn(5, 36)
    found = []
    for inside in (False, True):
        leaf = leaves(t)
        y = ops.selective_linear(**leaf, threshold=THRESHOLD, scaling=SCALING)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            y.backward(dy)
        found.append({name: leaf[name].grad for name in NAMES})
    assert all(torch.equal(found[0][name], found[1][name]) for name in NAMES)


@pytest.mark.parametrize("active", ["some", "all"])
def test_gradients_come_in_batches_too(active: str) -> None:
    t = trainable(("x", "lora_A", "lora_B"), make((5,), active=active))
    y = ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING, active=active_of(t))
    leaves_, dys = [t["x"], t["lora_A"], t["lora_B"]], torch.randn(4, 5, 36)
    batched = torch.autograd.grad(y, leaves_, dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        for all_, one in zip(batched, torch.autograd.grad(y, leaves_, dy, retain_graph=True), strict=True):
            torch.testing.assert_close(all_[i], one)


def test_without_gradients_the_values_are_the_same() -> None:
    t = make((2, 7))
    with torch.no_grad():
        y = ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING)
    assert torch.equal(y, ops.selective_linear(**leaves(t), threshold=THRESHOLD, scaling=SCALING).detach())


def test_S_is_a_result_without_a_gradient() -> None:
    t = trainable(("x", "lora_A", "lora_B", "gate"), make())
    y, S = torch.ops.slora.selective_linear(*(t[name] for name in NAMES), THRESHOLD, SCALING, [0, 2])
    assert y.requires_grad
    assert not S.requires_grad
