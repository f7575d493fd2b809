"""Calls of `batched_merge_`: windows, overlaps, nothing to do, precision settings, signals, failures on the way."""

from __future__ import annotations

import signal
from typing import Any

import pytest
import torch
from torch import nn

from slora.merging import batched, batched_merge, batched_merge_, fallback
from slora.models.exclusive import signals_held
from tests.merging.calls import A0, B0, BACKENDS, needs_extension


@pytest.mark.parametrize("backend", BACKENDS)
def test_row_slices_and_column_windows_of_one_tensor_are_weights_of_their_own(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLORA_BACKEND", backend)
    whole = torch.randn(12, 20)
    before = whole.clone()
    parts = [whole[:3], whole[5:9, :8], whole[5:9, 8:]]
    As, Bs = [torch.randn(2, W.shape[1]) for W in parts], [torch.randn(W.shape[0], 2) for W in parts]
    batched_merge_(parts, As, Bs, [1.0, 2.0, 3.0])
    for rows, cols, A, B, c in (
        (slice(3), slice(20), As[0], Bs[0], 1), (slice(5, 9), slice(8), As[1], Bs[1], 2),
        (slice(5, 9), slice(8, 20), As[2], Bs[2], 3),
    ):  # fmt: skip
        torch.testing.assert_close(whole[rows, cols], before[rows, cols] + c * B @ A)
    for untouched in (slice(3, 5), slice(9, 12)):
        assert torch.equal(whole[untouched], before[untouched])


@pytest.mark.parametrize("backend", BACKENDS)
def test_terms_of_one_weight_may_overlap_in_its_rows(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLORA_BACKEND", backend)
    W = torch.randn(9, 5)
    As, Bs = [torch.randn(2, 5), torch.randn(3, 5)], [torch.randn(9, 2), torch.randn(3, 3)]
    expected = W + 0.5 * Bs[0] @ As[0]
    expected[3:6] += 0.5 * Bs[1] @ As[1]
    torch.testing.assert_close(batched_merge([W], [As], [Bs], [0.5], rows=[[0, 3]])[0], expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nothing_to_do_changes_no_bit(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLORA_BACKEND", backend)
    batched_merge_([], [], [], [])
    assert batched_merge([], [], [], []) == []
    W = torch.full((3, 4), -0.0)
    A, B = torch.full((2, 4), float("nan")), torch.ones(3, 2)
    batched_merge_([W, torch.empty(0, 4), torch.empty(3, 0)], [[], A, torch.empty(2, 0)], [[], B[:0], B], [1.0] * 3)
    batched_merge_([W], [A], [B], [0.0])
    batched_merge_([W], [A[:0]], [B[:, :0]], [1.0])
    assert torch.signbit(W).all()


def test_the_version_counter_sees_a_merge_in_place() -> None:
    W = nn.Parameter(torch.randn(4, 4), requires_grad=False)
    before = W._version
    batched_merge_([W], [torch.randn(2, 4)], [torch.randn(4, 2)], [1.0])
    assert W._version > before


def test_matrices_that_require_grad_are_read_as_they_are() -> None:
    A, B = torch.randn(2, 4, requires_grad=True), torch.randn(3, 2, requires_grad=True)
    W = torch.zeros(3, 4)
    batched_merge_([W], [A], [B], [1.0])
    assert not W.requires_grad
    torch.testing.assert_close(W, (B @ A).detach())


def test_autocast_and_the_matmul_precision_have_no_say(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLORA_BACKEND", "torch")
    W, A, B = torch.zeros(30, 40), torch.randn(8, 40), torch.randn(30, 8)
    expected = batched_merge([W], [A], [B], [1.0])[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(batched_merge([W], [A], [B], [1.0])[0], expected)


@pytest.mark.parametrize("setting", ["legacy", "cuda.matmul", "mkldnn.matmul"])
def test_whichever_way_the_precision_of_products_was_lowered_it_has_no_say(
    setting: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLORA_BACKEND", "torch")
    W, A, B = torch.zeros(300, 256), torch.randn(64, 256), torch.randn(300, 64)
    expected = batched_merge([W], [A], [B], [1.0])[0]
    products = [torch.backends.cuda.matmul, torch.backends.mkldnn.matmul]
    before = [product.fp32_precision for product in products]
    try:
        if setting == "legacy":
            torch.set_float32_matmul_precision("medium")
        elif setting == "cuda.matmul":
            torch.backends.cuda.matmul.fp32_precision = "tf32"
        else:
            torch.backends.mkldnn.matmul.fp32_precision = "bf16"
        lowered = [product.fp32_precision for product in products]
        batched_merge_([W], [A], [B], [1.0])
        assert [product.fp32_precision for product in products] == lowered != before
    finally:
        torch.set_float32_matmul_precision("highest")
        for product, precision in zip(products, before, strict=True):
            product.fp32_precision = precision
    assert torch.equal(W, expected)


@pytest.mark.parametrize("backend", BACKENDS)
def test_windows_of_one_buffer_that_do_not_meet_may_be_weights_and_factors(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLORA_BACKEND", backend)
    # [N, K + r]: a weight and its B; and two row slices of a matrix whose rows are adjacent, of one row and of several.
    side_by_side, tall = torch.randn(6, 6), torch.randn(4, 12).T
    weights = [side_by_side[:, :4], tall[:5], tall[5:6], tall[6:]]
    As = [torch.randn(2, 4) for _ in weights]
    Bs = [side_by_side[:, 4:], *(torch.randn(W.shape[0], 2) for W in weights[1:])]
    expected = [W + B @ A for W, A, B in zip(weights, As, Bs, strict=True)]
    batched_merge_(weights, As, Bs, [1.0] * 4)
    for W, want in zip(weights, expected, strict=True):
        torch.testing.assert_close(W, want)


def test_a_transposed_weight_is_merged_inside_inference_mode() -> None:
    W, A, B = torch.zeros(4, 6).T, torch.randn(2, 4), torch.randn(6, 2)
    with torch.inference_mode():
        batched_merge_([W], [A], [B], [1.0])
    torch.testing.assert_close(W, B @ A)


class Interrupted(Exception):
    """What the handler of this test raises."""


@needs_extension
@pytest.mark.parametrize("layout", ["adjacent", "one transposed"])
def test_a_signal_during_the_call_comes_when_all_weights_are_written(
    layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    batched._extension()
    real = torch.ops.slora.batched_merge_

    def interrupted(*args: Any) -> None:
        real(*args)
        signal.raise_signal(signal.SIGALRM)

    def raises(*_: Any) -> None:
        raise Interrupted

    monkeypatch.setattr(torch.ops.slora, "batched_merge_", interrupted)
    weights = [torch.zeros(6, 4), torch.zeros(4, 6).T if layout == "one transposed" else torch.zeros(6, 4)]
    before = signal.signal(signal.SIGALRM, raises)
    try:
        with pytest.raises(Interrupted):
            batched_merge_(weights, [A0] * 2, [B0] * 2, [1.0] * 2)
        assert signal.getsignal(signal.SIGALRM) is raises
    finally:
        signal.signal(signal.SIGALRM, before)
    for W in weights:
        torch.testing.assert_close(W, B0 @ A0)


def test_every_held_signal_is_delivered_even_where_a_handler_raises() -> None:
    seen: list[int] = []

    def raises(number: int, frame: Any) -> None:
        seen.append(number)
        raise Interrupted

    numbers = [signal.SIGALRM, signal.SIGUSR1]
    before = {number: signal.signal(number, raises) for number in numbers}

    def work() -> None:
        with signals_held():
            with signals_held():
                for number in numbers:
                    signal.raise_signal(number)
            assert seen == []

    try:
        with pytest.raises(Interrupted):
            work()
        assert sorted(seen) == sorted(numbers)
        assert all(signal.getsignal(number) is raises for number in numbers)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@pytest.mark.parametrize("when", [1, 2, 3])
def test_a_failure_in_plain_pytorch_puts_every_weight_back(when: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLORA_BACKEND", "torch")
    real, calls = fallback._add, []

    def fails(*args: Any) -> None:
        calls.append(args)
        real(*args)
        if len(calls) == when:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(fallback, "_add", fails)
    weights = [torch.randn(6, 4) for _ in range(3)]
    before = [W.clone() for W in weights]
    with pytest.raises(torch.OutOfMemoryError):
        batched_merge_(weights, [A0] * 3, [B0] * 3, [1.0] * 3)
    for W, old in zip(weights, before, strict=True):
        assert torch.equal(W, old)
