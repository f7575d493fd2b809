"""S and T by themselves, against einsum in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from slora import dropout as counter
from slora import room
from slora.kernels import skinny

THRESHOLD = 0.1
# M, K, blocks, n, r, active
CASES = {
    "one row": (1, 37, 1, 19, 4, (0,)),
    "unaligned": (123, 37, 3, 13, 5, (0, 2)),
    "aligned": (397, 64, 2, 48, 16, (0, 1)),
    "rank above a group": (33, 40, 3, 16, 130, (0, 2)),
    "64 blocks": (20, 16, 64, 2, 2, (0, 5, 31, 63)),
    "none active": (40, 16, 3, 16, 4, ()),
}


def operands(
    case: str, dtype: torch.dtype, lora_dtype: torch.dtype, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """x, dy, A, B, gate; NaN in all that belongs to inactive blocks."""
    M, K, blocks, n, r, active = CASES[case]
    inactive = [i for i in range(blocks) if i not in active]
    x, dy = torch.randn(M, K), torch.randn(M, blocks, n)
    A, B = torch.randn(blocks, r, K) / math.sqrt(K), torch.randn(blocks, n, r) / math.sqrt(n)
    A[inactive], B[inactive], dy[:, inactive] = math.nan, math.nan, math.nan
    gate = torch.full((blocks,), 0.05)
    gate[list(active)] = 0.15
    rows = (t.flatten(1).to(device, dtype) for t in (x, dy))
    return *rows, A.to(device, lora_dtype), B.to(device, lora_dtype), gate.to(device)


def expected(products: Tensor, active: tuple[int, ...], known: bool) -> Tensor:
    """The slots of `products [M, blocks, r]`: of the active blocks, or of all with 0 for the others."""
    if known:
        return products[:, list(active)].flatten(1)
    result = torch.zeros_like(products)
    result[:, list(active)] = products[:, list(active)]
    return result.flatten(1)


@pytest.mark.parametrize("known", [True, False], ids=["slots of the active", "slots of all"])
@pytest.mark.parametrize("lora", ["same", "fp32"])
@pytest.mark.parametrize("case", CASES)
def test_S_and_T_agree_with_einsum_and_hold_nothing_of_an_inactive_block(
    dtype: torch.dtype, case: str, lora: str, known: bool, device: torch.device, assert_as_exact_as: Callable[..., None]
) -> None:
    M, _, blocks, n, r, active = CASES[case]
    lora_dtype = dtype if lora == "same" else torch.float32
    x, dy, A, B, gate = operands(case, dtype, lora_dtype, device)
    slots = len(active) if known else blocks
    found = skinny.products_S(x, A, gate, THRESHOLD, slots), skinny.products_T(dy, B, gate, THRESHOLD, slots)
    for name, ours, rows, low, formula in (
        ("S", found[0], x, A, "mk,brk->mbr"),
        ("T", found[1], dy.view(M, blocks, n), B, "mbn,bnr->mbr"),
    ):
        eager = expected(torch.einsum(formula, rows, low.to(dtype)), active, known)
        exact = expected(torch.einsum(formula, rows.double(), low.to(dtype).double()), active, known)
        assert ours.shape == (M, slots * r)
        assert_as_exact_as(ours, eager, exact, name)


def test_S_is_that_of_the_masked_rows_and_not_scaled_up(
    dtype: torch.dtype, device: torch.device, assert_as_exact_as: Callable[..., None]
) -> None:
    x, _, A, _, gate = operands("unaligned", dtype, dtype, device)
    seed = torch.tensor(5, device=device)
    kept = counter.kept(*x.shape, 0.4, seed, dtype)
    found = skinny.products_S(x, A, gate, THRESHOLD, 2, 0.4, seed)
    masked, present = x * kept, A[[0, 2]]
    eager = torch.einsum("mk,brk->mbr", masked, present).flatten(1)
    exact = torch.einsum("mk,brk->mbr", masked.double(), present.double()).flatten(1)
    assert_as_exact_as(found, eager, exact, "S")


def test_rows_of_any_stride_are_read_in_place(device: torch.device) -> None:
    x, dy, A, B, gate = operands("aligned", torch.float32, torch.float32, device)
    for rows, product, low in ((x, skinny.products_S, A), (dy, skinny.products_T, B)):
        wide = torch.full((rows.shape[0], rows.shape[1] + 5), math.nan, device=device)
        wide[:, 3:-2] = rows
        torch.testing.assert_close(
            product(wide[:, 3:-2], low, gate, THRESHOLD, 2), product(rows, low, gate, THRESHOLD, 2)
        )


@pytest.mark.parametrize("shape", [(0, 2), (5, 0)], ids=["no rows", "no slots"])
def test_nothing_to_compute_gives_an_empty_result(shape: tuple[int, int], device: torch.device) -> None:
    M, slots = shape
    x, A = torch.randn(M, 8, device=device), torch.randn(2, 4, 8, device=device)
    gate = torch.full((2,), 0.15 if slots else 0.05, device=device)
    assert skinny.products_S(x, A, gate, THRESHOLD, slots).shape == (M, slots * 4)
    assert skinny.products_T(x, A.transpose(1, 2).contiguous()[:, :4], gate, THRESHOLD, slots).shape == (M, slots * 4)


def test_two_runs_give_the_same_bits(device: torch.device) -> None:
    x, dy, A, B, gate = operands("aligned", torch.float16, torch.float32, device)
    for _ in range(2):
        assert torch.equal(*(skinny.products_S(x, A, gate, THRESHOLD, 2) for _ in range(2)))
        assert torch.equal(*(skinny.products_T(dy, B, gate, THRESHOLD, 2) for _ in range(2)))


@pytest.mark.parametrize("known", [True, False], ids=["slots of the active", "slots of all"])
@pytest.mark.parametrize("case", CASES)
def test_the_room_behind_x_holds_the_scaled_S_and_zeros_and_x_stays(
    case: str, known: bool, device: torch.device
) -> None:
    M, K, blocks, _, r, active = CASES[case]
    given, _, A, _, gate = operands(case, torch.float32, torch.float32, device)
    slots = len(active) if known else blocks
    x = room.empty(M, K, room=slots * r + 8, device=device).copy_(given)
    wide = room.widened(x, slots * r)
    assert wide is not None
    S = skinny.products_S(x, A, gate, THRESHOLD, slots, room=wide[:, K:], factor=0.25)
    torch.testing.assert_close(S, expected(torch.einsum("mk,brk->mbr", given, A), active, known))
    if slots:
        assert torch.equal(wide[:, K : K + slots * r], 0.25 * S)
        assert wide[:, K + slots * r :].eq(0).all()
    assert torch.equal(x, given)
    beyond = room.widened(x, slots * r + 8)[:, wide.shape[1] :]
    assert beyond.isnan().all()


@pytest.mark.usefixtures("tf32")
def test_tf32_products_are_as_exact_as_those_of_pytorch(
    device: torch.device, as_multiplied: Callable[[Tensor], Tensor], assert_as_exact_as: Callable[..., None]
) -> None:
    M, _, blocks, n, _, active = CASES["aligned"]
    x, dy, A, B, gate = operands("aligned", torch.float32, torch.float32, device)
    for ours, rows, low, formula in (
        (skinny.products_S(x, A, gate, THRESHOLD, 2), x, A, "mk,brk->mbr"),
        (skinny.products_T(dy, B, gate, THRESHOLD, 2), dy.view(M, blocks, n), B, "mbn,bnr->mbr"),
    ):
        eager = expected(torch.einsum(formula, as_multiplied(rows), as_multiplied(low)), active, True)
        assert_as_exact_as(ours, eager, expected(torch.einsum(formula, rows.double(), low.double()), active, True))


def test_an_element_may_lie_beyond_2_to_the_31(device: torch.device) -> None:
    torch.utils.deterministic.fill_uninitialized_memory = False
    M, K, r, stride = 3, 48, 4, 2**30 + 8
    # Three rows, 4 GiB of addresses, of which three pages are touched; behind each row there is room for S.
    far = torch.empty(2 * stride + K + 8, dtype=torch.float16, device=device).as_strided((M, K + 8), (stride, 1))
    rows = torch.randn(M, K).to(far)
    far[:, :K] = rows
    A, B, gate = torch.randn(1, r, K).to(far), torch.randn(1, K, r).to(far), torch.ones(1, device=device)
    S = skinny.products_S(far[:, :K], A, gate, THRESHOLD, 1, room=far[:, K:], factor=0.5)
    assert torch.equal(S, skinny.products_S(rows, A, gate, THRESHOLD, 1))
    assert torch.equal(far[:, K:], torch.nn.functional.pad(0.5 * S, (0, 4)))
    assert torch.equal(
        skinny.products_T(far[:, :K], B, gate, THRESHOLD, 1), skinny.products_T(rows, B, gate, THRESHOLD, 1)
    )


@pytest.mark.usefixtures("fenced")
@pytest.mark.parametrize(("on", "slots"), [((0, 1, 2), 1), ((0, 1, 2), 2), ((1,), 2)], ids=["2 more", "1 more", "less"])
def test_gates_that_moved_since_the_host_counted_fill_the_slots_there_are(
    on: tuple[int, ...], slots: int, device: torch.device, assert_as_exact_as: Callable[..., None]
) -> None:
    M, K, n, r = 20, 32, 16, 4
    x, dy = torch.randn(M, K, device=device), torch.randn(M, 3, n, device=device)
    A, B = torch.randn(3, r, K, device=device), torch.randn(3, n, r, device=device)
    gate = torch.zeros(3, device=device)
    gate[list(on)] = 1.0
    for ours, rows, low, formula in (
        (skinny.products_S(x, A, gate, THRESHOLD, slots), x, A, "mk,brk->mbr"),
        (skinny.products_T(dy.flatten(1), B, gate, THRESHOLD, slots), dy, B, "mbn,bnr->mbr"),
    ):
        exact = torch.einsum(formula, rows.double(), low.double())[:, list(on)[:slots]].flatten(1)
        eager = torch.einsum(formula, rows, low)[:, list(on)[:slots]].flatten(1)
        # A slot that no block takes holds zeros.
        pad = (0, slots * r - exact.shape[1])
        assert_as_exact_as(ours, torch.nn.functional.pad(eager, pad), torch.nn.functional.pad(exact, pad))
