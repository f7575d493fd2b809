"""Every configuration of the kernels beside the two GEMMs, compiled for three kinds of GPU without one."""

from __future__ import annotations

import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.slow

# Compiles what it reads as JSON lines and answers with the resources of each. In a process of its own, because the
# tests of this folder import interpreted kernels.
COMPILER = """
import json, os, re, subprocess, sys, tempfile
import triton, triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from slora.kernels import gate_probe, skinny, weight_gradients

cuobjdump = os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")
kernels = {"weight_gradients": weight_gradients._partial_sums, "reduce": weight_gradients._reduce, "S": skinny._S,
           "T": skinny._T, "gate_probe": gate_probe._probe, "gate_probe_table": gate_probe._probe_table,
           "sample_rows": gate_probe._sample_rows}
for line in sys.stdin:
    job = json.loads(line)
    kernel, constants, meta = kernels[job["kernel"]], job["constants"], job["meta"]
    for name in ("ROW_DTYPE", "LORA_DTYPE"):
        if name in constants:
            constants[name] = getattr(tl, constants[name])
    types = {name: "i32" for name in kernel.arg_names} | job["types"] | dict.fromkeys(constants, "constexpr")
    pointers = [n for n, t in types.items() if t.startswith("*")] + job["aligned"]
    aligned = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in pointers}
    source = ASTSource(kernel, types, constants, aligned)
    compiled = triton.compile(source, target=GPUTarget("cuda", job["part"], 32), options=meta)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        usage = subprocess.run([cuobjdump, "-res-usage", file.name], capture_output=True, text=True, check=True).stdout
    found = re.search(r"REG:(\\d+) STACK:(\\d+) SHARED:\\d+ LOCAL:(\\d+)", usage)
    ptx = compiled.asm["ptx"]
    print(json.dumps({
        "registers": int(found[1]), "stack": int(found[2]), "local": int(found[3]), "shared": compiled.metadata.shared,
        "mma": len(re.findall(r"\\smma\\.sync", ptx)), "wgmma": ptx.count("wgmma.mma_async"),
        "tcgen05": ptx.count("tcgen05.mma"), "bulk": ptx.count("cp.async.bulk.tensor"),
        "async": ptx.count("cp.async.c"),
    }), flush=True)
"""

PARTS = (80, 90, 100)
KINDS = {"16-bit": ("bf16", "ieee"), "tf32": ("fp32", "tf32"), "ieee": ("fp32", "ieee")}


def compile_all(jobs: dict[str, dict[str, Any]], folder: Path) -> dict[str, dict[str, int]]:
    """The resources of each job, compiled by one process."""
    script = folder / "compiler.py"
    script.write_text(COMPILER)
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    lines = "".join(json.dumps(job) + "\n" for job in jobs.values())
    run = subprocess.run([sys.executable, str(script)], input=lines, env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr[-3000:]
    return dict(zip(jobs, map(json.loads, run.stdout.splitlines()), strict=True))


def check(found: dict[str, dict[str, int]], jobs: dict[str, dict[str, Any]]) -> None:
    from slora.kernels import configs

    for name, used in found.items():
        job = jobs[name]
        assert used["stack"] == 0, f"{name} has a stack: {used}"
        assert used["local"] == 0, f"{name} spills: {used}"
        assert used["shared"] <= configs.SHARED_MEMORY[job["part"]], f"{name} needs too much shared memory: {used}"
        if job.get("tensor_cores"):
            # A tile of 16 or 32 rows is below what wgmma and tcgen05 take.
            own = {80: "mma", 90: "wgmma", 100: "tcgen05"}[job["part"]]
            assert used["mma"] + used[own] > 0, f"{name} does not use the tensor cores: {used}"
        if job.get("wide"):
            assert used["mma"] == 0, f"{name} uses the tensor cores of older GPUs: {used}"
        if job.get("bulk"):
            assert used["bulk"] > 0, f"{name} does not use the copy engine: {used}"
        elif job.get("pipelined"):
            assert used["async"] > 0, f"{name} does not copy ahead: {used}"


def weight_gradient_jobs(part: int, kind: str) -> dict[str, dict[str, Any]]:
    from slora.kernels import narrow_configs

    element, precision = KINDS[kind]
    jobs = {}
    # T is at least as wide as the S of a block.
    for low_A, low_B in ((16, 16), (32, 16), (64, 16), (64, 64), (128, 16), (128, 128)):
        for i, config in enumerate(narrow_configs.weight_gradients(part, kind, max(low_A, low_B))):
            for bulk in (True, False) if part >= 90 else (False,):
                for dropout in (False, True):
                    tile = f"tensordesc<{element}[{config.ROWS}, {config.TILE}]>" if bulk else f"*{element}"
                    meta = config.meta()
                    options = {name: meta.pop(name) for name in ("num_warps", "num_stages")}
                    rows = {} if bulk else {"x": tile, "dy": tile}
                    path = "bulk" if bulk else "pointers"
                    jobs[f"sm_{part} {kind} {low_A} {low_B} #{i} {path} dropout={dropout}"] = {
                        "kernel": "weight_gradients", "part": part, "meta": options, "bulk": bulk,
                        "tensor_cores": kind != "ieee", "wide": kind != "ieee" and part >= 90,
                        "types": {
                            "x": tile, "dy": tile, **rows, "S": f"*{element}", "T": f"*{element}", "gate": "*fp32",
                            "seed": "*i64", "partial_A": "*fp32", "partial_B": "*fp32", "threshold": "fp32",
                        },
                        "constants": {
                            **meta, "LOW_A": low_A, "LOW_B": low_B, "DROPOUT": dropout, "DESCRIPTORS": bulk,
                            "PRECISION": precision,
                        },
                        "aligned": ["K", "N", "n", "r", "stride_x", "stride_dy"],
                    }  # fmt: skip
    return jobs


def row_jobs(part: int, kind: str) -> dict[str, dict[str, Any]]:
    """S, T and the gate probe."""
    from slora.kernels import narrow_configs

    element, precision = KINDS[kind]
    jobs: dict[str, dict[str, Any]] = {}

    def add(
        name: str, kernel: str, config: narrow_configs.Rows, types: dict[str, str], aligned: list[str], **constants: Any
    ) -> None:
        meta = config.meta()
        options = {name: meta.pop(name) for name in ("num_warps", "num_stages")}
        jobs[f"sm_{part} {kind} {name}"] = {
            "kernel": kernel, "part": part, "meta": options, "types": types, "aligned": aligned,
            "tensor_cores": kind != "ieee", "pipelined": True,
            "constants": {**meta, "PRECISION": precision, **constants},
        }  # fmt: skip

    for lora in dict.fromkeys(("fp32", element)):
        for low in (16, 32, 64, 128):
            for rows in (8, 64, 128):
                config = narrow_configs.skinny(kind, rows, low)
                S = {
                    "x": f"*{element}",
                    "A": f"*{lora}",
                    "S": f"*{element}",
                    "room": f"*{element}",
                    "gate": "*fp32",
                    "seed": "*i64",
                    "threshold": "fp32",
                    "factor": "fp32",
                }
                T = {"dy": f"*{element}", "B": f"*{lora}", "T": f"*{element}", "gate": "*fp32", "threshold": "fp32"}
                aligned = ["K", "r", "stride_x"]
                for room, dropout in itertools.product((False, True), repeat=2):
                    name = f"S {lora} {low} {rows} {room=} {dropout=}"
                    add(name, "S", config, S, aligned, LOW=low, ROOM=room, DROPOUT=dropout)
                add(f"T {lora} {low} {rows}", "T", config, T, ["n", "r", "stride_dy"], LOW=low)
        for low in (16, 32, 64):
            for m in (512, 50432):
                config = narrow_configs.gate_probe(kind, m, low)
                types = {
                    "dy": f"*{element}", "x": f"*{element}", "A": f"*{lora}", "B": f"*{lora}", "gate": "*fp32",
                    "out": "*fp32", "threshold": "fp32", "scaling": "fp32", "word": "i32",
                }  # fmt: skip
                aligned = ["K", "n", "r", "stride_dy", "stride_x"]
                add(f"probe {lora} {low} {m}", "gate_probe", config, types, aligned, LOW=low)
    return jobs


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", PARTS)
def test_every_configuration_of_the_weight_gradients_fits_and_uses_the_tensor_cores(
    part: int, kind: str, tmp_path: Path
) -> None:
    jobs = weight_gradient_jobs(part, kind)
    check(compile_all(jobs, tmp_path), jobs)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("part", PARTS)
def test_every_configuration_of_S_T_and_the_gate_probe_fits_and_copies_ahead(
    part: int, kind: str, tmp_path: Path
) -> None:
    jobs = row_jobs(part, kind)
    check(compile_all(jobs, tmp_path), jobs)


@functools.cache
def _small_types(element: str) -> dict[str, dict[str, Any]]:
    return {
        "reduce": {
            "types": {
                "partial_A": "*fp32", "partial_B": "*fp32", "dA": "*fp32", "dB": "*fp32", "B": "*fp32", "dots": "*fp32",
                "gate": "*fp32", "threshold": "fp32", "scaling": "fp32",
            },
            "constants": {
                "NEED_A": True, "NEED_B": True, "NEED_GATE": True, "TILE": 128, "LOW_A": 64, "LOW_B": 16, "WIDE": 32,
                "NARROW": 16,
            },
            "meta": {"num_warps": 2},
        },
        "sample_rows": {
            "types": {"x": f"*{element}", "out": f"*{element}", "word": "i32"},
            "constants": {"BM": 8, "BK": 256},
            "meta": {"num_warps": 2},
        },
        "gate_probe_table": {
            "types": {"table": "*i64", "factors": "*fp32", "out": "*fp32"},
            "constants": {
                "LAYERS": 64, "ROW_DTYPE": {"bf16": "bfloat16", "fp32": "float32"}[element], "LORA_DTYPE": "float32",
                "PRECISION": "ieee", "BM": 16, "BK": 128 if element == "bf16" else 16, "LOW": 16,
            },
            "meta": {"num_warps": 4 if element == "bf16" else 8, "num_stages": 3 if element == "bf16" else 1},
        },
    }  # fmt: skip


@pytest.mark.parametrize("part", PARTS)
def test_the_reduction_the_copy_of_rows_and_the_table_of_layers_compile(part: int, tmp_path: Path) -> None:
    jobs = {
        f"sm_{part} {element} {kernel}": {"kernel": kernel, "part": part, "aligned": [], **job}
        for element in ("bf16", "fp32")
        for kernel, job in _small_types(element).items()
    }
    check(compile_all(jobs, tmp_path), jobs)
