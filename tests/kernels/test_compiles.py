"""Every configuration of every kernel, compiled for three kinds of GPU without one."""

from __future__ import annotations

import dataclasses
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.audit import GEMMS
from benchmarks.compiled import Report, Variant, faults
from benchmarks.narrow_variants import PRECISIONS, narrow_variants
from benchmarks.variants import gemm_variant, gemm_variants
from slora.kernels import configs

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize("part", configs.PARTS)
def test_every_configuration_compiles_to_code_that_can_be_fast(part: int, tmp_path: Path) -> None:
    """By the audit in the tree: it has every configuration, without a fault, and one in six comes out the same again.

    What it lacks, as after a change of a kernel, is compiled here. In a process of its own: here kernels may be the
    interpreter's.
    """
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["TRITON_CACHE_DIR"] = str(tmp_path)
    command = [sys.executable, "-m", "benchmarks.audit", "--check", "--parts", str(part)]
    run = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert (run.returncode, run.stdout) == (0, ""), run.stderr[-3000:]


def test_the_variants_are_all_kernels_in_all_precisions() -> None:
    for part in configs.PARTS:
        for kernel in GEMMS:
            found = [variant.label for variant in gemm_variants(kernel, part)]
            cases = [row for row in configs.GEMM if row.part == part and kernel in row.kernels]
            least = sum(len(row.candidates) * len(row.ranks) for row in cases if row.forms != ("given, dropout",))
            assert len(set(found)) == len(found) >= least
        for precision in PRECISIONS:
            without_products = {"_reduce", "_sample_rows"} if precision == "ieee" else set()
            names = {variant.kernel.fn.__name__ for variant in narrow_variants(part, [precision])}
            assert names == without_products | {"_partial_sums", "_S", "_T", "_probe", "_probe_table"}


@pytest.mark.parametrize("r", [1, 16, 17, 64, 65, 256])
@pytest.mark.parametrize("given", [False, True])
@pytest.mark.parametrize("dropout", [False, True])
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_every_call_finds_its_configurations(kernel: configs.Kernel, dropout: bool, given: bool, r: int) -> None:
    if r > configs.MAX_FUSED_RANK and not given:
        pytest.skip("such a rank needs S or T to be given")
    for part, access, precision in (
        (80, "vectors", "16-bit"), (80, "vectors", "tf32"), (80, "elements", "16-bit"), (80, "elements", "tf32"),
        (80, "elements", "ieee"),
        (90, "bulk", "16-bit"), (90, "bulk", "tf32"), (90, "elements", "16-bit"), (90, "elements", "ieee"),
        (100, "bulk", "16-bit"), (100, "bulk", "tf32"), (100, "elements", "16-bit"), (100, "elements", "ieee"),
    ):  # fmt: skip
        choice = configs.gemm(kernel, part, access, precision, r, 768, given, dropout)
        assert choice.candidates
        assert given or r <= choice.R


def test_tiles_that_would_compute_in_vain_come_last() -> None:
    def first(width: int) -> int:
        return configs.gemm("forward", 90, "bulk", "16-bit", 16, width).candidates[0].BN

    assert first(768) == 256
    assert first(384) == 128


GOOD = Report(
    kernel="linear_forward", part=90, label="", registers=168, stack=0, spilled=0, shared=200 * 1024, tensor_memory=0,
    warps=8, occupancy=1, products={"wgmma": 9, "tcgen05": 0, "mma.sync": 0, "fma": 0}, bulk_loads=("A", "W", "x"),
    bulk_stores=1, async_copies=4, serialized=False, seconds=1.0,
)  # fmt: skip
FAULTS: dict[str, dict[str, Any]] = {
    "16 bytes of stack": {"stack": 16},
    "8 bytes spilled": {"spilled": 8},
    "bytes of shared memory; sm_90 has": {"shared": 228 * 1024},
    "columns of tensor memory": {"tensor_memory": 640},
    "serializes": {"serialized": True},
    "meant to share a multiprocessor": {"occupancy": 0},
    "expected wgmma alone": {"products": {"wgmma": 9, "tcgen05": 0, "mma.sync": 0, "fma": 1}},
    "asynchronous copies": {"async_copies": 0},
    "does not bring A": {"bulk_loads": ("W", "x")},
    "does not take its results away": {"bulk_stores": 0},
}


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_of_a_compiled_kernel_is_found(fault: str) -> None:
    variant = Variant(
        None, 90, "", {}, {}, {"num_warps": 8}, copies_ahead=True, described=("x", "W", "A"), stores_described=True
    )
    limit = configs.SHARED_MEMORY[90]
    assert faults(variant, GOOD, limit) == []
    (found,) = faults(variant, dataclasses.replace(GOOD, **FAULTS[fault]), limit)
    assert fault in found


def test_products_whose_operand_is_changed_in_registers_may_wait() -> None:
    variant = Variant(None, 90, "", {}, {}, {"num_warps": 8}, in_registers=True)
    assert faults(variant, dataclasses.replace(GOOD, serialized=True), configs.SHARED_MEMORY[90]) == []


@pytest.mark.parametrize("part", configs.PARTS)
@pytest.mark.parametrize("kernel", ["forward", "backward"])
def test_what_a_call_may_get_is_what_is_compiled(kernel: configs.Kernel, part: int) -> None:
    compiled = {variant.label for variant in gemm_variants(kernel, part)}
    cases = {(row.access, row.precision, form) for row in configs.GEMM if row.part == part for form in row.forms}
    for access, precision, form in cases:
        if form == "given, dropout" and kernel == "forward":
            continue
        for r in (1, 4, 5, 16, 20, 30, 32, 33, 64):
            given, dropout = form.startswith("given"), "dropout" in form
            choice = configs.gemm(kernel, part, access, precision, r, 768, given, dropout)
            assert choice.unit == (4 if r % 4 == 0 else 1)
            for tile in choice.candidates:
                # Code for any rank asks for more registers than code for multiples of 4.
                labels = {
                    gemm_variant(kernel, part, access, precision, form, choice.R, tile, False, unit).label
                    for unit in (1, choice.unit)
                }
                assert labels & compiled, labels


def test_ranks_that_are_no_multiples_of_4_keep_to_what_fits_with_them() -> None:
    common, odd = (configs.gemm("forward", 90, "bulk", "16-bit", r, 768).candidates for r in (8, 7))
    assert common[0].BN == 256
    assert odd
    assert all(tile.BN <= 128 for tile in odd)
