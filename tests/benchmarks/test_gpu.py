"""The GPU validation, as far as it runs without one: its parts by themselves, and both stages as a rehearsal."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from benchmarks import __main__ as command_line
from benchmarks import gpu, gpu_steps, sanitizer_runs
from benchmarks.results import ROOT, read_result

NCU = """
"ID","Kernel Name","Grid Size","Block Size","gpu__time_duration.sum","launch__registers_per_thread"
"","","","","us","register/thread"
"0","_kernel","(132, 1, 1)","(256, 1, 1)","212.50","168"
==PROF== Disconnected"""


def command(stage: str, out: Path) -> int:
    return command_line.main(["gpu", stage, "--dry-run", "--out", str(out)])


@pytest.fixture
def run(tmp_path: Path) -> gpu_steps.Validation:
    """A run that is under way."""
    return gpu_steps.Validation(tmp_path, tmp_path, True, "first")


def gone(text: str) -> bool:
    """Whether no process has `text` in its command line, or soon has not."""
    for _ in range(100):
        if text not in subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout:
            return True
        time.sleep(0.1)
    return False


def test_a_command_is_cut_at_its_limit_with_all_that_it_started(run: gpu_steps.Validation) -> None:
    """First it is interrupted, so that it can write what it has, where it is given a moment for that."""
    child = f"61.{run.out.stat().st_ino}"
    program = f"""import subprocess, time
process = subprocess.Popen(["sleep", "{child}"])
try:
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")"""
    start = time.monotonic()
    assert run.call([sys.executable, "-c", program], 6.0, grace=3.0) == (None, "interrupted\n")
    code, text = run.call([sys.executable, "-c", program], 2.0)
    assert gpu_steps.state_of(code, text) == {"state": "cut", "exit_code": None, "last_lines": []}
    assert time.monotonic() - start < 30
    assert gone(child)
    assert "interrupted" in run.log.read_text()


def test_a_stage_that_is_terminated_ends_what_it_runs_and_keeps_what_it_has(tmp_path: Path) -> None:
    words = [sys.executable, "-m", "benchmarks", "gpu", "first", "--dry-run", "--out", str(tmp_path)]
    with subprocess.Popen(words, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert "build: at most" in process.stdout.readline()
        time.sleep(1.0)
        for _ in range(2):
            # As `timeout` does.
            process.terminate()
        assert "what was measured so far is kept" in process.communicate(timeout=60)[1]
    assert process.returncode == 2
    assert read_result(tmp_path / "gpu-first.json")["parts"] == {}
    assert gone(str(tmp_path))


def test_a_step_that_fails_or_has_no_time_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(run: gpu_steps.Validation, limit: float) -> gpu_steps.State:
        raise ValueError("of all things")

    def fine(run: gpu_steps.Validation, limit: float) -> gpu_steps.State:
        return {"state": "ok", "counts": {"passed": 3}}

    monkeypatch.setattr(gpu, "STAGES", {"first": {"one": 1.0, "two": 1.0, "three": 0.001}})
    monkeypatch.setattr(gpu_steps, "STEPS", {"one": raises, "two": fine, "three": fine})
    assert command("first", tmp_path) == 1
    states = read_result(tmp_path / "gpu-first.json")["parts"]
    assert [state["state"] for state in states.values()] == ["failed", "ok", "ok"]
    assert states["one"]["reason"] == "ValueError: of all things"
    assert "3 passed\n" in capsys.readouterr().out
    # The time of the stage counts from the start of its process.
    monkeypatch.setattr(gpu, "process_began", lambda: time.monotonic() - 1000)
    assert command("first", tmp_path) == 1
    assert {state["state"] for state in read_result(tmp_path / "gpu-first.json")["parts"].values()} == {"no time"}


def test_the_stages_have_every_step() -> None:
    assert {name for stage in gpu.STAGES.values() for name in stage} == gpu_steps.STEPS.keys()
    assert {name: sum(stage.values()) for name, stage in gpu.STAGES.items()} == {
        "first": 190, "second": 390, "all": 500
    }  # fmt: skip


def test_outcomes_of_tests_are_read_from_the_report_of_pytest(
    run: gpu_steps.Validation, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "test_a.py").write_text(
        f"import pytest\npytestmark = pytest.mark.{'gpu'}\ndef test_x(): pass\ndef test_y(): assert 1 == 2\n"
        "def test_z(): pytest.skip('no GPU')\n"
    )
    (tmp_path / "test_b.py").write_text("import absent")
    monkeypatch.setattr(gpu_steps, "gpu_files", lambda: [str(tmp_path / f"test_{name}.py") for name in "ab"])
    state = gpu_steps.tests(run, 60.0)
    assert state["state"] == "failed"
    assert state["counts"] == {"passed": 1, "failures": 1, "errors": 1, "skipped": 1}
    assert any("test_a.py::test_y - assert 1 == 2" in line for line in state["last_lines"])


def test_a_profiler_that_may_not_look_is_skipped_and_one_that_sees_nothing_has_failed(
    run: gpu_steps.Validation, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu_steps, "find_tool", lambda name: None)
    assert gpu_steps.profile(run, 10.0)["state"] == "skipped"
    monkeypatch.setattr(gpu_steps, "find_tool", lambda name: name)
    for code, text, state in ((1, "==ERROR== ERR_NVGPUCTRPERM", "skipped"), (0, "==ERROR== no device", "failed"),
                              (0, NCU.partition('"0"')[0], "failed"), (0, NCU, "ok"), (1, NCU, "failed")):  # fmt: skip
        monkeypatch.setattr(gpu_steps.Validation, "call", lambda *_, code=code, text=text, **__: (code, text))
        assert gpu_steps.profile(run, 10.0)["state"] == state
    assert gpu_steps.profiled(NCU)[1:] == [
        {**dict.fromkeys(gpu_steps.METRICS, ""), "Kernel Name": "_kernel", "Grid Size": "(132, 1, 1)",
         "Block Size": "(256, 1, 1)", "gpu__time_duration.sum": "212.50", "launch__registers_per_thread": "168"}
    ]  # fmt: skip


@pytest.mark.once
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs the kernels interpreted")
def test_steps_are_rehearsed_on_the_cpu_with_the_kernels_interpreted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("all", "profile"):
        assert sanitizer_runs.main([name]) == 0
    cases = ["linear", "merge", "train_step"]
    monkeypatch.setattr(gpu, "STAGES", {"first": dict.fromkeys(["build", "candidates", *cases, "tests"], 1.0)})
    # This process has run other tests for as long as it likes.
    monkeypatch.setattr(gpu, "process_began", time.monotonic)
    assert command("first", tmp_path) == 0
    states = read_result(tmp_path / "gpu-first.json")["parts"]
    assert {state["state"] for state in states.values()} == {"ok"}
    assert states["candidates"]["counts"].keys() == {"right"}
    counts = states["tests"]["counts"]
    assert counts["skipped"] > 100
    assert counts["passed"] == counts["failures"] == counts["errors"] == 0
    for case in cases:
        assert read_result(tmp_path / f"{case}.json")["rows"]
