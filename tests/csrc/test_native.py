"""The native checks under sanitizers: plan, CPU executor, and the CUDA kernel run thread by thread on the host."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
COMPILER = os.environ.get("CXX", "c++").split()
SANITIZE = ["-g1", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]

pytestmark = pytest.mark.skipif(shutil.which(COMPILER[0]) is None, reason="there is no C++ compiler")


def built(check: str, folder: Path, *flags: str) -> Path:
    """A check with the sources of csrc that it calls: both have the plan, that of the CPU executor has that, too."""
    sources = [ROOT / "tests/csrc" / f"{check}.cpp", ROOT / "csrc/merge_plan.cpp"]
    if check == "check_cpu":
        sources.append(ROOT / "csrc/merge_cpu.cpp")
    program = folder / check
    command = [*COMPILER, "-std=c++17", "-pthread", "-Wall", "-Wextra", "-Wno-unknown-pragmas", *flags]
    done = subprocess.run([*command, *map(str, sources), "-o", str(program)], capture_output=True, text=True)
    if "cannot find -lasan" in done.stderr or "cannot find -lubsan" in done.stderr:
        pytest.skip("the compiler has no sanitizer libraries")
    assert done.returncode == 0, done.stderr
    assert "warning" not in done.stderr, done.stderr
    return program


def run(program: Path, cases: int, seed: int) -> str:
    done = subprocess.run([program, str(cases), str(seed)], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.mark.once
def test_plan_and_cpu_executor_are_clean_and_exact_on_every_instruction_set(tmp_path: Path) -> None:
    # Without -O2 the compiler contracts no product and sum to a fused one.
    assert "100 cases" in run(built("check_cpu", tmp_path, "-O2", *SANITIZE), 100, 0)


@pytest.mark.once
def test_cpu_executor_keeps_its_bits_as_it_is_built_for_use(tmp_path: Path) -> None:
    run(built("check_cpu", tmp_path, "-O3"), 100, 1000)


@pytest.mark.once
def test_cuda_kernel_is_right_and_reaches_every_barrier_on_the_host(tmp_path: Path) -> None:
    # As nvcc: numbers of one type may be read as those of another. With -O2 it compiles for longer than it runs.
    # Case 35 is the first of a large weight whose A does not fit into shared memory.
    run(built("check_kernel", tmp_path, "-O1", "-fno-strict-aliasing", *SANITIZE), 42, 0)
