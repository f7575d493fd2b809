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
KERNELS = {(dtype, warps) for dtype in DTYPES for warps in (4, 8)}
# Bytes of shared memory per SM.
SHARED_MEMORY = {80: 164 * 1024, 90: 228 * 1024, 100: 228 * 1024}


def tool(name: str) -> str | None:
    """A program of the CUDA toolkit, by CUDA_HOME, the usual place, Triton, or PATH."""
    triton = find_spec("triton")
    inside = Path(triton.origin).parent / "backends/nvidia/bin" if triton and triton.origin else ""
    home = os.environ.get("CUDA_HOME", "/usr/local/cuda")
    folders = [f"{home}/bin", "/usr/local/cuda/bin", os.environ.get("PATH", "")]
    return shutil.which(name, path=os.pathsep.join([*folders, str(inside)]))


Kernel = tuple[str, int]  # dtype of the weights, warps of a block

NVCC, CUOBJDUMP = tool("nvcc"), tool("cuobjdump")
pytestmark = [pytest.mark.skipif(NVCC is None, reason="there is no nvcc; set CUDA_HOME"), pytest.mark.once]


@functools.cache
def compiled(arch: int) -> tuple[dict[Kernel, str], dict[Kernel, list[tuple[str, str, str]]]]:
    """What ptxas says of each kernel, and its machine code: address, name, operands."""
    known = subprocess.run([NVCC, "--list-gpu-arch"], capture_output=True, text=True).stdout.split()
    if f"compute_{arch}" not in known:
        pytest.skip(f"this nvcc does not know sm_{arch}")
    with tempfile.TemporaryDirectory() as folder:
        cubin, source = Path(folder, "merge.cubin"), ROOT / "csrc/merge_cuda.cu"
        command = [NVCC, "-std=c++17", "-O3", f"-arch=sm_{arch}", "-cubin", "-Xptxas", "-v", source]
        done = subprocess.run([*command, "-o", cubin], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        said = by_kernel(done.stderr.split("Compiling entry function")[1:])
        if CUOBJDUMP is None:
            return said, {}
        dump = subprocess.run([CUOBJDUMP, "-sass", cubin], capture_output=True, text=True, check=True).stdout
    instruction = re.compile(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)([^;]*);")
    return said, {name: instruction.findall(part) for name, part in by_kernel(dump.split("Function : ")[1:]).items()}


def by_kernel(parts: list[str]) -> dict[Kernel, str]:
    """Texts that begin with the mangled name of a kernel."""
    names = [re.findall(r"DtypeE(\d)ELi(\d)E", part)[0] for part in parts]
    return {(DTYPES[int(dtype)], int(warps)): part for (dtype, warps), part in zip(names, parts, strict=True)}


@pytest.mark.parametrize("arch", SHARED_MEMORY)
def test_every_kernel_compiles_without_spills_and_shares_an_sm(arch: int) -> None:
    said, code = compiled(arch)
    assert set(said) == KERNELS
    for (dtype, warps), text in said.items():
        assert "0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads" in text
        # Registers are given out to a warp by 256; 16 warps share an SM.
        registers = int(re.findall(r"Used (\d+) registers", text)[0])
        assert 16 * -(-registers * 32 // 256) * 256 <= 65536, (dtype, warps)
        # As csrc/merge_kernel.cuh, with fp32 factors: 32 KiB of W, fp32 also 16 ranks of B, and all of A.
        B, parts = (warps * 32 * 16 * 4, 2) if dtype == "fp32" else (0, 3)
        for rank, blocks in {4: {16: 4}, 8: {16: 2, 64: 2, 128: 1}}[warps].items():
            shared = 32 * 1024 + B + parts * rank // 16 * (32 * 128 + 64)
            # One KiB per block is the system's. Four blocks of an A100 do not hold that much: it has eight warps then.
            if (arch, warps) != (80, 4):
                assert blocks * (shared + 1024) <= SHARED_MEMORY[arch], (dtype, warps, rank)
    for (dtype, warps), instructions in code.items():
        products = sum(name.startswith("HMMA") for _, name, _ in instructions)
        # Six products and one, each for the 8 tiles of a unit; the one in bf16 and in fp16.
        assert products == (0 if dtype == "fp32" else 8 * (6 + 1 + 1)), (dtype, warps)


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
    for (dtype, warps), code in compiled(90)[1].items():
        if dtype == "fp32":
            (names,) = [names for names in loops(code) if names.count("FFMA") >= 32]
            assert len(names) <= names.count("FFMA") + names.count("LDS") + 8, warps
        else:
            # Three times 16 ranks of a unit: split, both factors in bf16, both in fp16.
            names = [name.split(".")[0] for _, name, _ in code]
            places = [i for i, name in enumerate(names) if name == "HMMA"]
            for first, last in ((0, 47), (48, 55), (56, 63)):
                stretch = names[places[first] : places[last] + 1]
                assert len(stretch) <= (last - first + 1) + stretch.count("LDS") + 32 + 8, (dtype, warps)
                assert not {"BRA", "BAR", "LDG"} & set(stretch), (dtype, warps)


def test_kernels_access_weights_by_16_bytes_and_use_tensor_cores_where_they_should(tmp_path: Path) -> None:
    ptx = tmp_path / "merge.ptx"
    command = [NVCC, "-std=c++17", "-O3", "-arch=sm_90", "-ptx", ROOT / "csrc/merge_cuda.cu", "-o", ptx]
    subprocess.run(command, check=True, capture_output=True)
    kernels = ptx.read_text().split(".entry ")[1:]
    assert len(kernels) == len(KERNELS)
    for kernel in kernels:
        tensor = "DtypeE0" not in kernel.split("(")[0]
        assert ("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16" in kernel) == tensor
        assert ("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16" in kernel) == tensor
        # W: 16 bytes at a time, read ahead and written once.
        assert "cp.async.cg.shared.global.L2::256B" in kernel
        assert re.search(r"st\.global\.cs\.v4\.[ubf]32", kernel)
        # No access leaves it to the hardware to find out which memory is meant.
        assert not re.findall(r"\b(?:ld|st)\.(?!global|shared|param)\S+", kernel)
        # Staged A is read by 16 bytes.
        assert re.search(r"ld\.shared\.v4\.[ubf]32", kernel)


def test_the_kernel_needs_no_torch_headers() -> None:
    assert shutil.which(str(NVCC)) or os.access(str(NVCC), os.X_OK)
    for source in ("merge.h", "merge_kernel.cuh", "merge_cuda.cu", "merge_plan.cpp", "merge_cpu.cpp", "vectors.h"):
        includes = re.findall(r"#include [<\"]([^>\"]+)", (ROOT / "csrc" / source).read_text())
        assert not [name for name in includes if name.startswith(("torch", "ATen", "c10", "pybind11"))]
