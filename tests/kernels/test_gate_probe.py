"""The probe of inactive gates: the rows it draws and the sums it forms."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from slora.errors import ShapeError
from slora.kernels import gate_probe
from slora.ops.gate_probe import sampled_rows
from slora.ops.operands import LoRAOperands

# M, sampled rows, K, blocks, n, r, active, seed
CASES = {
    "one row of one": (1, 1, 16, 1, 8, 8, (), 1),
    "sampled": (150, 40, 40, 3, 24, 8, (0,), 3),
    "all rows": (33, 64, 16, 1, 24, 16, (), 2**40 + 7),
    "rank above a group": (300, 100, 24, 2, 8, 72, (1,), 123456789),
    "all active": (7, 7, 8, 4, 8, 8, (0, 1, 2, 3), 5),
    "many blocks": (20, 10, 16, 30, 8, 8, (0, 29), 9),
}


class Layer(NamedTuple):
    """Arguments of the launcher."""

    dy: Tensor
    x: Tensor
    operands: LoRAOperands
    seed: int
    seed_offset: Tensor | None = None


def layer(case: str, dtype: torch.dtype, device: torch.device) -> Layer:
    M, m, K, blocks, n, r, active, seed = CASES[case]
    x, dy = torch.randn(M, K), torch.randn(M, blocks, n)
    A, B = torch.randn(blocks, r, K) / math.sqrt(K), torch.randn(blocks, n, r) / math.sqrt(n)
    # Nothing may read these.
    dy[:, list(active)], A[list(active)], B[list(active)] = math.nan, math.nan, math.nan
    gate = torch.full((blocks,), 0.05)
    gate[list(active)] = 0.15
    x, dy, A, B = (t.to(device, dtype) for t in (x, dy.flatten(1), A, B))
    return Layer(dy, x[sampled_rows(M, m, seed, device)], LoRAOperands(A, B, gate.to(device), 0.1, 1.7), seed)


def terms(given: Layer, dtype: torch.dtype) -> Tensor:
    """`c * S * T` of every sampled row, `[m, blocks, r]`, in `dtype`; 0 for active blocks."""
    A, B, gate, threshold, scaling, *_ = given.operands
    M, m, blocks = given.dy.shape[0], given.x.shape[0], gate.shape[0]
    dy = given.dy[sampled_rows(M, m, given.seed, given.dy.device)].to(dtype).view(m, blocks, -1)
    S = torch.einsum("mk,brk->mbr", given.x.to(dtype), A.to(dtype))
    T = torch.einsum("mbn,bnr->mbr", dy, B.to(dtype))
    return torch.where((gate < threshold)[:, None], scaling * S.double() * T.double(), 0)


def compare(check: Callable[..., None], given: Layer, found: Tensor, name: str) -> None:
    wanted, rounded = terms(given, torch.float64), terms(given, given.x.dtype)
    # A single sum that cancels: its unit of rounding is that of the 2-norm of its terms.
    magnitude = float(wanted.square().sum((0, 2)).sqrt().max())
    terms_of_S_and_T = max(given.x.shape[1], given.operands.n)
    check(found, rounded.sum((0, 2)).float(), wanted.sum((0, 2)), name, magnitude, terms_of_S_and_T)


@pytest.mark.parametrize("case", CASES)
def test_the_probe_is_the_sum_over_the_sampled_rows_of_inactive_blocks(
    dtype: torch.dtype, case: str, device: torch.device, assert_as_exact_as: Callable[..., None]
) -> None:
    given = layer(case, dtype, device)
    compare(assert_as_exact_as, given, gate_probe.gate_probe(*given), case)


def test_no_rows_have_a_result(device: torch.device) -> None:
    given = layer("all rows", torch.float16, device)
    assert gate_probe.gate_probe(*given._replace(dy=given.dy[:0], x=given.x[:0])).tolist() == [0.0]


COUNTS, SEEDS = [(2, 1), (97, 13), (1000, 512), (4096, 1)], [0, 7, 2**31 + 5, 2**45 + 1]
COPIED = [torch.float32, torch.float16, torch.bfloat16]


@pytest.mark.parametrize(
    ("M", "m", "seed", "dtype"),
    [(*count, seed, COPIED[(i + j) % 3]) for i, count in enumerate(COUNTS) for j, seed in enumerate(SEEDS)],
    ids=str,
)
def test_the_kernel_copies_the_rows_that_the_hash_names(
    M: int, m: int, seed: int, dtype: torch.dtype, device: torch.device
) -> None:
    x = torch.randn(M, 41).to(device, dtype)[:, 2:39]
    assert torch.equal(gate_probe.sample_rows(x, m, seed), x[sampled_rows(M, m, seed, device)])


@pytest.mark.parametrize("offset", [13, 2**31 - 1])
def test_an_offset_on_the_device_is_a_part_of_the_seed(offset: int, device: torch.device) -> None:
    given, on_device = layer("sampled", torch.float16, device), torch.tensor(offset, device=device)
    same = given._replace(seed=given.seed - offset, seed_offset=on_device)
    found = [gate_probe.gate_probe(*one) for one in (given, same, given._replace(seed_offset=on_device))]
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])
    x = torch.randn(1000, 41, device=device)
    rows = sampled_rows(1000, 300, torch.tensor(7, device=device) + on_device, device)
    assert torch.equal(gate_probe.sample_rows(x, 300, 7, on_device), x[rows])


def test_two_runs_give_the_same_bits(device: torch.device) -> None:
    given = layer("rank above a group", torch.float16, device)
    assert torch.equal(gate_probe.gate_probe(*given), gate_probe.gate_probe(*given))


def test_an_element_of_x_or_dy_may_lie_beyond_2_to_the_31(device: torch.device) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False
    M, K, n, stride = 3, 40, 24, 2**30 + 8
    x, dy, A, B = (torch.randn(shape).to(device, torch.float16) for shape in ((M, K), (M, n), (1, 8, K), (1, n, 8)))
    near = Layer(dy, x, LoRAOperands(A, B, torch.zeros(1, device=device), 0.1, 1.7), 5)
    # Three rows, 4 GiB of addresses, of which three pages are touched.
    far = torch.empty(2 * stride + 64, dtype=torch.float16, device=device).as_strided((M, 64), (stride, 1))
    far[:, :K], far[:, K:] = x, dy
    away = near._replace(x=far[:, :K], dy=far[:, K:])
    assert torch.equal(gate_probe.gate_probe(*near), gate_probe.gate_probe(*away))
    assert torch.equal(gate_probe.sample_rows(far, 2, 9), far[sampled_rows(M, 2, 9, device)])


def test_more_rows_than_the_draw_can_count_are_refused() -> None:
    rows = torch.empty(1, 8).expand(2**30, 8)
    for draw in (lambda: torch.ops.slora.sample_rows(rows, 512, 0, None), lambda: sampled_rows(2**30, 512, 0)):
        with pytest.raises(ShapeError, match=r"m=512 of M=1073741824 rows cannot be drawn .* below 2\*\*39"):
            draw()
