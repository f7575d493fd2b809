"""`slora.reference` against sums written out by hand, and its gradients against finite differences."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from slora import reference

THRESHOLD = 0.1


def tensors(
    M: tuple[int, ...] = (5,), K: int = 7, N: int = 12, blocks: int = 3, r: int = 2, bias: bool = True
) -> dict[str, Tensor | None]:
    """Random fp64 arguments; block i is active where i is even."""
    gates = [0.3 if i % 2 == 0 else -0.2 for i in range(blocks)]
    made: dict[str, Tensor | None] = {
        "x": torch.randn(*M, K),
        "weight": torch.randn(N, K),
        "bias": torch.randn(N) if bias else None,
        "lora_A": torch.randn(blocks, r, K),
        "lora_B": torch.randn(blocks, N // blocks, r),
        "gate": torch.tensor(gates),
    }
    return {name: None if t is None else t.double().requires_grad_() for name, t in made.items()}


def call(t: dict[str, Tensor | None], scaling: float = 1.7) -> Tensor:
    return reference.selective_lora_linear(**t, threshold=THRESHOLD, scaling=scaling)


@pytest.mark.parametrize("shape", [(), (1,), (5,), (2, 3), (2, 1, 4), (0,)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_forward_is_the_base_plus_one_product_per_active_block(shape: tuple[int, ...], bias: bool) -> None:
    t = tensors(shape, bias=bias)
    expected = torch.nn.functional.linear(t["x"], t["weight"], t["bias"]).clone()
    for i in (0, 2):
        update = 1.7 * t["lora_B"][i] @ t["lora_A"][i]
        expected[..., 4 * i : 4 * i + 4] += t["x"] @ update.T
    torch.testing.assert_close(call(t), expected)


def test_output_of_an_inactive_block_is_the_base_bit_for_bit() -> None:
    t = tensors()
    base = torch.nn.functional.linear(t["x"], t["weight"], t["bias"])
    assert torch.equal(call(t)[:, 4:8], base[:, 4:8])
    assert not torch.equal(call(t)[:, :4], base[:, :4])


def test_a_gate_on_the_threshold_is_active_and_the_next_number_below_is_not() -> None:
    gate = torch.tensor([THRESHOLD, THRESHOLD], dtype=torch.float64)
    gate[1] = torch.nextafter(gate[1], gate.new_tensor(-1.0))
    assert reference.indicator(gate, THRESHOLD).tolist() == [1.0, 0.0]


def test_indicator_passes_the_gradient_straight_through_on_both_sides() -> None:
    gate = torch.tensor([-5.0, 0.0, 0.1, 7.0], requires_grad=True)
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    (reference.indicator(gate, THRESHOLD) * weights).sum().backward()
    assert torch.equal(gate.grad, weights)


@pytest.mark.parametrize("blocks", [1, 3, 4])
@pytest.mark.parametrize("shape", [(4,), (2, 3)], ids=str)
def test_gradients_of_tensors_agree_with_finite_differences(blocks: int, shape: tuple[int, ...]) -> None:
    t = tensors(shape, blocks=blocks)
    gate = t.pop("gate").detach()
    names = list(t)

    def f(*values: Tensor) -> Tensor:
        return call({**dict(zip(names, values, strict=True)), "gate": gate})

    assert torch.autograd.gradcheck(f, tuple(t.values()))


@pytest.mark.parametrize("blocks", [1, 3, 4])
def test_gate_gradient_agrees_with_finite_differences_of_the_indicator_itself(blocks: int) -> None:
    # Straight-through means: the derivative with respect to I, which enters the output linearly.
    t = tensors(blocks=blocks)
    dy = torch.randn(5, 12).double()
    (call(t) * dy).sum().backward()

    def f(indicator: Tensor) -> Tensor:
        S = torch.einsum("mk,brk->mbr", t["x"], t["lora_A"])
        update = torch.einsum("mbr,bnr->mbn", S, t["lora_B"]) * (1.7 * indicator[:, None])
        y = torch.nn.functional.linear(t["x"], t["weight"], t["bias"]) + update.flatten(1)
        return (y * dy).sum()

    indicator = (t["gate"].detach() >= THRESHOLD).double()
    h = 1e-6
    for i in range(blocks):
        step = torch.zeros(blocks).double()
        step[i] = h
        slope = (f(indicator + step) - f(indicator - step)) / (2 * h)
        torch.testing.assert_close(t["gate"].grad[i], slope, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("blocks", [1, 3, 4])
@pytest.mark.parametrize("shape", [(5,), (2, 3), (0,)], ids=str)
def test_backward_formulas_agree_with_autograd(blocks: int, shape: tuple[int, ...]) -> None:
    t = tensors(shape, blocks=blocks)
    dy = torch.randn(*shape, 12).double()
    call(t).backward(dy)
    without_bias = {name: value.detach() for name, value in t.items() if name != "bias"}
    dx, dA, dB, dgate = reference.selective_lora_linear_backward(dy, **without_bias, threshold=THRESHOLD, scaling=1.7)
    for name, gradient in (("x", dx), ("lora_A", dA), ("lora_B", dB), ("gate", dgate)):
        torch.testing.assert_close(gradient, t[name].grad, msg=name)


def test_inactive_blocks_get_no_gradient_but_their_gate_does() -> None:
    t = tensors()
    call(t).sum().backward()
    assert not t["lora_A"].grad[1].any()
    assert not t["lora_B"].grad[1].any()
    assert t["gate"].grad.all()


def test_gate_gradient_is_zero_while_B_is_zero() -> None:
    t = tensors()
    t["lora_B"].data.zero_()
    call(t).sum().backward()
    assert not t["gate"].grad.any()


def test_x_lora_replaces_x_on_the_low_rank_path_only() -> None:
    t = tensors()
    y = reference.selective_lora_linear(**t, threshold=THRESHOLD, scaling=1.7, x_lora=torch.zeros_like(t["x"]))
    torch.testing.assert_close(y, torch.nn.functional.linear(t["x"], t["weight"], t["bias"]))
