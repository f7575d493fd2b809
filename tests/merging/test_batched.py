"""`batched_merge_` against its stated order of fp32 operations, bit for bit, and against fp64 by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

from slora.merging import batched_merge, batched_merge_
from tests.merging.calls import BACKENDS, NARROW, needs_extension

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
