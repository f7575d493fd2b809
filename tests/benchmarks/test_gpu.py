"""The proof on a GPU, as far as it runs without one: every part by itself, and all of them in a dry run."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bars, gpu
from benchmarks.proof import parts, process
from benchmarks.record import BenchmarkError, read_result

# Each of these tools is replaced by a program that finds the Python in its arguments and runs that.
FAKE = """#!/bin/sh
while [ "${1##*python*}" ]; do shift; done
"$@" || exit
"""
NCU_SAYS = '''"ID","Kernel Name","Grid Size","Block Size","gpu__time_duration.sum","launch__registers_per_thread"
"","","","","us","register/thread"
"0","_kernel","(132, 1, 1)","(256, 1, 1)","212.50","168"'''


@pytest.fixture
def proof(tmp_path: Path) -> process.Proof:
    environ = {**process.environ_of(True, tmp_path / "scratch"), "SLORA_COMMIT": "0123456789ab"}
    return process.Proof(tmp_path, True, False, time.monotonic() + 100, environ)


def test_a_command_is_cut_at_its_limit_with_all_it_has_started(proof: process.Proof) -> None:
    child = "import subprocess, sys; print('here', flush=True); subprocess.run(['sleep', '60'])"
    start = time.monotonic()
    code, text = proof.call([sys.executable, "-c", child], 2.0)
    assert code is None
    assert time.monotonic() - start < 20
    assert "here" in text
    assert process.state_of(code, text) == {"state": "cut", "exit_code": None, "last_lines": ["here"]}
    assert "here" in (proof.out / "gpu.log").read_text()


def test_a_proof_that_is_terminated_ends_what_it_runs_and_keeps_what_it_has(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "benchmarks", "gpu", "--dry-run", "--out", str(tmp_path), "--parts", "linear"]
    with subprocess.Popen(command, cwd=process.ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        assert "linear: at most" in run.stdout.readline()
        time.sleep(1.0)
        run.terminate()
        assert "what was measured so far is kept" in run.communicate(timeout=60)[1]
    assert run.returncode == 2
    assert read_result(tmp_path / "proof.json")["parts"] == {}
    running = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert str(tmp_path) not in running


def test_a_failing_part_is_recorded_and_the_next_one_runs(
    proof: process.Proof, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(proof: process.Proof, limit: float) -> dict[str, Any]:
        raise ValueError("of all things")

    gpu.run_part(proof, gpu.Part("first", raises, 1, 1), 10.0)
    gpu.run_part(proof, gpu.Part("second", lambda proof, limit: {"state": "ok"}, 1, 1), 10.0)
    gpu.run_part(proof, gpu.Part("third", raises, 1, 1), 0.0)
    written = json.loads((proof.out / "proof.json").read_text())["parts"]
    assert {name: part["state"] for name, part in written.items()} == {
        "first": "failed", "second": "ok", "third": "skipped",
    }  # fmt: skip
    assert written["first"]["reason"] == "ValueError: of all things"


def test_tests_are_counted_whether_they_ran_in_one_process_or_in_several() -> None:
    one = (
        "tests/a.py::test_x PASSED [ 10%]\ntests/a.py::test_y[1-a b] FAILED [ 20%]\n"
        "tests/a.py::test_z SKIPPED (no GPU)\n"
    )
    several = "[gw0] [ 10%] PASSED tests/a.py::test_x \n[gw1] [ 20%] FAILED tests/a.py::test_y[1-a b] \n"
    for text in (one, several):
        assert parts.outcomes(text, "PASSED") == ["tests/a.py::test_x"]
        assert parts.outcomes(text, "FAILED") == ["tests/a.py::test_y[1-a b]"]
    assert parts.outcomes(one, "SKIPPED") == ["tests/a.py::test_z"]


def test_what_the_profiler_prints_is_read() -> None:
    assert parts.profiled(f"==PROF== Connected\n{NCU_SAYS}\n") == [
        {
            "kernel": "_kernel", "grid": "(132, 1, 1)", "block": "(256, 1, 1)", "duration": "212.50 us",
            "registers": "168 register/thread",
        }
    ]  # fmt: skip
    assert parts.profiled("==ERROR== no permission") == []


def test_a_tool_that_is_missing_is_a_part_skipped(proof: process.Proof, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "found", lambda tool: None)
    assert parts.sanitizer(proof, 10.0)["reason"] == "compute-sanitizer was not found"
    assert parts.profile(proof, 10.0)["state"] == "skipped"


def test_shares_make_nine_minutes_and_the_quick_proof_ninety_seconds() -> None:
    assert sum(part.seconds for part in gpu.PARTS) <= gpu.SECONDS + 1
    assert sum(part.quick for part in gpu.PARTS) <= gpu.QUICK_SECONDS + 1
    assert gpu.SECONDS <= 540
    assert gpu.QUICK_SECONDS <= 90
    quick = argparse.Namespace(quick=True, parts=None)
    assert [part.name for part in gpu.chosen(quick)] == ["build", "tests", "linear", "train_step", "merge"]


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(BenchmarkError, match="part 'lin' is unknown"):
        gpu.chosen(argparse.Namespace(quick=False, parts=["lin"]))


@pytest.mark.slow
def test_the_whole_proof_runs_dry_on_the_cpu_with_the_kernels_interpreted(tmp_path: Path) -> None:
    """Every part, every case through the code that a GPU would take, and both tools, replaced by stand-ins."""
    tools, out = tmp_path / "bin", tmp_path / "out"
    tools.mkdir()
    for name in ("compute-sanitizer", "ncu"):
        (tools / name).write_text(FAKE + (f"cat <<'END'\n{NCU_SAYS}\nEND\n" if name == "ncu" else ""))
        (tools / name).chmod(0o755)
    environ = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "gpu", "--dry-run", "--out", out, "--seconds", "1500"],
        cwd=process.ROOT, env=environ, capture_output=True, text=True,
    )  # fmt: skip
    log = (out / "gpu.log").read_text()
    states = json.loads((out / "proof.json").read_text())["parts"]
    expected = {part.name: "ok" for part in gpu.PARTS}
    if not states["build"]["extension"]["available"]:
        expected["merge"] = "failed"
    assert {name: part["state"] for name, part in states.items()} == expected, f"{done.stdout}\n{log[-3000:]}"
    assert done.returncode == int("failed" in expected.values()), done.stderr
    assert not any("failed" in part for name, part in states.items() if name not in ("tests", "merge"))
    assert not any("refused" in part for part in states.values())
    assert set(states["sanitizer"]["runs"]) == {"memcheck", "racecheck"}
    assert states["profile"]["kernels"][0]["registers"] == "168 register/thread"
    # The kernels took part, interpreted.
    linear = read_result(out / "linear.json")
    assert any(row["contender"] == "slora, triton" and "forward_backward" in row for row in linear["rows"])
    assert linear["complete"] is True
    # What a machine that hands back few files can carry.
    assert len(list(out.iterdir())) <= 8
    assert bars.lines(out)[-1] in done.stdout
