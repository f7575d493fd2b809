"""The pass over x and dy: dA, dB and the gates' gradients against einsum in fp64, from the S and T it was given."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from slora import dropout as counter
from slora.kernels import launch, weight_gradients
from slora.kernels.narrow_configs import Columns
from slora.kernels.weight_gradients import row_splits

THRESHOLD, SCALING = 0.1, 1.7
# Small tiles, so that small tensors have several of them.
SMALL = Columns(TILE=16, ROWS=16, TALL=True, num_warps=4, num_stages=2)


class Case(NamedTuple):
    M: int
    K: int
    blocks: int
    n: int
    r: int
    active: tuple[int, ...]


CASES = {
    "one row": Case(1, 37, 1, 19, 4, (0,)),
    "unaligned": Case(123, 37, 3, 13, 5, (0, 2)),
    "aligned": Case(80, 48, 2, 32, 16, (0, 1)),
    "one of three": Case(40, 64, 3, 16, 8, (1,)),
    "three splits, the last one ragged": Case(197, 16, 1, 16, 16, (0,)),
    "rank above a group": Case(33, 24, 2, 16, 130, (0, 1)),
    "largest rank": Case(17, 16, 1, 16, 256, (0,)),
    "rank 1": Case(20, 16, 4, 8, 1, (1, 3)),
    "64 blocks": Case(21, 16, 64, 2, 2, (0, 5, 31, 32, 63)),
    "none active": Case(40, 16, 3, 16, 4, ()),
}


class Problem(NamedTuple):
    """Arguments of the launcher, and the same in fp64 with zeros for what is inactive."""

    x: Tensor
    dy: Tensor
    S: Tensor
    T: Tensor
    lora_A: Tensor
    lora_B: Tensor
    gate: Tensor
    case: Case
    mask: Tensor

    def run(self, config: Columns | None = SMALL, needs: Any = (True, True, True), p: float = 0.0) -> tuple[Any, ...]:
        seed = torch.tensor(11, device=self.dy.device) if p else None
        return weight_gradients.weight_gradients(
            self.x, self.dy, self.S, self.T, self.lora_A, self.lora_B, self.gate, THRESHOLD, SCALING, needs, p, seed,
            config,
        )  # fmt: skip

    def computed_in(self, dtype: torch.dtype, p: float = 0.0) -> tuple[Tensor, ...]:
        """The formulas, with every product in `dtype` and dgate summed from dB."""
        c, (_, K, blocks, n, r, active) = SCALING * counter.rescaling(p), self.case
        results = [torch.zeros(blocks, r, K), torch.zeros(blocks, n, r), torch.zeros(blocks)]
        dA, dB, dgate = (t.to(self.x.device, dtype) for t in results)
        x, dy = (self.x.to(dtype) * self.mask.to(dtype)), self.dy.to(dtype)
        for place, i in enumerate(active):
            slot = i if self.S.shape[1] == blocks * r else place
            S, T = (t[:, slot * r : (slot + 1) * r].to(dtype) for t in (self.S, self.T))
            dA[i] = (T.T @ x) * c
            dB[i] = (dy[:, i * n : (i + 1) * n].T @ S) * c
            dgate[i] = (dB[i] * self.lora_B[i].to(dtype)).sum()
        return dA, dB, dgate


def problem(
    case: Case, dtype: torch.dtype, device: torch.device, known: bool, lora_dtype: Any = None, p: float = 0.0
) -> Problem:
    M, K, blocks, n, r, active = case
    x, dy = torch.randn(M, K), torch.randn(M, blocks * n)
    A, B = torch.randn(blocks, r, K) / math.sqrt(K), torch.randn(blocks, n, r) / math.sqrt(r)
    mask = counter.kept(M, K, p, torch.tensor(11), torch.float32) if p else torch.ones(M, K)
    S = torch.einsum("mk,brk->mbr", x * mask, A)
    T = torch.einsum("mbn,bnr->mbr", dy.view(M, blocks, n), B)
    inactive = [i for i in range(blocks) if i not in active]
    # None of these may reach a result.
    S[:, inactive], T[:, inactive] = math.nan, math.nan
    dy.view(M, blocks, n)[:, inactive] = math.nan
    A[inactive], B[inactive] = math.nan, math.inf
    if known:
        S, T = S[:, list(active)], T[:, list(active)]
    gate = torch.full((blocks,), 0.05)
    gate[list(active)] = 0.15
    x, dy, S, T = (t.flatten(1).to(device, dtype).contiguous() for t in (x, dy, S, T))
    A, B = (t.to(device, lora_dtype or dtype) for t in (A, B))
    return Problem(x, dy, S, T, A, B, gate.to(device), case, mask.to(device))


def compare(check: Callable[..., None], given: Problem, found: tuple[Any, ...], p: float = 0.0) -> None:
    rounded, wanted = given.computed_in(given.x.dtype, p), given.computed_in(torch.float64, p)
    for name, ours, eager, exact in zip(("dA", "dB", "dgate"), found, rounded, wanted, strict=True):
        # dgate is a sum of n * r terms that cancel: its unit of rounding is that of their 2-norm.
        norm = (wanted[1] * given.lora_B.double()).nan_to_num().square().sum((1, 2)).sqrt().max()
        one_number = {"magnitude": float(norm), "terms": len(given.x)} if name == "dgate" else {}
        check(ours, eager.to(ours.dtype), exact, name, **one_number)


@pytest.mark.parametrize("known", [True, False], ids=["slots of the active", "slots of all"])
@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_every_gradient_agrees_with_einsum_and_holds_nothing_of_an_inactive_block(
    dtype: torch.dtype, case: Case, known: bool, device: torch.device, assert_as_exact_as: Callable[..., None]
) -> None:
    given = problem(case, dtype, device, known)
    compare(assert_as_exact_as, given, given.run())


@pytest.mark.parametrize("case", [CASES["unaligned"], CASES["aligned"]], ids=["unaligned", "aligned"])
def test_the_pass_of_older_gpus_computes_the_same(
    dtype: torch.dtype, case: Case, device: torch.device, monkeypatch: pytest.MonkeyPatch, assert_as_exact_as: Any
) -> None:
    monkeypatch.setattr(launch, "capability", lambda device: 80)
    given = problem(case, dtype, device, known=True)
    compare(assert_as_exact_as, given, given.run(dataclasses.replace(SMALL, TALL=False)))
    compare(assert_as_exact_as, given, given.run(None))


@pytest.mark.parametrize("case", [CASES["unaligned"], CASES["aligned"]], ids=["unaligned", "aligned"])
def test_what_the_forward_dropped_is_dropped_from_dA(
    dtype: torch.dtype, case: Case, device: torch.device, assert_as_exact_as: Any
) -> None:
    given = problem(case, dtype, device, known=True, p=0.3)
    compare(assert_as_exact_as, given, given.run(p=0.3), 0.3)


@pytest.mark.parametrize("dtype", [torch.float16, pytest.param(torch.bfloat16, marks=pytest.mark.gpu)], ids=str)
def test_fp32_matrices_get_fp32_gradients_from_16_bit_activations(
    dtype: torch.dtype, device: torch.device, assert_as_exact_as: Any
) -> None:
    given = problem(CASES["aligned"], dtype, device, known=True, lora_dtype=torch.float32)
    found = given.run()
    assert {t.dtype for t in found} == {torch.float32}
    # Unrounded: as exact as the same sums in fp32.
    wanted, in_fp32 = given.computed_in(torch.float64), given.computed_in(torch.float32)
    for name, ours, eager, exact in zip(("dA", "dB", "dgate"), found, in_fp32, wanted, strict=True):
        assert_as_exact_as(ours, eager, exact, name, 8 * float(exact.abs().max()))


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
def test_only_what_is_needed_is_computed_and_read(needs: tuple[bool, ...], device: torch.device) -> None:
    given = problem(CASES["unaligned"], torch.float32, device, known=True)
    whole = given.run()
    need_A, need_B, need_gate = needs
    x, T = (given.x, given.T) if need_A else (None, None)
    S = given.S if need_B or need_gate else None
    found = given._replace(x=x, T=T, S=S).run(needs=needs)
    for needed, ours, all_of_it in zip(needs, found, whole, strict=True):
        # The rows are split otherwise where there is less to do, so only the order of the sums differs.
        assert ours is None or needed
        if needed:
            torch.testing.assert_close(ours, all_of_it)


def test_rows_of_any_stride_are_read_in_place(device: torch.device) -> None:
    given = problem(CASES["aligned"], torch.float32, device, known=True)
    wide_x, wide_dy = torch.full((80, 100), math.nan, device=device), torch.full((80, 101), math.nan, device=device)
    wide_x[:, 4:52], wide_dy[:, 3:67] = given.x, given.dy
    strided = given._replace(x=wide_x[:, 4:52], dy=wide_dy[:, 3:67])
    for ours, contiguous in zip(strided.run(), given.run(), strict=True):
        torch.testing.assert_close(ours, contiguous)


@pytest.mark.parametrize("known", [True, False], ids=["slots of the active", "slots of all"])
def test_no_rows_give_gradients_of_zero(known: bool, device: torch.device) -> None:
    case = Case(0, 16, 3, 8, 4, (0, 2))
    found = problem(case, torch.float32, device, known).run()
    assert [tuple(t.shape) for t in found] == [(3, 4, 16), (3, 8, 4), (3,)]
    assert all(int(t.count_nonzero()) == 0 for t in found)


def test_two_runs_give_the_same_bits(dtype: torch.dtype, device: torch.device) -> None:
    given = problem(CASES["three splits, the last one ragged"], dtype, device, known=True)
    for one, two in zip(given.run(), given.run(), strict=True):
        assert torch.equal(one, two)


def test_the_interpreter_runs_several_splits_of_the_rows() -> None:
    # Two tiles of columns on three multiprocessors; on a GPU there are more.
    assert row_splits(197, 2, 16, 6) == (3, 80)


@pytest.mark.parametrize("tiles", [1, 3, 12, 100, 263, 1000])
@pytest.mark.parametrize("M", [1, 63, 64, 65, 12608, 50432])
def test_splits_cover_all_rows_once_and_bound_the_partial_sums(M: int, tiles: int) -> None:
    splits, rows = row_splits(M, tiles, 64, 264)
    assert rows % 64 == 0
    assert (splits - 1) * rows < M <= splits * rows
    assert splits == 1 or splits * tiles <= 2 * 264
    # No other split of the rows has its slowest multiprocessor do less.
    slowest = math.ceil(splits * tiles / 264) * (rows // 64)
    steps = math.ceil(M / 64)
    for other in range(1, max(1, min(steps, 2 * 264 // tiles)) + 1):
        assert slowest <= math.ceil(other * tiles / 264) * math.ceil(steps / other)


@pytest.mark.usefixtures("tf32")
def test_tf32_products_are_as_exact_as_those_of_pytorch(
    device: torch.device, as_multiplied: Callable[[Tensor], Tensor], assert_as_exact_as: Any
) -> None:
    given = problem(CASES["aligned"], torch.float32, device, known=True)
    x, dy, S, T = (as_multiplied(t) for t in (given.x, given.dy, given.S, given.T))
    rounded, wanted = given._replace(x=x, dy=dy, S=S, T=T).computed_in(torch.float32), given.computed_in(torch.float64)
    for name, ours, eager, exact in zip(("dA", "dB", "dgate"), given.run(), rounded, wanted, strict=True):
        assert_as_exact_as(ours, eager, exact, name, 8 * float(exact.abs().max()) if name == "dgate" else None)


def test_an_element_of_x_or_dy_may_lie_beyond_2_to_the_31(device: torch.device) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False
    given = problem(Case(3, 40, 1, 24, 4, (0,)), torch.float16, device, known=True)
    near = given.run()
    # Three rows, 4 GiB of addresses, of which three pages are touched; the second stride is not aligned.
    for stride in (2**30 + 8, 2**30 + 7):
        far = torch.empty(2 * stride + 64, dtype=torch.float16, device=device).as_strided((3, 64), (stride, 1))
        far[:, :40], far[:, 40:] = given.x, given.dy
        for ours, same in zip(given._replace(x=far[:, :40], dy=far[:, 40:]).run(), near, strict=True):
            assert torch.equal(ours, same)


@pytest.mark.usefixtures("fenced")
@pytest.mark.parametrize("slots", [1, 2])
def test_gates_that_moved_since_the_host_counted_reach_nothing_out_of_bounds(slots: int, device: torch.device) -> None:
    given = problem(Case(40, 48, 3, 32, 4, (0, 1, 2)), torch.float32, device, known=True)
    first = tuple(range(slots))
    S, T = (t[:, : 4 * slots].contiguous() for t in (given.S, given.T))
    stale = given._replace(S=S, T=T, case=given.case._replace(active=first))
    for ours, exact in zip(stale.run(), stale.computed_in(torch.float64), strict=True):
        torch.testing.assert_close(ours, exact.float(), rtol=1e-4, atol=1e-4)
