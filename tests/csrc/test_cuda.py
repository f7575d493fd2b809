"""The compiled CUDA kernel, without a GPU: no spills, blocks that fit on an SM, tensor cores, 16-byte accesses."""

from __future__ import annotations

import functools
import os
import re
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DTYPES = ("fp32", "bf16", "fp16")
# Bytes of shared memory per SM.
SHARED_MEMORY = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit, by CUDA_HOME, the usual place, Triton, or PATH."""
    triton = find_spec("triton")
    inside = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else ""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    folders = [f"{home}/bin", "/usr/local/cuda/bin", os.environ.get("PATH", "")]
    return shutil.which(name, path=os.pathsep.join([*folders, str(inside)]))


NVCC, CUOBJDUMP = tool("nvcc"), tool("cuobjdump")
pytestmark = [pytest.mark.skipif(NVCC is None, reason="there is no nvcc; set CUDA_HOME"), pytest.mark.once]


@functools.cache
def compiled(arch: int) -> tuple[dict[str, str], dict[str, list[tuple[str, str, str]]]]:
    """What ptxas says of the kernel for each dtype of the weights, and its machine code: address, name, operands."""
    known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    if f"compute_{arch}" not in known:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    with tempfile.TemporaryDirectory() as folder:
        cubin, source = Path(folder, "merge.cubin"), ROOT / "csrc/merge_cuda.cu"
        command = [NVCC, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", source]
        done = subprocess.run([*command, "-o", cubin], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said = by_dtype(done.stderr.split("Compiling entry function")[1:])
        if CUOBJDUMP is None:
            return said, {}
        dump = subprocess.run([CUOBJDUMP, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    instruction = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)([^;]*);")
    return said, {name: instruction.findall(part) for name, part in by_dtype(dump.split("Function : ")[1:]).items()}


def by_dtype(parts: list[str]) -> dict[str, str]:
    """Texts that begin with the mangled name of a kernel."""
    return {DTYPES[int(re.findall(r"DtypeE(\d)", part)[0])]: part for part in parts}


@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_every_kernel_compiles_without_spills_and_shares_an_sm(arch: int) -> None:
    said, code = compiled(arch)
    assert set(said) == set(DTYPES)
    for dtype, text in said.items():
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in text
        registers = int(re.findall(r"Used (\d+) registers", text)[0])
        for rank, wanted in ((64, 2), (128, 1)):
            # As csrc/merge_kernel.cuh, with fp32 factors: 64 rows of W, 32 ranks of B, and all of A.
            size, B, parts = (4, 4 * (64 + 4), 2) if dtype == "fp32" else (2, 6 * 64, 3)
            shared = size * 64 * 128 + 32 * B + 32 * 128 * parts * rank // 16
            # One KiB per block is the system's; registers are given out to a warp by 256.
            assert wanted * (shared + 1024) <= SHARED_MEMORY[arch], dtype
            assert wanted * 8 * -(-registers * 32 // 256) * 256 <= 65536, dtype
    for dtype, instructions in code.items():
        products = sum(name.startswith("HMMA") for _, name, _ in instructions)
        # Six products and one, each for the 2 x 4 tiles of a warp; the one in bf16 and in fp16.
        assert products == (0 if dtype == "fp32" else 8 * (6 + 1 + 1)), dtype


def loops(code: list[tuple[str, str, str]]) -> list[list[str]]:
    """The instructions of the innermost loops, by name."""
    places = {int(address, 16): i for i, (address, _, _) in enumerate(code)}
    ends = []
    for i, (_, name, operands) in enumerate(code):
        to = re.search(r"0x([0-9a-f]+)", operands)
        if name == "BRA" and to and places.get(int(to[1], 16), i) < i:
            ends.append((places[int(to[1], 16)], i))
    inner = [(a, b) for a, b in ends if not any(a <= c and d < b for c, d in ends if (c, d) != (a, b))]
    return [[name.split(".")[0] for _, name, _ in code[first : last + 1]] for first, last in inner]


@pytest.mark.skipif(CUOBJDUMP is None, reason="neither CUDA nor Triton brings cuobjdump")
def test_products_wait_for_nothing_but_shared_memory() -> None:
    multiplying = 0
    for code in compiled(90)[1].values():
        for names in loops(code):
            products = names.count("HMMA") or names.count("FFMA")
            # Beside the products: 32 sums and the reads of their factors, no moves between registers.
            if products >= 32 or "HMMA" in names:
                multiplying += 1
                assert len(names) <= products + names.count("LDS") + (45 if "HMMA" in names else 8)
    assert multiplying == 2 * 3 + 1


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
