"""Every candidate of every kernel, compiled for three archs without a GPU: the audit in the tree, a sample again."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks import audit
from benchmarks.audit import Report, mismatches
from benchmarks.compile_cases import CompileCase
from slora.kernels import configs

ROOT = Path(__file__).parents[2]

# In a process of its own: here kernels may be the interpreter's.
NAMES = """
import json
from benchmarks.audit import name
from benchmarks.compile_cases import compile_cases
from slora.kernels import configs
print(json.dumps([name(case) for arch in configs.ARCHS for case in compile_cases(arch)]))
"""


def run(*command: str, cache: Path | None = None) -> str:
    """What a process prints that compiles."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache)} if cache else {}
    done = subprocess.run([sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-1000:] + done.stderr[-3000:]
    return done.stdout


def test_the_audit_in_the_tree_is_of_the_kernels_in_the_tree() -> None:
    head, rows = audit.committed()
    assert head["source"] == audit.source_hash(), "the kernels changed: run python -m benchmarks.audit"
    names = [tuple(name) for name in json.loads(run("-c", NAMES))]
    assert len(set(names)) == len(names)
    assert names == [(row["arch"], row["kernel"], row["case"]) for row in rows]
    assert audit.PATH.stat().st_size < 16_000


SAMPLE = [
    "fused_linear, dx, R=32, 128x256x64",
    "precomputed_linear, dx, any rank, 128x128x32",
    "partial_sums, 64 columns",
]


@pytest.mark.once
def test_what_is_compiled_again_comes_out_as_the_audit_has_it(tmp_path: Path) -> None:
    head, rows = audit.committed()
    import triton

    printed = run("-m", "benchmarks.audit", "--only", *(f"sm_90, {name}" for name in SAMPLE), cache=tmp_path)
    if head["triton"] != triton.__version__:
        pytest.skip("another Triton makes other code; it compiled without an error")
    for name, line in zip(SAMPLE, printed.splitlines(), strict=True):
        (row,) = (r for r in rows if r["arch"] == "sm_90" and f"{r['kernel']}, {r['case']}".startswith(name))
        assert line == ", ".join(row.values())


@pytest.mark.parametrize("variant", ["fused", "precomputed", "masked"])
@pytest.mark.parametrize("arch", configs.ARCHS)
def test_every_call_finds_its_candidates_and_they_fit_into_shared_memory(arch: int, variant: configs.Variant) -> None:
    low = variant == "fused"
    for R in configs.RANKS[:3] if low else (*configs.RANKS, configs.ANY_WIDTH):
        tiles = configs.gemm(arch, variant, R)
        assert 1 <= len(set(tiles)) == len(tiles) <= 6
        # The GPUs that are measured first have a choice.
        assert len(tiles) > 1 or arch != 90 or R == configs.ANY_WIDTH
        for tile in tiles:
            steps = 2 * tile.num_stages * tile.BK * (tile.BM + tile.BN + R * low)
            store = 2 * tile.BM * tile.store_width if arch >= 90 else 0
            # What there is beyond: factors in the epilogue, barriers.
            assert tile.programs * (steps + store) <= (0.95 if low else 0.99) * configs.SHARED_MEMORY[arch]


GOOD = Report(
    registers=168, spilled=0, shared=200 * 1024, occupancy=1, stores=True, copies=True, overlapped=True,
    serialized=False,
    products={"wgmma": 9, "tcgen05": 0, "mma.sync": 0, "fma": 0}, loads=("A", "W", "x"),
)  # fmt: skip
MISMATCHES: dict[str, dict[str, Any]] = {
    "8 bytes of stack and spills": {"spilled": 8},
    "bytes of shared memory; sm_90 has": {"shared": 228 * 1024},
    "serializes": {"serialized": True},
    "waits for its own wgmma": {"overlapped": False},
    "meant to share an SM": {"occupancy": 0},
    "expected wgmma alone": {"products": {"wgmma": 9, "tcgen05": 0, "mma.sync": 0, "fma": 1}},
    "asynchronous copies": {"copies": False},
    "does not bring A": {"loads": ("W", "x")},
    "does not take its results away": {"stores": False},
}


@pytest.mark.parametrize("mismatch", MISMATCHES)
def test_each_mismatch_of_a_compiled_kernel_is_found(mismatch: str) -> None:
    described = dict.fromkeys(("x", "W", "A", "out"), "tensordesc<bf16[128, 64]>")
    types = {} if mismatch == "asynchronous copies" else described
    case = CompileCase(None, 90, "", types, {}, {"num_warps": 8}, frozenset({"wgmma"}))
    assert mismatches(case, GOOD) == []
    (found,) = mismatches(case, GOOD._replace(**MISMATCHES[mismatch]))
    assert mismatch in found
