"""What the compiler says of the CUDA merge kernel: registers, occupancy, instructions, bytes. No GPU is needed, no time
is measured; predicted is the least that an H200 allows.

    python -m benchmarks.merge_kernel

Occupancy follows from registers, shared memory and threads per block by the limits of each architecture. Bytes are
those of merging all linears of a ViT-L/16 with one term each, by the kernel's own loops: W once in and once out from
device memory, and A and B from the L2 cache. Instructions are counted in the loops of the machine code: those of a
staging loop include every way to read a factor, so they are an upper limit.
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
from benchmarks.results import write_result

ROOT = Path(__file__).parents[1]
DTYPES = {"0": "fp32", "1": "bf16", "2": "fp16"}
# Per multiprocessor: threads, bytes of shared memory, blocks; and bytes of shared memory that a block may have.
LIMITS = {
    "80": (2048, 164 * 1024, 32, 163 * 1024),
    "90": (2048, 228 * 1024, 32, 227 * 1024),
    "100": (2048, 228 * 1024, 32, 227 * 1024),
}
VIT_L = [(3072, 1024), (1024, 1024), (4096, 1024), (1024, 4096)] * 24
TILE_ROWS, TILE_COLS, STEP, THREADS = 256, 128, 64, 256
# Multiprocessors of an H200, their clock and its dense tensor rate in bf16; mma.sync reaches about 62 % of that on
# Hopper (arXiv 2402.13499), the rest takes wgmma.
H200 = {"multiprocessors": 132, "hertz": 1.98e9, "tensor_flops": 0.62 * 989e12}
# Products of 16-bit parts: fp32 factors, and 16-bit factors of one dtype.
SPLIT, SINGLE = 6, 1
# Instructions of a thread for its 32 weights outside the loops, by hand: in, converted, added, rounded and out.
AROUND = 250


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


def shared_bytes(rank: int, dtype: str, parts: int) -> int:
    """Shared memory of a block in which all of A stays, as `fit` in csrc/merge_kernel.cuh."""
    slabs = -(-rank // 16) * parts
    if dtype == "fp32":
        return 4 * STEP * TILE_COLS + 32 * 4 * (STEP + 4) + 32 * TILE_COLS * slabs
    return 2 * STEP * TILE_COLS + 32 * 6 * STEP + 32 * TILE_COLS * slabs


def loops(dump: str, cubin: Path) -> dict[str, list[dict[str, Any]]]:
    """Instructions of the innermost loops of each kernel that stage factors or multiply, in the order of the code."""
    text = subprocess.run([dump, "-sass", str(cubin)], capture_output=True, text=True, check=True).stdout
    found: dict[str, list[dict[str, Any]]] = {}
    for part in text.split("Function : ")[1:]:
        code = re.findall(r"/\*([0-9a-f]{4,})\*/\s+(?:@!?U?P\d+ )?([A-Z0-9_.]+)([^;]*);", part)
        places = {int(address, 16): i for i, (address, _, _) in enumerate(code)}
        dtype = DTYPES[re.findall(r"DtypeE(\d)", part.split()[0])[0]]
        ends = []
        for i, (_, name, operands) in enumerate(code):
            to = re.search(r"0x([0-9a-f]+)", operands)
            if name == "BRA" and to and places.get(int(to[1], 16), i) < i:
                ends.append((places[int(to[1], 16)], i))
        inner = [(a, b) for a, b in ends if not any(a <= c and d < b for c, d in ends if (c, d) != (a, b))]
        found[dtype] = []
        for first, last in inner:
            names = [name for _, name, _ in code[first : last + 1]]
            counts = {
                kind: sum(name.split(".")[0] == kind for name in names) for kind in ("HMMA", "FFMA", "LDS", "STS")
            }
            if counts["HMMA"] or counts["FFMA"] >= 32 or counts["STS"]:
                found[dtype].append({"instructions": len(names), **counts})
    return found


def resources(compiler: str | None, architecture: str, folder: Path) -> list[dict[str, Any]]:
    """Compile for `architecture` into `folder` and return one entry per kernel."""
    cubin = folder / f"sm_{architecture}.cubin"
    command = [str(compiler), "-std=c++17", "-O3", f"-arch=sm_{architecture}", "-cubin", "-Xptxas", "-v"]
    done = subprocess.run(
        [*command, str(ROOT / "csrc/merge_cuda.cu"), "-o", str(cubin)], capture_output=True, text=True
    )
    if done.returncode:
        raise SystemExit(done.stderr)
    dump = cuobjdump(compiler)
    counted = loops(dump, cubin) if dump else {}
    kernels = []
    for part in done.stderr.split("Compiling entry function")[1:]:
        name = re.search(r"DtypeE(\d)", part)
        numbers = [re.search(rf"(\d+) bytes {what}", part) for what in ("stack frame", "spill stores", "spill loads")]
        registers = re.search(r"Used (\d+) registers", part)
        assert name is not None
        assert registers is not None
        assert all(numbers)
        dtype, used = DTYPES[name[1]], int(registers[1])
        stack, stores, loads = (int(number[1]) for number in numbers if number is not None)
        ways = {"fp32 factors": 2} if dtype == "fp32" else {"fp32 factors": 3, "16-bit factors": 1}
        kernels.append(
            {
                "dtype": dtype,
                "threads": THREADS,
                "registers": used,
                "stack_bytes": stack,
                "spill_bytes": stores + loads,
                "hmma": sum(loop["HMMA"] for loop in counted.get(dtype, [])),
                "loops": counted.get(dtype, []),
                "ranks": {
                    way: {str(r): occupancy(architecture, used, r, dtype, parts) for r in (16, 64, 128)}
                    for way, parts in ways.items()
                },
            }
        )
    return kernels


def occupancy(architecture: str, registers: int, rank: int, dtype: str, parts: int) -> dict[str, Any]:
    """Blocks per multiprocessor and what limits them; registers are given out to a warp by 256."""
    most_threads, most_shared, most_blocks, most_per_block = LIMITS[architecture]
    shared, threads = shared_bytes(rank, dtype, parts), THREADS
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
        # A segment (96 bytes), its first tile and a piece (72) for each weight.
        "table_bytes": (96 + 4 + 72) * len(VIT_L),
        "multiply_adds": parameters * rank,
    }


def predicted(size: int, limits: Ceilings) -> float:
    """Seconds that device memory needs for a ViT-L in a dtype of `size` bytes; arithmetic may need more."""
    return traffic(0, size)["device_memory_bytes"] / limits.bytes_per_s


def arithmetic(rank: int, products: int, entry: dict[str, Any], limits: Ceilings) -> dict[str, float]:
    """Shares of a copy that a ViT-L in bf16 takes of an H200's tensor cores and of its slots for instructions."""
    # The loops of each way follow one another: A, B, products.
    at = next(i for i, loop in enumerate(entry["loops"]) if loop["HMMA"] == 8 * products)
    stage_A, stage_B, multiply = entry["loops"][at - 2 : at + 1]
    chunks = -(-rank // 16)
    # A warp has 32 x 32 weights at a time; a pass of a staging loop makes four numbers.
    per_weight = {
        "products": chunks * multiply["instructions"] / 32,
        "staging": 4 * chunks * (stage_A["instructions"] / TILE_ROWS + stage_B["instructions"] / TILE_COLS),
        "around": AROUND / 32,
    }
    parameters, copy = traffic(0, 2)["parameters"], predicted(2, limits)
    slots = 128 * H200["multiprocessors"] * H200["hertz"]
    tensor = 2 * 16 * chunks * products * parameters / H200["tensor_flops"]
    return {
        **{f"instructions_per_weight_{name}": round(count, 2) for name, count in per_weight.items()},
        "issue_of_a_copy": round(sum(per_weight.values()) * parameters / slots / copy, 2),
        "tensor_of_a_copy": round(tensor / copy, 2),
    }


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
    payload: dict[str, Any] = {
        "complete": True,
        "nvcc": version,
        "time": "not measured",
        "ceilings": limits._asdict(),
        "predicted_least_seconds": {"bf16": predicted(2, limits), "fp32": predicted(4, limits)},
        "kernels": kernels,
        "h200": H200,
        "vit_l": {str(rank): {"bf16": traffic(rank, 2), "fp32": traffic(rank, 4)} for rank in (16, 64, 128)},
    }
    hopper = next((e for e in kernels.get("sm_90", []) if e["dtype"] == "bf16" and e["loops"]), None)
    if hopper:
        payload["vit_l_arithmetic"] = {
            f"rank {rank}, {name}": arithmetic(rank, products, hopper, limits)
            for rank in (16, 64, 128)
            for name, products in (("fp32 factors", SPLIT), ("16-bit factors", SINGLE))
        }
        for name, shares in payload["vit_l_arithmetic"].items():
            print(f"{name:24} issue {shares['issue_of_a_copy']}, tensor cores {shares['tensor_of_a_copy']} of a copy")
    for architecture, entries in kernels.items():
        for entry in entries:
            blocks = "; ".join(
                f"{way} r={r}: {o['occupancy']:.0%} ({o['limited_by']})"
                for way, ranks in entry["ranks"].items()
                for r, o in ranks.items()
            )
            print(
                f"{architecture:7} {entry['dtype']} {entry['registers']:4} registers, {entry['spill_bytes']} bytes "
                f"spilled, {entry['hmma']} HMMA; occupancy {blocks}"
            )
    print(write_result("merge_kernel", "audit", payload))


if __name__ == "__main__":
    main()
