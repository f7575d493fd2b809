"""The compiled CUDA kernel: no spills, shared memory that fits, tensor cores and 16-byte accesses."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from benchmarks import merge_kernel

ROOT = Path(__file__).parents[2]
NVCC = merge_kernel.nvcc()

pytestmark = [
    pytest.mark.skipif(NVCC is None, reason="there is no nvcc; set CUDA_HOME"),
    pytest.mark.once,
]


@pytest.fixture(scope="module")
def resources(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[list[dict[str, Any]], Path]]:
    """Return `resources(architecture)`: what the compiler says of each kernel, and the folder of its cubin."""

    @functools.cache
    def compiled(architecture: str) -> tuple[list[dict[str, Any]], Path]:
        folder = tmp_path_factory.mktemp("cubins")
        return merge_kernel.resources(NVCC, architecture, folder), folder

    return compiled


@pytest.mark.parametrize("architecture", ["80", "90", "100"])
def test_every_kernel_compiles_without_spills_and_fits(architecture: str, resources: Any) -> None:
    if not merge_kernel.knows(NVCC, architecture):
        pytest.skip(f"this nvcc does not know sm_{architecture}")
    kernels, _ = resources(architecture)
    assert len(kernels) == 3
    for kernel in kernels:
        name = kernel["dtype"]
        assert kernel["stack_bytes"] == kernel["spill_bytes"] == 0, name
        for ranks in kernel["ranks"].values():
            assert ranks["64"]["blocks_per_multiprocessor"] >= 2, name
            assert ranks["128"]["blocks_per_multiprocessor"] >= 1, name
        # Six products and one, each for the 2 x 4 tiles of a warp; the one in bf16 and in fp16.
        assert kernel["hmma"] == (0 if name == "fp32" or not kernel["loops"] else 8 * (6 + 1 + 1)), name


def test_products_wait_for_nothing_but_shared_memory(resources: Any) -> None:
    if merge_kernel.cuobjdump(NVCC) is None:
        pytest.skip("neither CUDA nor Triton brings cuobjdump")
    for kernel in resources("90")[0]:
        for loop in kernel["loops"]:
            products = loop["HMMA"] or loop["FFMA"]
            # Beside the products: 32 sums and the reads of their factors, no moves between registers.
            assert not products or loop["instructions"] <= products + loop["LDS"] + (45 if loop["HMMA"] else 8)


def test_cuobjdump_agrees_with_ptxas_about_registers(resources: Any) -> None:
    cuobjdump = merge_kernel.cuobjdump(NVCC)
    if cuobjdump is None:
        pytest.skip("neither CUDA nor Triton brings cuobjdump")
    kernels, folder = resources("90")
    text = subprocess.run([cuobjdump, "-res-usage", folder / "sm_90.cubin"], capture_output=True, text=True).stdout
    found = sorted(int(number) for number in re.findall(r"REG:(\d+)", text))
    assert found == sorted(kernel["registers"] for kernel in kernels)
    assert set(re.findall(r"(?:STACK|LOCAL):(\d+)", text)) == {"0"}


def test_kernels_access_weights_by_16_bytes_and_use_tensor_cores_where_they_should(tmp_path: Path) -> None:
    ptx = tmp_path / "merge.ptx"
    command = [NVCC, "-std=c++17", "-O3", "-arch=sm_90", "-ptx", ROOT / "csrc/merge_cuda.cu", "-o", ptx]
    subprocess.run(command, check=True, capture_output=True)
    kernels = ptx.read_text().split(".entry ")[1:]
    assert len(kernels) == 3
    for kernel in kernels:
        tensor = "DtypeE0" not in kernel.split("(")[0]
        assert ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16" in kernel) == tensor
        assert ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16" in kernel) == tensor
        # W: 16 bytes at a time, read ahead and written once.
        assert "cp.async.cg.shared.global" in kernel
        assert re.search(r"st\.global\.cs\.v4\.[ubf]32", kernel)
        # No access leaves it to the hardware to find out which memory is meant.
        assert not re.findall(r"\b(?:ld|st)\.(?!global|shared|param)\S+", kernel)
        # Staged B is read by 16 bytes.
        assert re.search(r"ld\.shared\.v4\.[ubf]32", kernel)


def test_the_kernel_needs_no_torch_headers() -> None:
    assert shutil.which(str(NVCC)) or os.access(str(NVCC), os.X_OK)
    for source in ("merge.h", "merge_kernel.cuh", "merge_cuda.cu", "merge_plan.cpp", "merge_cpu.cpp", "vectors.h"):
        includes = re.findall(r"#include [<\"]([^>\"]+)", (ROOT / "csrc" / source).read_text())
        assert not [name for name in includes if name.startswith(("torch", "ATen", "c10", "pybind11"))]
