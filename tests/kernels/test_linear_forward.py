"""The forward kernel against the reference, in every form, over odd shapes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from slora.kernels import configs, launch, tiles
from slora.kernels.linear_forward import forward, plan

# Small tiles, so that small problems have several in every direction, and more of them than programs.
SMALL = configs.Gemm(32, 32, 32, 4, 2)
SMALL_HALVES = configs.Gemm(32, 32, 16, 4, 2, HALVES=True, FLATTEN=True, GROUP=2)

# M, K, n, blocks, r, which are active: aligned shapes go through descriptors, the others through pointers.
CASES = [
    (1, 40, 24, 1, 1, "all"),
    (5, 51, 35, 1, 4, "all"),
    (37, 48, 40, 1, 16, "none"),
    (123, 96, 80, 1, 16, "all"),
    (37, 64, 40, 3, 64, "all"),
    (123, 72, 64, 3, 16, "some"),
    (197, 70, 33, 3, 17, "some"),
    (37, 48, 40, 3, 16, "none"),
    (5, 48, 8, 64, 4, "some"),
]


def run(p: Any, slots: int, S: Tensor | None = None, config: configs.Gemm | None = SMALL) -> tuple[Tensor, Tensor]:
    return forward(
        p.x, p.W, p.bias, p.A, p.B, p.gate, p.threshold, p.scaling, slots, p.dropout, p.seed, S, config=config
    )


@pytest.mark.parametrize(("M", "K", "n", "blocks", "r", "which"), CASES)
def test_y_and_S_are_those_of_the_reference(
    M: int, K: int, n: int, blocks: int, r: int, which: str, dtype: torch.dtype,
    make_problem: Callable[..., Any], assert_as_exact_as: Callable[..., None],
) -> None:  # fmt: skip
    p = make_problem(M, K, n, blocks, r, which, dtype, low=torch.float32 if M % 2 else None, bias=K % 2 == 0)
    # The host knows which blocks are active, or the kernel finds out and every block has its columns of S.
    for slots in {len(p.active), blocks}:
        y, S = run(p, slots)
        for ours, eager, exact, name in zip(
            (y, S), p.forward(dtype, slots), p.forward(torch.float64, slots), "yS", strict=True
        ):
            assert_as_exact_as(ours, eager, exact, f"{name} with {slots} slots")


@pytest.mark.parametrize("config", [None, SMALL_HALVES], ids=["default", "halves"])
@pytest.mark.parametrize(("M", "K", "n", "blocks", "r"), [(150, 136, 96, 3, 20), (70, 51, 35, 3, 5)])
def test_tile_sizes_change_nothing_but_rounding(
    M: int, K: int, n: int, blocks: int, r: int, config: configs.Gemm | None, dtype: torch.dtype,
    make_problem: Callable[..., Any], assert_as_exact_as: Callable[..., None],
) -> None:  # fmt: skip
    # Tiles of exact products are small enough for fewer rows.
    p = make_problem(M // 4 if dtype == torch.float32 else M, K, n, blocks, r, "some", dtype)
    for ours, eager, exact in zip(
        run(p, 2, config=config), p.forward(dtype, 2), p.forward(torch.float64, 2), strict=True
    ):
        assert_as_exact_as(ours, eager, exact)


@pytest.mark.parametrize(("blocks", "r", "which"), [(1, 16, "all"), (3, 17, "some"), (1, 128, "all"), (3, 256, "some")])
def test_S_that_is_given_is_read_and_returned(
    blocks: int, r: int, which: str, dtype: torch.dtype,
    make_problem: Callable[..., Any], assert_as_exact_as: Callable[..., None],
) -> None:  # fmt: skip
    p = make_problem(50, 48, 40, blocks, r, which, dtype, low=torch.float32)
    for slots in {len(p.active), blocks}:
        exact, S = p.forward(torch.float64, slots)
        S = S.to(dtype)
        y, returned = run(p, slots, S)
        assert returned is S
        assert_as_exact_as(y, p.forward(dtype, slots)[0], exact)


@pytest.mark.parametrize("K", [64, 51])
@pytest.mark.parametrize("blocks", [1, 3])
def test_dropout_masks_x_on_the_LoRA_path_only(
    K: int, blocks: int, dtype: torch.dtype, make_problem: Callable[..., Any], assert_as_exact_as: Callable[..., None]
) -> None:
    p = make_problem(70, K, 40, blocks, 8, "all", dtype, dropout=0.3)
    for ours, eager, exact in zip(
        run(p, blocks), p.forward(dtype, blocks), p.forward(torch.float64, blocks), strict=True
    ):
        assert_as_exact_as(ours, eager, exact)
    # The S of an earlier pass is of the masked x already, and the update counts it as much.
    S = run(p, blocks)[1]
    assert_as_exact_as(run(p, blocks, S)[0], p.forward(dtype, blocks)[0], p.forward(torch.float64, blocks)[0])


def test_rows_may_be_far_apart_or_all_the_same(
    dtype: torch.dtype, make_problem: Callable[..., Any], assert_as_exact_as: Callable[..., None]
) -> None:
    p = make_problem(40, 48, 40, 1, 8, "all", dtype)
    wide = torch.randn(40, 64).to(p.x)
    for x in (wide[:, 16:], wide[:, 13:61], wide[:1, :48].expand(40, -1)):
        p.x = x
        y, S = run(p, 1)
        for ours, eager, exact in zip((y, S), p.forward(dtype, 1), p.forward(torch.float64, 1), strict=True):
            assert_as_exact_as(ours, eager, exact)


def test_an_element_of_x_may_lie_beyond_2_to_the_31(
    make_problem: Callable[..., Any], assert_as_exact_as: Callable[..., None]
) -> None:
    # Three rows, 2^30 and a few elements apart: 4 GiB of addresses, of which three pages are touched.
    torch.utils.deterministic.fill_uninitialized_memory = False
    for K, stride in ((48, 2**30 + 8), (51, 2**30 + 7)):
        p = make_problem(3, K, 40, 1, 8, "all", torch.float16)
        storage = torch.empty(2 * stride + K, dtype=torch.float16, device=p.x.device)
        far = storage.as_strided((3, K), (stride, 1))
        far.copy_(p.x)
        p.x = far
        y, S = run(p, 1)
        for ours, eager, exact in zip((y, S), p.forward(torch.float16, 1), p.forward(torch.float64, 1), strict=True):
            assert_as_exact_as(ours, eager, exact)


@pytest.mark.parametrize("slots", [2, 3])
def test_nothing_of_an_inactive_block_is_read(slots: int, dtype: torch.dtype, make_problem: Callable[..., Any]) -> None:
    p = make_problem(40, 48, 40, 3, 4, "some", dtype)
    p.A[1], p.B[1] = float("nan"), float("inf")
    y, S = run(p, slots)
    assert y.isfinite().all()
    assert S.isfinite().all()


def test_a_score_at_the_threshold_is_active_and_one_that_is_no_number_is_not(make_problem: Callable[..., Any]) -> None:
    p = make_problem(8, 48, 40, 3, 4, "none")
    base = run(p, 0)[0]
    p.gate[0], p.gate[2] = torch.tensor(p.threshold), float("nan")
    y = run(p, 3)[0]
    assert (y[:, :40] != base[:, :40]).any()
    assert torch.equal(y[:, 40:], base[:, 40:])


def test_no_rows_give_no_rows(dtype: torch.dtype, make_problem: Callable[..., Any]) -> None:
    y, S = run(make_problem(0, 48, 40, 3, 4, "all", dtype), 3)
    assert (y.shape, S.shape, y.dtype, S.dtype) == ((0, 120), (0, 12), dtype, dtype)


@pytest.mark.parametrize("r", [16, 128])
def test_two_runs_give_the_same_bits(r: int, dtype: torch.dtype, make_problem: Callable[..., Any]) -> None:
    p = make_problem(37, 72, 64, 3, r, "some", dtype)
    S = p.forward(dtype, 3)[1] if r > configs.MAX_FUSED_RANK else None
    first, second = run(p, 3, S, None), run(p, 3, S, None)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@pytest.mark.gpu
def test_a_layer_of_more_than_2_to_the_31_elements_is_right_at_its_end(
    device: torch.device, make_problem: Callable[..., Any]
) -> None:
    M = 2**31 // 768 + 1000
    p = make_problem(2, 768, 768, 1, 16, "all", torch.bfloat16)
    p.x = torch.randn(M, 768, dtype=torch.bfloat16, device=device)
    y, S = run(p, 1, config=None)
    p.x = p.x[-200:].clone()
    y_end, S_end = run(p, 1, config=None)
    assert torch.equal(y[-200:], y_end)
    assert torch.equal(S[-200:], S_end)


@pytest.mark.usefixtures("tf32")
@pytest.mark.parametrize(
    ("M", "K", "n", "blocks", "r", "which", "dropout"),
    [(37, 48, 40, 1, 16, "all", 0.0), (37, 72, 64, 3, 5, "some", 0.0), (33, 40, 24, 2, 8, "all", 0.3)],
)
def test_tf32_products_go_through_descriptors_and_are_as_exact_as_those_of_pytorch(
    M: int, K: int, n: int, blocks: int, r: int, which: str, dropout: float,
    make_problem: Callable[..., Any], assert_as_exact_as: Callable[..., None],
) -> None:  # fmt: skip
    p = make_problem(M, K, n, blocks, r, which, dropout=dropout)
    slots = len(p.active)
    choice = plan(p.x, p.W, p.A, False, dropout > 0)
    assert (choice.access, choice.precision) == ("bulk" if launch.part(p.x.device) >= 90 else "elements", "tf32")
    eager, exact = p.forward(torch.float32, slots), p.forward(torch.float64, slots)
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
    eager, exact = p.forward(torch.float16, slots), p.forward(torch.float64, slots)
    p.gate = moved
    for ours, theirs, wide in zip(run(p, slots, eager[1] if given else None), eager, exact, strict=True):
        assert_as_exact_as(ours, theirs, wide)


@pytest.mark.skipif(torch.cuda.is_available(), reason="compiled kernels call nothing that could be counted")
@pytest.mark.parametrize("blocks", [1, 3])
def test_each_tile_of_S_is_stored_once(
    blocks: int, make_problem: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    p = make_problem(70, 48, 80, blocks, 4, "some")
    stored = []
    store = tiles.store_low
    monkeypatch.setattr(tiles, "store_low", lambda *arguments: (stored.append(1), store(*arguments)))
    run(p, blocks)
    # Three tiles of rows, and three tiles of columns of y per block.
    assert len(stored) == 3 * blocks
