"""`batched_merge_` against its stated order of fp32 operations, bit for bit, and against fp64 by hand."""

from __future__ import annotations

import os
import re
import shutil
import signal
import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from slora.errors import ConfigError, ShapeError, StateError
from slora.merging import batched, batched_merge, batched_merge_, extension_info, fallback
from slora.models.exclusive import signals_held

BUILT = extension_info()["available"]
needs_extension = pytest.mark.skipif(not BUILT, reason="slora._C is not built")
BACKENDS = [pytest.param("auto", marks=needs_extension), "torch"]
NARROW = [torch.float32, torch.bfloat16, torch.float16]
fuzzed = settings(max_examples=250, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def cases(draw: st.DrawFn, dtypes: list[torch.dtype] = NARROW, exact: Any = None) -> dict[str, Any]:
    """Weights of one call with their terms: ragged, sliced, strided, of several dtypes, up to rank 256."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))

    def matrix(rows: int, cols: int, dtype: torch.dtype, scale: float, layout: str) -> Tensor:
        if layout == "transposed":
            return matrix(cols, rows, dtype, scale, "contiguous").T
        if layout == "window":
            return matrix(rows + 2, cols + 5, dtype, scale, "contiguous")[1 : rows + 1, 3 : cols + 3]
        values = torch.randn(rows, cols, generator=generator) * scale
        return values.to(dtype)

    layouts = st.sampled_from(["contiguous", "contiguous", "window", "transposed"])
    # Mostly small; larger ones are run by tests/csrc as well.
    size = st.one_of(st.integers(0, 20), st.integers(0, 70), st.sampled_from([1, 63, 64, 65, 130]))
    rank = st.one_of(st.integers(1, 9), st.integers(1, 20), st.sampled_from([16, 17, 33, 64, 256]))
    weights, updates = [], []
    for _ in range(draw(st.integers(1, 3))):
        N, K = draw(size), draw(size)
        weights.append(matrix(N, K, draw(st.sampled_from(dtypes)), 0.1, draw(layouts)))
        mine = []
        for _ in range(draw(st.integers(0, 3))):
            r, factors = draw(rank), st.sampled_from([torch.float32, *NARROW])
            first = draw(st.integers(0, N)) if draw(st.booleans()) else 0
            rows = draw(st.integers(0, N - first)) if first else N
            A = matrix(r, K, draw(factors), 1.0, draw(layouts))
            B = matrix(rows, r, draw(factors), 10.0 ** draw(st.integers(-6, 0)), draw(layouts))
            mine.append((A, B, draw(st.sampled_from([1.0, 0.3, -2.0, 1e-4, 0.0])), first))
        updates.append(mine)
    return {"weights": weights, "updates": updates}


def arguments(case: dict[str, Any]) -> dict[str, Any]:
    columns = [[list(column) for column in zip(*mine, strict=True)] or [[], [], [], []] for mine in case["updates"]]
    names = ("lora_As", "lora_Bs", "scales", "rows")
    return {name: [entry[i] for entry in columns] for i, name in enumerate(names)}


def assert_same_bits(found: Tensor, expected: Tensor) -> None:
    assert (found.dtype, found.shape) == (expected.dtype, expected.shape)
    # -0.0 is not 0.0 here.
    assert torch.equal(found.double().view(torch.int64), expected.double().view(torch.int64))


@needs_extension
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_every_bit_is_that_of_the_stated_order_and_near_the_sum_in_fp64(dtype: torch.dtype, exact: Any) -> None:
    @fuzzed
    @given(cases([dtype]))
    def run(case: dict[str, Any]) -> None:
        expected = []
        for W, mine in zip(case["weights"], case["updates"], strict=True):
            updates = [exact.Update(*u) for u in mine]
            expected.append(exact.merged_in_order(W, updates))
            low, high = exact.rounding_interval(*exact.bound(W, updates), dtype)
            assert bool(((low <= expected[-1]) & (high >= expected[-1])).all())
        fresh = batched_merge(case["weights"], **arguments(case))
        batched_merge_(case["weights"], **arguments(case))
        for W, new, want in zip(case["weights"], fresh, expected, strict=True):
            assert_same_bits(W, want)
            assert_same_bits(new, want)

    run()


@pytest.mark.parametrize("backend", BACKENDS)
def test_the_sum_is_within_one_unit_of_the_accumulate_and_rounded_once(
    backend: str, exact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLORA_BACKEND", backend)

    @settings(fuzzed, max_examples=150)
    @given(cases(NARROW))
    def run(case: dict[str, Any]) -> None:
        bounds = [
            exact.bound(W, [exact.Update(*u) for u in mine])
            for W, mine in zip(case["weights"], case["updates"], strict=True)
        ]
        fresh = batched_merge(case["weights"], **arguments(case))
        batched_merge_(case["weights"], **arguments(case))
        for W, new, (by_hand, error) in zip(case["weights"], fresh, bounds, strict=True):
            assert_same_bits(W, new)
            low, high = exact.rounding_interval(by_hand, error, W.dtype)
            assert bool(((low <= W) & (high >= W)).all())

    run()


@needs_extension
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_weights_get_the_rounded_fp32_result(dtype: torch.dtype) -> None:
    @settings(fuzzed, max_examples=100)
    @given(cases([dtype]))
    def run(case: dict[str, Any]) -> None:
        wide = batched_merge([W.float() for W in case["weights"]], **arguments(case))
        for W, expected in zip(batched_merge(case["weights"], **arguments(case)), wide, strict=True):
            assert_same_bits(W, expected.to(dtype))

    run()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("factor", [torch.float64, torch.float32, torch.bfloat16], ids=str)
def test_fp64_weights_are_summed_in_fp64(
    backend: str, factor: torch.dtype, exact: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLORA_BACKEND", backend)
    W = torch.randn(37, 45, dtype=torch.float64)
    A, B = torch.randn(19, 45).to(factor), torch.randn(37, 19).to(factor)
    by_hand, error = exact.bound(W, [exact.Update(A, B, 0.3)])
    # 29 bits more than fp32, and the sum by hand has the same error.
    assert bool(((batched_merge([W], [A], [B], [0.3])[0] - by_hand).abs() <= 2 * error * 2.0**-29).all())


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_a_sum_half_way_between_two_numbers_goes_to_the_even_one(
    dtype: torch.dtype, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLORA_BACKEND", backend)
    unit = torch.finfo(dtype).eps
    W = torch.arange(1.0, 2.0, unit, dtype=torch.float64)
    halves = torch.tensor([0.5, 1.5, -0.5, -1.5, 2.5], dtype=torch.float64) * unit
    found = batched_merge([W.to(dtype).repeat(5, 1)], [torch.ones(1, len(W))], [halves.float()[:, None]], [1.0])[0]
    steps = (W[None, :] + halves[:, None]) / unit
    # Below 1 the units are half as large, so there the sum is a number itself.
    expected = torch.where(steps * unit < 1, steps, steps.round()) * unit
    assert torch.equal(found.double()[:, :-3], expected[:, :-3])


@needs_extension
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_rounding_at_the_edges_of_the_number_range(dtype: torch.dtype, exact: Any) -> None:
    info = torch.finfo(dtype)
    edges = [0.0, -0.0, info.tiny, info.smallest_normal / 3, info.max, -info.max, info.max * (1 - info.eps), 1.0]
    edges += [6e-8, 3e-8, 2.9e-8, 65504.0, 65519.0, 65520.0, 1e-40, 2.0**-14, 2.0**-14 - 2.0**-25, -1.5]
    W = torch.tensor(edges, dtype=torch.float64).to(dtype).repeat(len(edges), 1)
    B = torch.tensor(edges, dtype=torch.float64).float()[:, None]
    A = torch.ones(1, len(edges))
    assert_same_bits(batched_merge([W], [A], [B], [1.0])[0], exact.merged_in_order(W, [exact.Update(A, B, 1.0)]))
    assert_same_bits(batched_merge([W], [A], [B], [-0.5])[0], exact.merged_in_order(W, [exact.Update(A, B, -0.5)]))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [*NARROW, torch.float64], ids=str)
def test_what_is_not_finite_stays_where_it_belongs(
    backend: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLORA_BACKEND", backend)
    W = torch.zeros(9, 70, dtype=dtype)
    W[1, 2], W[3, 4], W[5, 69] = float("nan"), float("inf"), -float("inf")
    A, B = torch.ones(2, 70), torch.ones(9, 2)
    B[8, 0] = float("nan")
    merged = batched_merge([W], [A], [B], [1.0])[0]
    assert merged[1, 2].isnan()
    assert merged[3, 4] == float("inf")
    assert merged[5, 69] == -float("inf")
    assert merged[8].isnan().all()
    assert int((merged == 2).sum()) == 8 * 70 - 3


@pytest.mark.parametrize("backend", BACKENDS)
def test_every_fp16_and_bf16_number_is_read_and_written_exactly(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLORA_BACKEND", backend)
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16).view(256, 256)
    for dtype in (torch.float16, torch.bfloat16):
        W = bits.view(dtype).clone()
        batched_merge_([W], [torch.zeros(1, 256)], [torch.ones(256, 1)], [1.0])
        expected = bits.view(dtype) + 0.0
        assert torch.equal(W.isnan(), expected.isnan())
        assert torch.equal(W.nan_to_num(), expected.nan_to_num())
        # As A, too: what is read there is exact.
        found = batched_merge([torch.zeros(1, 256)] * 256, list(bits.view(dtype).split(1)), [torch.ones(1, 1)] * 256,
                              [1.0] * 256)  # fmt: skip
        assert torch.equal(torch.cat(found).nan_to_num(), bits.view(dtype).float().nan_to_num())


# Calls


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


# Bad input: an error that names the index, and nothing written

W0, A0, B0 = torch.randn(6, 4), torch.randn(2, 4), torch.randn(6, 2)
good = {"weights": [W0.clone(), torch.randn(3, 5)], "lora_As": [A0, torch.randn(2, 5)],
        "lora_Bs": [B0, torch.randn(3, 2)], "scales": [1.0, 0.5]}  # fmt: skip


def tied() -> dict[str, Any]:
    W = torch.randn(6, 4)
    return {"weights": [torch.randn(6, 4), W, W[2:]], "lora_As": [A0] * 3, "lora_Bs": [B0, B0, B0[2:]],
            "scales": [1.0] * 3}  # fmt: skip


def inference() -> Tensor:
    with torch.inference_mode():
        return torch.randn(3, 5)


BAD = {
    "aliased": (ShapeError, r"weights\[1\].* and weights\[2\].* share memory; pass each weight once", tied()),
    "a weight inside its own update": (ShapeError, r"weights\[0\].* and lora_A of weights\[1\].* share memory",
                                       {"lora_As": [A0, good["weights"][0].view(-1)[:10].view(2, 5)]}),
    "expanded": (ShapeError, r"weights\[1\].*share memory; clone it first",
                 {"weights": [good["weights"][0], torch.randn(1, 5).expand(3, 5)]}),
    "requires grad": (StateError, r"weights\[1\].*requires grad.*torch.no_grad",
                      {"weights": [good["weights"][0], torch.randn(3, 5, requires_grad=True)]}),
    "inference": (StateError, r"weights\[1\].*inference tensor; clone it",
                  {"weights": [good["weights"][0], inference()]}),
    "inner size": (ShapeError, r"weights\[1\].*has shape \[3, 5\], but lora_A of term 1 \[2, 6\]",
                   {"lora_As": [A0, torch.randn(2, 6)]}),
    "rank": (ShapeError, r"weights\[1\].*lora_A of term 1 \[3, 5\] and its lora_B \[3, 2\]",
             {"lora_As": [A0, torch.randn(3, 5)]}),
    "rows": (ShapeError, r"lora_B of term 1 has 2 rows, weights\[1\].* 3; .*rows=",
             {"lora_Bs": [B0, torch.randn(2, 2)]}),
    "rows beyond": (ShapeError, r"term 1 covers the rows 1 to 4 of weights\[1\].*which has 3", {"rows": [0, 1]}),
    "negative row": (ShapeError, r"term 1 covers the rows -1 to 2", {"rows": [0, -1]}),
    "devices": (ShapeError, r"weights\[1\].*is on meta, but weights\[0\].* on cpu",
                {"weights": [good["weights"][0], torch.empty(3, 5, device="meta")]}),
    "device of a matrix": (ShapeError, r"lora_B of weights\[1\].*is on meta, its weight on cpu",
                           {"lora_Bs": [B0, torch.empty(3, 2, device="meta")]}),
    "integers": (ShapeError, r"weights\[1\].* is torch.int8.*dequantise",
                 {"weights": [good["weights"][0], torch.zeros(3, 5, dtype=torch.int8)]}),
    "integer matrix": (ShapeError, r"lora_A of weights\[1\].*is torch.int64",
                       {"lora_As": [A0, torch.zeros(2, 5, dtype=torch.int64)]}),
    "vector": (ShapeError, r"weights\[1\].* is a tensor \[5\]; expected",
               {"weights": [good["weights"][0], torch.ones(5)]}),
    "nan": (ConfigError, r"scale of term 1, of weights\[1\].*, is nan", {"scales": [1.0, float("nan")]}),
    "infinite in fp32": (ConfigError, r"scale of term 1.*is 1e\+39", {"scales": [1.0, 1e39]}),
    "lengths": (ShapeError, r"scales has 1 entries for 2 weights", {"scales": [1.0]}),
    "no list of scales": (ShapeError, r"scales is float; give a list with one entry per weight", {"scales": 1.0}),
    "no scales": (ShapeError, r"scales is NoneType; give a list", {"scales": None}),
    "all on meta": (ShapeError, r"weights\[0\].* is on meta, where weights have no values; materialise",
                    {key: [M.to("meta") for M in good[key]] for key in ("weights", "lora_As", "lora_Bs")}),
    **{f"scale {c!r}": (ConfigError, rf"scale of term 1, of weights\[1\].*, is {said}; use a number",
                        {"scales": [1.0, c]})
       for c, said in (("2", "'2'"), (True, "True"), (None, "None"), (1j, "1j"),
                       (torch.ones((), requires_grad=True), r"a tensor \[\] that requires grad"),
                       (torch.ones((), device="meta"), r"a tensor \[\]"), (torch.ones(2), r"a tensor \[2\]"))},
    **{f"row {row!r}": (ConfigError, rf"first row of term 1, of weights\[1\].*, is {said}; use an integer",
                        {"rows": [0, row]})
       for row, said in ((1.9, "1.9"), ("2", "'2'"), (True, "True"), (float("nan"), "nan"), (None, "None"),
                         (torch.tensor(1.5), r"a tensor \[\]"))},
    "terms": (ShapeError, r"weights\[1\].*has 2 lora_As, 1 lora_Bs", {"lora_As": [A0, [A0, A0]]}),
}  # fmt: skip


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("what", list(BAD))
def test_bad_input_is_refused_by_name_and_nothing_is_written(
    what: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLORA_BACKEND", backend)
    error, message, changed = BAD[what]
    call = {**good, **changed}
    names = ["blocks.0.qkv", "blocks.0.proj", "head"][: len(call["weights"])]
    before = [W.clone() for W in call["weights"]]
    with pytest.raises(error, match=message) as caught:
        batched_merge_(**call, names=names)
    assert any(name in str(caught.value) for name in names) or what in ("lengths", "no list of scales", "no scales")
    for W, old in zip(call["weights"], before, strict=True):
        assert W.device.type == "meta" or torch.equal(W, old)


def test_weights_and_names_are_lists_of_one_length() -> None:
    W = torch.zeros(6, 4)
    for message, call, names in (
        ("weights is generator; give a list", (w for w in [W]), None),
        ("names has 1 entries for 2 weights", [W, W.clone()], ["a"]),
        ("names is str; give a list", [W, W.clone()], "ab"),
    ):
        with pytest.raises(ShapeError, match=message):
            batched_merge_(call, [A0] * 2, [B0] * 2, [1.0, float("inf")], names=names)
    assert not W.any()


def test_out_of_place_reads_what_may_not_be_written() -> None:
    call = {**good, "weights": [inference()[:3, :4], torch.randn(1, 5).expand(3, 5).requires_grad_()],
            "lora_Bs": [B0[:3], good["lora_Bs"][1]]}  # fmt: skip
    with torch.inference_mode():
        expected = [W + c * B @ A for W, A, B, c in zip(*call.values(), strict=True)]
    for found, want in zip(batched_merge(**call), expected, strict=True):
        torch.testing.assert_close(found, want)


# The operators and the extension


@needs_extension
@pytest.mark.parametrize("dtype", [*NARROW, torch.float64], ids=str)
def test_operators_pass_opcheck(dtype: torch.dtype) -> None:
    batched._extension()
    weights = [torch.randn(6, 10).to(dtype), torch.randn(7, 5).to(dtype)]
    flat = ([torch.randn(2, 10), torch.randn(3, 5)], [torch.randn(6, 2), torch.randn(4, 3)], [0.5, 1.0], [0, 1], [0, 3])
    torch.library.opcheck(torch.ops.slora.batched_merge, (weights, *flat))
    torch.library.opcheck(torch.ops.slora.batched_merge_, (weights, *flat, []))
    torch.library.opcheck(torch.ops.slora.batched_merge_, (weights, *flat, [torch.empty_like(W) for W in weights]))


@needs_extension
def test_the_operator_itself_refuses_what_would_reach_beyond_memory() -> None:
    batched._extension()
    merge_ = torch.ops.slora.batched_merge_
    W, A, B = torch.zeros(6, 4), torch.ones(2, 4), torch.ones(6, 2)
    for message, call in {
        "covers 6 rows from row 1 on of weights.0., which has 6": ([W], [A], [B], [1.0], [0], [1]),
        "covers 6 rows from row -1 on": ([W], [A], [B], [1.0], [0], [-1]),
        "names none of the 1 weights": ([W], [A], [B], [1.0], [1], [0]),
        "expected .r, 4.": ([W], [A[:, :3]], [B], [1.0], [0], [0]),
        "each term needs one": ([W], [A], [B], [], [0], [0]),
        r"weights\[0\] and weights\[1\] share memory": ([W, W[2:]], [A], [B], [1.0], [0], [0]),
        r"weights\[0\] and lora_As\[0\] share memory": ([W], [W[:2]], [B], [1.0], [0], [0]),
        "scales.0. is not finite": ([W], [A], [B], [float("inf")], [0], [0]),
        "column stride 6": ([torch.zeros(4, 6).T], [A], [B], [1.0], [0], [0]),
        "so its rows share memory": ([torch.zeros(1, 4).expand(6, 4)], [A], [B], [1.0], [0], [0]),
        "expected .N, K.": ([W[0]], [A], [B], [1.0], [0], [0]),
    }.items():
        with pytest.raises(ValueError, match=message):
            merge_(*call, [])
    with pytest.raises(ValueError, match="covers 6 rows from row 1 on"):
        merge_([W.to("meta")], [A.to("meta")], [B.to("meta")], [1.0], [0], [1], [])
    for kept in (W[:3], W.double(), torch.zeros(4, 6).T):
        with pytest.raises(ValueError, match=r"backup\[0\] cannot hold weights\[0\]"):
            merge_([W], [A], [B], [1.0], [0], [0], [kept])
    with pytest.raises(ValueError, match=r"weights\[0\] and backup\[0\] share memory"):
        merge_([W], [A], [B], [1.0], [0], [0], [W])
    assert not W.any()


def test_without_the_extension_there_is_one_warning_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("undefined symbol: _ZN3c106detail")

    monkeypatch.setattr(batched.importlib, "import_module", broken)
    batched._extension.cache_clear()
    batched._warn_once.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = [batched_merge([W0], [A0], [B0], [1.0])[0] for _ in range(3)][-1]
        assert len(caught) == 1
        assert re.search(r"built for another torch.*pip install --no-build-isolation", str(caught[0].message))
        assert caught[0].filename == __file__
        torch.testing.assert_close(found, W0 + B0 @ A0)
        assert extension_info() == {"available": False, "reason": batched._extension()[1]}
    finally:
        batched._extension.cache_clear()
        batched._warn_once.cache_clear()


def test_asking_for_pytorch_warns_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLORA_BACKEND", "torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batched_merge([W0], [A0], [B0], [1.0])


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None or bool(os.environ.get("SLORA_SKIP_EXT")),
    reason="there is no compiler, or SLORA_SKIP_EXT is set",
)
def test_where_there_is_a_compiler_the_extension_is_built_and_loads() -> None:
    # Otherwise every test that needs it would be skipped without a word.
    assert extension_info()["reason"] is None


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((8, 6), "8.0;9.0", True),
        ((9, 0), "8.0;9.0;10.0+PTX", True),
        ((12, 0), "8.0;9.0;10.0+PTX", True),
        ((12, 0), "8.0;9.0", False),
        ((7, 5), "8.0;9.0+PTX", False),
        ((8, 0), "8.6", False),
        ((9, 0), "9.0a", True),
        ((10, 0), "8.0;9.0a", False),
        ((10, 3), "10.0a", False),
        ((10, 3), "10.0f", True),
        ((8, 0), "Ampere", True),
    ],
)
def test_a_gpu_for_which_nothing_was_built_is_recognised(
    capability: tuple[int, int], architectures: str, expected: bool
) -> None:
    assert batched.serves(capability, architectures) == expected


@needs_extension
def test_extension_tells_how_it_was_built() -> None:
    info = extension_info()
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["compiler"].startswith(("gcc ", "clang "))
    assert info["cpu"] in ("AVX-512", "AVX2 and FMA", "portable")
    assert (info["cuda"] is None) == (info["architectures"] == [])


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
