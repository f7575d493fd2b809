"""What the compiler says of the CUDA merge kernel: registers, occupancy, bytes. No GPU is needed, no time is measured;
predicted is the least that an H200's memory allows.

    python -m benchmarks.merge_kernel

Occupancy follows from registers, shared memory and threads per block by the limits of each architecture. Bytes are
those of merging all linears of a ViT-L/16 with one term each, by the kernel's own loops: W once in and once out from
device memory, and A and B from the L2 cache.
"""

from __future__ import annotations

import argparse
import os
import re
import shutil
import subprocess
import tempfile
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from benchmarks.ceilings import Ceilings, on_record
from benchmarks.record import write_result

ROOT = Path(__file__).parents[1]
DTYPES = {"0": "fp32", "1": "bf16", "2": "fp16"}
# Per multiprocessor: threads, bytes of shared memory, blocks; and bytes of shared memory that a block may have.
LIMITS = {
    "80": (2048, 164 * 1024, 32, 163 * 1024),
    "90": (2048, 228 * 1024, 32, 227 * 1024),
    "100": (2048, 228 * 1024, 32, 227 * 1024),
}
VIT_L = [(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096)] * 24
TILE_ROWS, TILE_COLS = 256, 128


def nvcc() -> str | None:
    """The compiler, by CUDA_HOME, the usual place, or PATH."""
    for home in (os.environ.get("CUDA_HOME"), "/usr/local/cuda"):
        if home and os.access(Path(home, "bin", "nvcc"), os.X_OK):
            return str(Path(home, "bin", "nvcc"))
    return shutil.which("nvcc")


def cuobjdump(compiler: str | None) -> str | None:
    """CUDA's cuobjdump, or the one inside Triton."""
    candidates = [Path(compiler).with_name("cuobjdump")] if compiler else []
    triton = find_spec("triton")
    if triton is not None and triton.origin:
        candidates.append(Path(triton.origin).parent / "backends/nvidia/bin/cuobjdump")
    return next((str(path) for path in candidates if path.exists()), None)


def knows(compiler: str | None, architecture: str) -> bool:
    """Whether this nvcc can compile for `architecture`."""
    listed = subprocess.run([str(compiler), "--list-gpu-arch"], capture_output=True, text=True).stdout
    return f"compute_{architecture}" in listed.split()


def shared_bytes(rank: int, tensor: bool) -> int:
    """Shared memory of a block whose whole panel of A fits, as `launch_of` in csrc/merge_kernel.cuh."""
    step = 64 if tensor else 32
    return 4 * (-(-rank // 8) * 8 * (TILE_COLS + 8) + 32 * (step + 8))


def resources(compiler: str | None, architecture: str, folder: Path) -> list[dict[str, Any]]:
    """Compile for `architecture` into `folder` and return one entry per kernel."""
    cubin = folder / f"sm_{architecture}.cubin"
    command = [str(compiler), "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v"]
    done = subprocess.run(
        [*command, str(ROOT / "csrc/merge_cuda.cu"), "-o", str(cubin)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    kernels = []
    for part in done.stderr.split("Compiling entry function")[1:]:
        name = re.search(r"Dtype(?:E|)(\d)ELb(\d)", part)
        numbers = [re.search(rf"(\d+) bytes {what}", part) for what in ("stack frame", "spill stores", "spill loads")]
        registers = re.search(r"Used (\d+) registers", part)
        assert name is not None
        assert registers is not None
        assert all(numbers)
        tensor = name[2] == "1"
        stack, stores, loads = (int(number[1]) for number in numbers if number is not None)
        threads, used = 256 if tensor else 128, int(registers[1])
        entry: dict[str, Any] = {
            "dtype": DTYPES[name[1]],
            "tensor_cores": tensor,
            "threads": threads,
            "registers": used,
            "stack_bytes": stack,
            "spill_bytes": stores + loads,
            "ranks": {},
        }
        for rank in (64, 128, 256) if tensor else (16, 32):
            entry["ranks"][str(rank)] = occupancy(architecture, used, threads, rank, tensor)
        # With the least shared memory: what the registers allow.
        least = occupancy(architecture, used, threads, 8, tensor)
        entry["blocks_per_multiprocessor"] = least["blocks_per_multiprocessor"]
        kernels.append(entry)
    return kernels


def occupancy(architecture: str, registers: int, threads: int, rank: int, tensor: bool) -> dict[str, Any]:
    """Blocks per multiprocessor and what limits them; registers are given out to a warp by 256."""
    most_threads, most_shared, most_blocks, most_per_block = LIMITS[architecture]
    shared = shared_bytes(rank, tensor)
    limits = {
        "registers": 65536 // (-(-registers * 32 // 256) * 256 * threads // 32),
        # One KiB per block is the system's.
        "shared memory": most_shared // (shared + 1024) if shared <= most_per_block else 0,
        "threads": most_threads // threads,
        "blocks": most_blocks,
    }
    blocks = min(limits.values())
    return {
        "shared_bytes": shared,
        "blocks_per_multiprocessor": blocks,
        "limited_by": min(limits, key=lambda name: limits[name]),
        "occupancy": blocks * threads / most_threads,
    }


def traffic(rank: int, size: int, factor_size: int = 4) -> dict[str, float]:
    """Bytes per call for a ViT-L, and multiply-adds, by the kernel's loops."""
    parameters = sum(n * k for n, k in VIT_L)
    # A once per tile of 256 rows; B once per tile of 128 columns.
    A = sum(-(-n // TILE_ROWS) * k * rank * factor_size for n, k in VIT_L)
    B = sum(-(-k // TILE_COLS) * n * rank * factor_size for n, k in VIT_L)
    return {
        "parameters": parameters,
        "device_memory_bytes": 2 * parameters * size,
        "l2_bytes_of_A_and_B": A + B,
        "multiply_adds": parameters * rank,
    }


def predicted(size: int, limits: Ceilings) -> float:
    """Seconds that device memory needs for a ViT-L in a dtype of `size` bytes; arithmetic may need more."""
    return traffic(0, size)["device_memory_bytes"] / limits.bytes_per_s


def main() -> None:
    """Compile for every architecture and write the JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.parse_args()
    compiler = nvcc()
    if compiler is None:
        raise SystemExit("there is no nvcc; set CUDA_HOME")
    version = subprocess.run([compiler, "--version"], capture_output=True, text=True).stdout.strip().splitlines()[-2]
    with tempfile.TemporaryDirectory() as folder:
        kernels = {f"sm_{a}": resources(compiler, a, Path(folder)) for a in ("80", "90", "100") if knows(compiler, a)}
    limits = on_record()
    payload = {
        "complete": True,
        "nvcc": version,
        "time": "not measured",
        "ceilings": limits._asdict(),
        "predicted_least_seconds": {"bf16": predicted(2, limits), "fp32": predicted(4, limits)},
        "kernels": kernels,
        "vit_l": {str(rank): {"bf16": traffic(rank, 2), "fp32": traffic(rank, 4)} for rank in (16, 32, 128)},
    }
    for architecture, entries in kernels.items():
        for entry in entries:
            ranks = "; ".join(f"r={r}: {o['occupancy']:.0%} ({o['limited_by']})" for r, o in entry["ranks"].items())
            print(
                f"{architecture:7} {entry['dtype']} tensor cores {entry['tensor_cores']!s:5} "
                f"{entry['registers']:4} registers, {entry['spill_bytes']} bytes spilled; occupancy {ranks}"
            )
    print(write_result("merge_kernel", "audit", payload))


if __name__ == "__main__":
    main()
