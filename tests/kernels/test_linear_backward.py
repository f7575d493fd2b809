"""The input gradient's kernel against the reference, in every form, over odd shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from slora.kernels import configs, launch, tiles
from slora.kernels.linear_backward import input_gradient, plan

# Small tiles, so that small problems have several in every direction, and more of them than programs.
SMALL = configs.Gemm(32, 32, 32, 4, 2)
SMALL_HALVES = configs.Gemm(32, 32, 16, 4, 2, HALVES=True, FLATTEN=True, GROUP=2)

# M, K, n, blocks, r, which are active: aligned shapes go through descriptors, the others through pointers.
CASES = [
    (1, 40, 24, 1, 1, "all"),
    (5, 51, 35, 1, 4, "all"),
    (37, 48, 40, 1, 16, "none"),
    (123, 80, 96, 1, 16, "all"),
    (37, 64, 32, 3, 64, "all"),
    (123, 72, 64, 3, 16, "some"),
    (123, 72, 40, 3, 16, "some"),
    (197, 70, 33, 3, 17, "some"),
    (37, 48, 32, 3, 16, "none"),
    (5, 48, 8, 64, 4, "some"),
]


def run(p: Any, slots: int, T: Tensor | None = None, config: configs.Gemm | None = SMALL) -> tuple[Tensor, Tensor]:
    return input_gradient(
        p.dy, p.W, p.A, p.B, p.gate, p.threshold, p.scaling, slots, p.dropout, p.seed, T, config=config
    )


@pytest.mark.parametrize(("M", "K", "n", "blocks", "r", "which"), CASES)
def test_dx_and_T_are_those_of_the_reference(
    M: int, K: int, n: int, blocks: int, r: int, which: str, dtype: torch.dtype,
    make_problem: Callable[..., Any], assert_as_exact_as: Callable[..., None],
) -> None:  # fmt: skip
    p = make_problem(M, K, n, blocks, r, which, dtype, low=torch.float32 if M % 2 else None)
    # The host knows which blocks are active, or the kernel finds out and every block has its columns of T.
    for slots in {len(p.active), blocks}:
        for ours, eager, exact, name in zip(
            run(p, slots), p.backward(dtype, slots), p.backward(torch.float64, slots), ("dx", "T"), strict=True
        ):
            assert_as_exact_as(ours, eager, exact, f"{name} with {slots} slots")


@pytest.mark.parametrize("config", [None, SMALL_HALVES], ids=["default", "halves"])
@pytest.mark.parametrize(
    ("M", "K", "n", "blocks", "r"), [(150, 136, 96, 1, 20), (150, 72, 64, 3, 8), (70, 51, 35, 3, 5)]
)
def test_tile_sizes_change_nothing_but_rounding(
    M: int, K: int, n: int, blocks: int, r: int, config: configs.Gemm | None, dtype: torch.dtype,
    make_problem: Callable[..., Any], assert_as_exact_as: Callable[..., None],
) -> None:  # fmt: skip
    # Tiles of exact products are small enough for fewer rows.
    p = make_problem(M // 4 if dtype == torch.float32 else M, K, n, blocks, r, "some", dtype)
    slots = len(p.active)
    for ours, eager, exact in zip(
        run(p, slots, config=config), p.backward(dtype, slots), p.backward(torch.float64, slots), strict=True
    ):
        assert_as_exact_as(ours, eager, exact)


@pytest.mark.parametrize(("blocks", "r", "which"), [(1, 16, "all"), (3, 17, "some"), (1, 128, "all"), (3, 256, "some")])
def test_T_that_is_given_is_read_and_returned(
    blocks: int, r: int, which: str, dtype: torch.dtype,
    make_problem: Callable[..., Any], assert_as_exact_as: Callable[..., None],
) -> None:  # fmt: skip
    p = make_problem(50, 48, 40, blocks, r, which, dtype, low=torch.float32)
    for slots in {len(p.active), blocks}:
        exact, T = p.backward(torch.float64, slots)
        T = T.to(dtype)
        dx, returned = run(p, slots, T)
        assert returned is T
        assert_as_exact_as(dx, p.backward(dtype, slots)[0], exact)


@pytest.mark.parametrize(("K", "n"), [(64, 32), (51, 35)])
@pytest.mark.parametrize("blocks", [1, 3])
def test_dropout_masks_the_update_of_dx_and_not_T(
    K: int, n: int, blocks: int, dtype: torch.dtype,
    make_problem: Callable[..., Any], assert_as_exact_as: Callable[..., None],
) -> None:  # fmt: skip
    p = make_problem(70, K, n, blocks, 8, "all", dtype, dropout=0.3)
    dx, T = run(p, blocks)
    for ours, eager, exact in zip((dx, T), p.backward(dtype, blocks), p.backward(torch.float64, blocks), strict=True):
        assert_as_exact_as(ours, eager, exact)
    assert_as_exact_as(run(p, blocks, T)[0], p.backward(dtype, blocks)[0], p.backward(torch.float64, blocks)[0])


def test_rows_may_be_far_apart_or_all_the_same(
    dtype: torch.dtype, make_problem: Callable[..., Any], assert_as_exact_as: Callable[..., None]
) -> None:
    p = make_problem(40, 40, 48, 1, 8, "all", dtype)
    wide = torch.randn(40, 64).to(p.dy)
    for dy in (wide[:, 16:], wide[:, 13:61], wide[:1, :48].expand(40, -1)):
        p.dy = dy
        for ours, eager, exact in zip(run(p, 1), p.backward(dtype, 1), p.backward(torch.float64, 1), strict=True):
            assert_as_exact_as(ours, eager, exact)


def test_a_weight_of_odd_width_may_have_aligned_rows(
    dtype: torch.dtype, make_problem: Callable[..., Any], assert_as_exact_as: Callable[..., None]
) -> None:
    p = make_problem(40, 51, 48, 1, 8, "all", dtype)
    wide = torch.full((48, 64), float("nan")).to(p.W)
    wide[:, :51] = p.W
    p.W = wide[:, :51]
    for ours, eager, exact in zip(run(p, 1), p.backward(dtype, 1), p.backward(torch.float64, 1), strict=True):
        assert_as_exact_as(ours, eager, exact)


def test_an_element_of_dy_may_lie_beyond_2_to_the_31(
    make_problem: Callable[..., Any], assert_as_exact_as: Callable[..., None]
) -> None:
    # Three rows, 2^30 and a few elements apart: 4 GiB of addresses, of which three pages are touched.
    torch.utils.deterministic.fill_uninitialized_memory = False
    for n, stride in ((48, 2**30 + 8), (51, 2**30 + 7)):
        p = make_problem(3, 40, n, 1, 8, "all", torch.float16)
        far = torch.empty(2 * stride + n, dtype=torch.float16, device=p.dy.device).as_strided((3, n), (stride, 1))
        p.dy = far.copy_(p.dy)
        exact = p.backward(torch.float64, 1)
        for ours, eager, wide in zip(run(p, 1), p.backward(torch.float16, 1), exact, strict=True):
            assert_as_exact_as(ours, eager, wide)


@pytest.mark.parametrize("slots", [2, 3])
def test_nothing_of_an_inactive_block_is_read(slots: int, dtype: torch.dtype, make_problem: Callable[..., Any]) -> None:
    p = make_problem(40, 48, 32, 3, 4, "some", dtype)
    p.A[1], p.B[1] = float("nan"), float("inf")
    dx, T = run(p, slots)
    assert dx.isfinite().all()
    assert T.isfinite().all()


def test_no_rows_give_no_rows(dtype: torch.dtype, make_problem: Callable[..., Any]) -> None:
    dx, T = run(make_problem(0, 48, 40, 3, 4, "all", dtype), 3)
    assert (dx.shape, T.shape, dx.dtype, T.dtype) == ((0, 48), (0, 12), dtype, dtype)


@pytest.mark.parametrize("r", [16, 128])
def test_two_runs_give_the_same_bits(r: int, dtype: torch.dtype, make_problem: Callable[..., Any]) -> None:
    p = make_problem(37, 72, 64, 3, r, "some", dtype)
    T = p.backward(dtype, 3)[1] if r > configs.MAX_FUSED_RANK else None
    first, second = run(p, 3, T, None), run(p, 3, T, None)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_a_gradient_of_more_than_2_to_the_31_elements_is_right_at_its_end(
    device: torch.device, make_problem: Callable[..., Any]
) -> None:
    M = 2**31 // 768 + 1000
    p = make_problem(2, 768, 768, 1, 16, "all", torch.bfloat16)
    p.dy = torch.randn(M, 768, dtype=torch.bfloat16, device=device)
    dx, T = run(p, 1, config=None)
    p.dy = p.dy[-200:].clone()
    dx_end, T_end = run(p, 1, config=None)
    assert torch.equal(dx[-200:], dx_end)
    assert torch.equal(T[-200:], T_end)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize(
    ("M", "K", "n", "blocks", "r", "which", "dropout"),
    [(37, 48, 40, 1, 16, "all", 0.0), (37, 72, 64, 3, 5, "some", 0.0), (33, 40, 32, 2, 8, "all", 0.3)],
)
def test_tf32_products_go_through_descriptors_and_are_as_exact_as_those_of_pytorch(
    M: int, K: int, n: int, blocks: int, r: int, which: str, dropout: float,
    make_problem: Callable[..., Any], assert_as_exact_as: Callable[..., None],
) -> None:  # fmt: skip
    p = make_problem(M, K, n, blocks, r, which, dropout=dropout)
    slots = len(p.active)
    choice = plan(p.dy, p.W, p.A, False, dropout > 0)
    assert (choice.access, choice.precision) == ("bulk" if launch.part(p.x.device) >= 90 else "elements", "tf32")
    eager, exact = p.backward(torch.float32, slots), p.backward(torch.float64, slots)
    found = run(p, slots)
    for ours, theirs, wide in zip((*found, *run(p, slots, found[1])), eager * 2, exact * 2, strict=True):
        assert_as_exact_as(ours, theirs, wide)


@pytest.mark.usefixtures("fenced")
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize(("blocks", "slots"), [(3, 1), (4, 2), (1, 0)])
def test_a_gate_that_moved_since_the_host_counted_writes_and_reads_nothing_out_of_bounds(
    blocks: int, slots: int, given: bool, make_problem: Callable[..., Any], assert_as_exact_as: Callable[..., None]
) -> None:
    p = make_problem(40, 48, 32, blocks, 4, "all", torch.float16)
    moved = p.gate.clone()
    # What the host counted: the kernel gives the slots to the first of the active blocks.
    p.gate[slots:], p.active = 0.0, list(range(slots))
    eager, exact = p.backward(torch.float16, slots), p.backward(torch.float64, slots)
    p.gate = moved
    for ours, theirs, wide in zip(run(p, slots, eager[1] if given else None), eager, exact, strict=True):
        assert_as_exact_as(ours, theirs, wide)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels call nothing that could be counted")
@pytest.mark.parametrize("blocks", [1, 3])
def test_each_tile_of_T_is_stored_once(
    blocks: int, make_problem: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    p = make_problem(70, 80, 32, blocks, 4, "some")
    stored = []
    store = tiles.store_low
    monkeypatch.setattr(tiles, "store_low", lambda *arguments: (stored.append(1), store(*arguments)))
    run(p, blocks)
    # Three tiles of rows, and three tiles of columns of dx.
    assert len(stored) == 3 * blocks


def test_blocks_that_steps_of_64_do_not_fit_are_read_in_steps_of_32(device: torch.device) -> None:
    def chosen(n: int) -> configs.Choice:
        dy = torch.zeros(8, 3 * n, dtype=torch.float16, device=device)
        return plan(dy, dy.new_zeros(3 * n, 64), dy.new_zeros(3, 16, 64), False, False)

    if launch.part(device) != 90:
        pytest.skip("other GPUs have other steps")
    assert {tile.BK for tile in chosen(128).candidates} == {32, 64}
    assert {tile.BK for tile in chosen(96).candidates} == {32}
    assert (chosen(96).access, chosen(80).access) == ("bulk", "elements")
