"""Every algorithm of every operation, with every tile size that may be chosen, against the formulas in fp64."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from slora.kernels import configs, launch, linear, skinny
from slora.kernels.weight_gradients import row_splits
from slora.ops.backends import Needs
from slora.ops.backends.algorithms import Algorithm, Forward, InputGradient, WeightGradients

# M, K, n, blocks, r, which blocks are active: rows of 1, 5, 123 and 197, and columns that are no powers of two.
SHAPES = {
    "one row": (1, 24, 40, 1, 8, "all"),
    "five rows": (5, 72, 136, 1, 16, "all"),
    "several column tiles": (123, 136, 296, 1, 24, "all"),
    "none active": (5, 40, 24, 1, 8, "none"),
    "two of three": (123, 72, 64, 3, 8, "some"),
    "three": (37, 40, 192, 3, 16, "all"),
    "none of three": (37, 40, 32, 3, 16, "none"),
    "rank 64": (19, 80, 64, 2, 64, "all"),
    "rank 128": (5, 40, 24, 3, 128, "some"),
    "rank 256": (5, 24, 40, 1, 256, "all"),
    "many blocks": (5, 16, 8, 24, 8, "some"),
    "long": (197, 24, 16, 1, 32, "all"),
}  # fmt: skip


def by_name(algorithms: list[Algorithm], every_tile: bool = False) -> list[Algorithm]:
    """The first of each name, or all."""
    return (
        algorithms if every_tile else list({algorithm.name: algorithm for algorithm in reversed(algorithms)}.values())
    )


def results(p: Any, every_tile: bool = False) -> dict[str, list[tuple[Algorithm, dict[str, Tensor]]]]:
    """What each algorithm of each operation computes, with S and T of the formulas for the weight gradients."""
    forward = Forward(p.x, p.W, p.bias, p.operands)
    backward = InputGradient(p.dy, p.W, None, p.operands)
    exact = p.computed_in(torch.float64)
    S, T = (exact[name].to(p.x) for name in "ST")
    weights = WeightGradients(p.x, p.dy, S, T, p.operands, Needs(True, True, True, True))
    operations = {"y": (forward, "y S"), "dx": (backward, "dx T"), "weights": (weights, "dA dB dgate")}
    return {
        name: [
            (algorithm, dict(zip(keys.split(), operation.compute(algorithm), strict=True)))
            for algorithm in by_name(operation.algorithms(), every_tile)
        ]
        for name, (operation, keys) in operations.items()
    }


# The eager backend serves a layer without active blocks. Every shape in one dtype each way, because an interpreted
# launch takes a tenth of a second; on a GPU in bf16 too.
CASES = [
    pytest.param(name, known, dtype, id=f"{name}, {'host' if known else 'device'}-known, {dtype}", marks=marks)
    for i, (name, shape) in enumerate(SHAPES.items())
    for known in (True, False) if not (known and shape[-1] == "none")
    for dtype, marks in (("exact" if (i % 2 == 0) == known else "fp16", ()), ("bf16", pytest.mark.gpu))
]  # fmt: skip


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize(("name", "host_known", "precision"), CASES)
def test_every_form_agrees_with_the_formulas(
    name: str, host_known: bool, precision: str, exact_dtype: torch.dtype,
    make_problem: Callable[..., Any], assert_as_exact_as: Callable[..., None],
) -> None:  # fmt: skip
    M, K, n, blocks, r, which = SHAPES[name]
    dtype = {"exact": exact_dtype, "fp16": torch.float16, "bf16": torch.bfloat16}[precision]
    p = make_problem(M, K, n, blocks, r, which, dtype, host_known, bias=M != 5)
    for found in results(p).values():
        for algorithm, values in found:
            p.compare(assert_as_exact_as, values, str(algorithm))


@pytest.mark.parametrize(("K", "n", "blocks"), [(136, 272, 1), (136, 64, 3)])
def test_every_tile_size_computes_the_same(
    K: int, n: int, blocks: int, make_problem: Callable[..., Any], assert_as_exact_as: Callable[..., None]
) -> None:
    p = make_problem(70, K, n, blocks, 24, "all", torch.float16)
    for found in results(p, every_tile=True).values():
        for algorithm, values in found:
            p.compare(assert_as_exact_as, values, str(algorithm))


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize("arch", [80, 100])
@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU has an arch of its own")
def test_the_tiles_of_other_archs_compute_the_same(
    arch: int, monkeypatch: pytest.MonkeyPatch,
    make_problem: Callable[..., Any], assert_as_exact_as: Callable[..., None],
) -> None:  # fmt: skip
    monkeypatch.setattr(launch, "arch", lambda device: arch)
    for shape in ((70, 72, 136, 1, 16, "all"), (37, 40, 64, 3, 8, "some"), (5, 40, 24, 3, 128, "all")):
        p = make_problem(*shape, host_known=shape[3] > 1)
        for found in results(p).values():
            for algorithm, values in found:
                p.compare(assert_as_exact_as, values, str(algorithm))


@pytest.mark.parametrize(
    ("blocks", "r", "which", "host_known"),
    [(1, 8, "all", False), (3, 16, "some", True), (3, 16, "some", False), (2, 256, "all", True)],
)
def test_dropout_masks_x_on_the_LoRA_path_only(
    blocks: int, r: int, which: str, host_known: bool, exact_dtype: torch.dtype,
    make_problem: Callable[..., Any], assert_as_exact_as: Callable[..., None],
) -> None:  # fmt: skip
    p = make_problem(
        70, 72, 40, blocks, r, which, exact_dtype if host_known else torch.float16, host_known, dropout=0.3
    )
    found = results(p)
    assert {algorithm.name for algorithm, _ in found["dx"]} == {"precomputed"}
    assert "fused" not in {algorithm.name for algorithm, _ in found["y"]}
    for values in itertools.chain.from_iterable(found.values()):
        p.compare(assert_as_exact_as, values[1], str(values[0]))


def names(operation: Any) -> set[str]:
    return {algorithm.name for algorithm in operation.algorithms()}


def test_the_candidates_are_the_forms_that_may_be_the_fastest(make_problem: Callable[..., Any]) -> None:
    ours, cublas = {"fused", "split", "precomputed"}, {"cublas_after", "cublas_before"}

    def of(*arguments: Any, **options: Any) -> tuple[set[str], set[str]]:
        p = make_problem(5, 520, 520, *arguments, **options)
        return names(Forward(p.x, p.W, p.bias, p.operands)), names(InputGradient(p.dy, p.W, None, p.operands))

    assert of(1, 16) == (ours | cublas, ours | cublas)
    # Masked on the device, one block costs cuBLAS no more than an update in vain.
    assert of(1, 16, host_known=False) == (ours | cublas, ours | cublas)
    # Tiles of dy that TMA brings must not reach over the end of a block, and 32 does not divide 520.
    assert of(3, 16, "some") == (ours | {"cublas_after"}, {"precomputed"} | cublas)
    assert of(3, 16, host_known=False) == (ours, {"precomputed"})
    assert of(1, 128) == ({"precomputed"} | cublas, {"precomputed"} | cublas)


def test_split_leaves_the_first_tile_of_columns_to_the_fused_kernel(
    make_problem: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    p = make_problem(40, 264, 328, 1, 8)
    filled = []
    monkeypatch.setattr(linear, "precomputed", lambda *_, out, begin, **__: filled.append(begin))
    for operation in (Forward(p.x, p.W, p.bias, p.operands), InputGradient(p.dy, p.W, None, p.operands)):
        split = next(algorithm for algorithm in operation.algorithms() if algorithm.name == "split")
        result = operation.compute(split)[0]
        assert filled.pop() == split.tiles[0].BN
        assert result[:, : split.tiles[0].BN].isfinite().all()
        assert result[:, split.tiles[0].BN :].isnan().all()


@pytest.mark.parametrize("host_known", [True, False], ids=["host-known", "device-known"])
def test_nothing_of_an_inactive_block_is_read(host_known: bool, make_problem: Callable[..., Any]) -> None:
    p = make_problem(197, 24, 16, 3, 8, "some", host_known=host_known)
    exact = p.computed_in(torch.float64)
    p.dy.view(197, 3, 16)[:, 1] = math.nan
    S, T = (exact[name].to(p.x) for name in "ST")
    if not host_known:
        S[:, 8:16], T[:, 8:16] = math.nan, math.nan
    assert skinny.products(p.dy, p.operands, forward=False).isfinite().all()
    operation = WeightGradients(p.x, p.dy, S, T, p.operands, Needs(True, True, True, True))
    for algorithm in operation.algorithms():
        if algorithm.name == "one_pass":
            assert all(t.isfinite().all() for t in operation.compute(algorithm)), algorithm


@pytest.mark.usefixtures("fenced")
@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
@pytest.mark.parametrize(("blocks", "packed"), [(3, 1), (4, 2)])
def test_a_gate_that_moved_since_the_host_counted_writes_and_reads_nothing_out_of_bounds(
    blocks: int, packed: int, make_problem: Callable[..., Any], assert_as_exact_as: Callable[..., None]
) -> None:
    p = make_problem(40, 48, 64, blocks, 8, "all")
    # What the host counted: the kernels give the columns to the first of the active blocks.
    p.active = list(range(packed))
    p.operands = p.operands._replace(active=p.active)
    for found in results(p).values():
        for algorithm, values in found:
            if not algorithm.name.startswith("cublas"):
                p.compare(assert_as_exact_as, values, str(algorithm))


@pytest.mark.parametrize("needs", list(itertools.product([True, False], repeat=3))[:-1], ids=str)
def test_only_the_weight_gradients_that_are_needed_are_computed(
    needs: tuple[bool, ...], make_problem: Callable[..., Any], assert_as_exact_as: Callable[..., None]
) -> None:
    p = make_problem(123, 40, 24, 3, 8, "some")
    exact = p.computed_in(torch.float64)
    S, T = (exact[name].to(p.x) for name in "ST")
    x, T = (p.x, T) if needs[0] else (None, None)
    operation = WeightGradients(x, p.dy, S, T, p.operands, Needs(False, *needs))
    for algorithm in by_name(operation.algorithms()):
        found = dict(zip(("dA", "dB", "dgate"), operation.compute(algorithm), strict=True))
        assert tuple(value is not None for value in found.values()) == needs
        p.compare(assert_as_exact_as, {name: t for name, t in found.items() if t is not None}, str(algorithm))


@pytest.mark.filterwarnings("ignore:invalid value encountered in matmul")
def test_two_runs_give_the_same_bits(make_problem: Callable[..., Any]) -> None:
    p = make_problem(197, 24, 32, 3, 16, "some", host_known=False)
    for first, second in zip(results(p).values(), results(p).values(), strict=True):
        for (algorithm, one), (_, two) in zip(first, second, strict=True):
            assert all(torch.equal(one[name], two[name]) for name in one), algorithm


def test_an_element_may_lie_beyond_2_to_the_31(
    make_problem: Callable[..., Any], assert_as_exact_as: Callable[..., None]
) -> None:
    # Three rows, 2^30 and a few elements apart: 4 GiB of addresses, of which three pages are touched.
    torch.utils.deterministic.fill_uninitialized_memory = False
    p = make_problem(3, 48, 40, 1, 8)
    for name in ("x", "dy"):
        near = getattr(p, name)
        memory = torch.empty(2 * (2**30 + 8) + 48, dtype=torch.float16, device=near.device)
        far = memory.as_strided(near.shape, (2**30 + 8, 1))
        far.copy_(near)
        setattr(p, name, far)
    for found in results(p).values():
        for algorithm, values in found:
            p.compare(assert_as_exact_as, values, str(algorithm))


@pytest.mark.gpu
def test_a_layer_of_more_than_2_to_the_31_elements_is_right_at_its_end(make_problem: Callable[..., Any]) -> None:
    M = 2**31 // 768 + 1000
    p = make_problem(2, 768, 768, 1, 16, dtype=torch.bfloat16)
    p.x = torch.randn(M, 768, dtype=torch.bfloat16, device=p.x.device)
    operation = Forward(p.x, p.W, p.bias, p.operands)
    end = Forward(p.x[-200:].clone(), p.W, p.bias, p.operands)
    for algorithm in by_name(operation.algorithms()):
        if not algorithm.name.startswith("cublas"):
            for whole, part in zip(operation.compute(algorithm), end.compute(algorithm), strict=True):
                assert torch.equal(whole[-200:], part), algorithm


@pytest.mark.parametrize("tiles", [1, 3, 12, 100, 263, 1000])
@pytest.mark.parametrize("M", [1, 63, 64, 65, 12608, 50432])
def test_splits_of_the_rows_bound_the_partial_sums_and_the_longest_program(M: int, tiles: int) -> None:
    steps = math.ceil(M / 64)
    splits = row_splits(steps, tiles, 264)
    assert 1 <= splits <= steps
    assert splits == 1 or splits * tiles <= 2 * 264
    # No other split of the rows has its slowest SM do less.
    slowest = math.ceil(splits * tiles / 264) * math.ceil(steps / splits)
    for other in range(1, max(1, min(steps, 2 * 264 // tiles)) + 1):
        assert slowest <= math.ceil(other * tiles / 264) * math.ceil(steps / other)


def test_the_interpreter_runs_several_splits_of_the_rows() -> None:
    # A tile of columns of x and one of dy on three SMs; on a GPU there are more.
    assert row_splits(math.ceil(197 / configs.weight_gradients(90, 32)[1].ROWS), 2, 6) == 3
