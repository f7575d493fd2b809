"""The proof on a GPU, as far as it runs without one: every part by itself, and all of them in a dry run."""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import gpu, results, targets
from benchmarks.cases import linear, train_step
from benchmarks.contenders import layer as layers
from benchmarks.models import find
from benchmarks.proof import parts, process
from benchmarks.results import RESULTS, BenchmarkError, Settings, read_result

# Processes that are started: once is enough.
pytestmark = pytest.mark.slow

# Each of these tools is replaced by a program that finds the Python in its arguments and runs that.
FAKE = """#!/bin/sh
while [ "${1##*python*}" ]; do shift; done
"$@" || exit
"""
NCU_SAYS = '''"ID","Kernel Name","Grid Size","Block Size","gpu__time_duration.sum","launch__registers_per_thread"
"","","","","us","register/thread"
"0","_kernel","(132, 1, 1)","(256, 1, 1)","212.50","168"'''


PYTEST_SAYS = """tests/test_a.py::test_x PASSED [100%]

==================================== ERRORS ====================================
_______________________ ERROR collecting tests/b/test_b.py _______________________
Traceback:
tests/b/test_b.py:1: in <module>
    import absent.of.this.machine
E   ModuleNotFoundError: No module named 'absent'
"""
PYTEST_SAYS_MORE = """_______________________ ERROR collecting tests/test_c.py _______________________
tests/test_c.py:3: in <module>
    import torch.of_another_release
E   ModuleNotFoundError: No module named 'torch.of_another_release'
"""


@pytest.fixture
def proof(tmp_path: Path) -> process.Proof:
    environ = {**process.environ_of(True, tmp_path / "scratch"), "SLORA_COMMIT": "0123456789ab"}
    return process.Proof(tmp_path, True, None, environ)


def test_a_command_is_cut_at_its_limit_with_all_it_has_started(proof: process.Proof) -> None:
    child = "import subprocess, sys; print('here', flush=True); subprocess.run(['sleep', '60'])"
    start = time.monotonic()
    code, text = proof.call([sys.executable, "-c", child], 2.0)
    assert code is None
    assert time.monotonic() - start < 20
    assert "here" in text
    assert process.state_of(code, text) == {"state": "cut", "exit_code": None, "last_lines": ["here"]}
    assert "here" in (proof.out / "gpu.log").read_text()


def test_parts_share_the_bytecode_of_what_they_import(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    (tmp_path / "own.py").write_text("")
    proof = process.Proof(tmp_path, True, None, process.environ_of(True, tmp_path / "scratch"))
    proof.call([sys.executable, "-c", "import own"], 60.0, PYTHONPATH=str(tmp_path))
    found = [path.parent for path in tmp_path.rglob("own.*.pyc")]
    assert found == [tmp_path / "scratch" / "pyc" / tmp_path.relative_to("/")]


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


def test_the_time_of_the_proof_counts_from_the_start_of_its_process(tmp_path: Path) -> None:
    arguments = ["gpu", "--dry-run", "--out", str(tmp_path), "--parts", "profile", "--seconds", "6"]
    program = f"import sys, time; time.sleep(4); from benchmarks import __main__; sys.exit(__main__.main({arguments}))"
    done = subprocess.run([sys.executable, "-c", program], cwd=process.ROOT, capture_output=True, text=True)
    states = read_result(tmp_path / "proof.json")["parts"]
    assert states["profile"]["reason"] == "the time was up", done.stdout
    assert done.returncode == 1
    assert re.search(r"^profile +NO TIME +0\.0  the time was up$", done.stdout, re.M)
    assert states["build"] == {"state": "skipped", "reason": "not asked for", "seconds": 0.0}
    assert states.keys() == {part.name for part in gpu.PARTS}


@pytest.mark.parametrize(("took", "asked"), [(12.0, 8.0), (19.0, None)])
def test_asking_what_was_built_ends_with_the_part(
    took: float, asked: float | None, proof: process.Proof, monkeypatch: pytest.MonkeyPatch
) -> None:
    now, limits = 0.0, []

    def call(self: process.Proof, command: list[str], limit: float, **environ: str) -> tuple[int | None, str]:
        nonlocal now
        limits.append(limit)
        now += took
        return (0, "") if len(limits) == 1 else (None, "")

    monkeypatch.setattr("benchmarks.proof.parts.time.monotonic", lambda: now)
    monkeypatch.setattr(process.Proof, "call", call)
    assert parts.build(proof, 20.0) == {"state": "ok", "left_out": {"what was built": "the time was up"}}
    assert limits == [20.0, *([asked] if asked else [])]


@pytest.mark.parametrize(
    ("extension", "reason"),
    [
        ({"available": False, "reason": "it was not built"}, "slora._C cannot be used: it was not built; "),
        ({"available": True, "cuda": None, "architectures": []}, "slora._C was built without CUDA; "),
        ({"available": True, "cuda": "13.0", "architectures": ["8.0"]}, "slora._C has code for 8.0 alone; "),
        ({"available": True, "cuda": "13.0", "architectures": ["8.0", "9.0"]}, None),
        (None, "what was built is not known; "),
    ],
    ids=["not there", "no CUDA", "other GPU", "of use", "unknown"],
)
def test_a_build_that_this_gpu_cannot_use_has_failed(
    extension: dict[str, Any] | None, reason: str | None, proof: process.Proof, monkeypatch: pytest.MonkeyPatch
) -> None:
    line = "slora: extension slora._C: C++ only: nvcc was not found"

    def call(self: process.Proof, command: list[str], limit: float, **environ: str) -> tuple[int, str]:
        if "setup.py" in command:
            return 0, f"running build_ext\n{line}\n"
        return (1, "ImportError") if extension is None else (0, json.dumps(extension))

    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (9, 0))
    monkeypatch.setattr(process.Proof, "call", call)
    proof.dry = False
    state = parts.build(proof, 20.0)
    assert (state["state"], state.get("reason")) == (("failed", reason + line) if reason else ("ok", None))
    proof.dry = True
    assert parts.build(proof, 20.0)["state"] == "ok"


def test_what_a_part_left_out_is_in_the_table(proof: process.Proof, capsys: pytest.CaptureFixture[str]) -> None:
    proof.about = {"device": "a"}
    state = {"state": "ok", "seconds": 1.0, "counts": {"passed": 3}, "left_out": {"tests/a.py": "no hypothesis"}}
    proof.parts = {"tests": state}
    gpu.finish(proof, 1.0)
    assert "3 passed\n    left out: tests/a.py: no hypothesis\n" in capsys.readouterr().out


def test_a_failing_part_is_recorded_and_the_next_one_runs(
    proof: process.Proof, capsys: pytest.CaptureFixture[str]
) -> None:
    def raises(proof: process.Proof, limit: float) -> dict[str, Any]:
        raise ValueError("of all things")

    gpu.run_part(proof, gpu.Part("first", raises, 1), 10.0)
    gpu.run_part(proof, gpu.Part("second", lambda proof, limit: {"state": "ok"}, 1), 10.0)
    gpu.run_part(proof, gpu.Part("third", raises, 1), 0.0)
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


def test_a_profiler_that_may_not_look_is_skipped_and_one_that_sees_nothing_has_failed(
    proof: process.Proof, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(process, "found", lambda tool: tool)
    for error, expected in (("ERR_NVGPUCTRPERM - no permission", "skipped"), ("no device", "failed")):
        for code in (0, 1):
            said = f"==PROF== Connected\n==ERROR== {error}\nright\n"
            monkeypatch.setattr(process.Proof, "call", lambda *args, code=code, said=said, **environ: (code, said))
            state = parts.profile(proof, 10.0)
            assert state["state"] == expected
            assert code or state["reason"] == f"==ERROR== {error}"
            assert not gpu.no_time(state)
    monkeypatch.setattr(process.Proof, "call", lambda *args, **environ: (0, NCU_SAYS))
    assert parts.profile(proof, 10.0)["state"] == "ok"


def test_a_tool_that_is_missing_is_a_part_skipped(proof: process.Proof, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(process, "found", lambda tool: None)
    assert parts.sanitizer(proof, 10.0)["reason"] == "compute-sanitizer was not found"
    assert parts.profile(proof, 10.0)["state"] == "skipped"


def test_the_shares_of_the_parts_make_the_time_of_each_stage_and_of_the_whole() -> None:
    for stage, seconds in ((None, 530), ("first", 240), ("second", 400)):
        assert sum(part.share(stage) for part in gpu.PARTS) == gpu.SECONDS[stage] == seconds
        names = [part.name for part in gpu.chosen(argparse.Namespace(stage=stage, parts=None))]
        assert (
            names
            == {
                None: [part.name for part in gpu.PARTS],
                "first": ["build", "candidates", "linear", "merge"],
                "second": ["build", "candidates", "train_step", "tests", "profile"],
            }[stage]
        )
    with pytest.raises(BenchmarkError, match="the stage first has its own parts"):
        gpu.chosen(argparse.Namespace(stage="first", parts=["tests"]))


def test_a_stage_waits_for_no_compiler_of_a_peer_and_measures_the_bars(
    proof: process.Proof, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    asked: list[Any] = []

    def call(self: process.Proof, command: list[object], limit: float, **environ: str) -> tuple[int, str]:
        asked.append(command_line.parser().parse_args([str(word) for word in command[3:]]))
        return 0, ""

    monkeypatch.setattr(process.Proof, "call", call)
    proof.dry, proof.stage = False, "first"
    parts.case("linear")(proof, 10.0)
    settings = Settings(asked[0].device, asked[0].grid)
    assert (settings.device, settings.grid) == ("cuda", "quick")
    assert linear.contenders(settings) == {
        "frozen F.linear", "slora, auto", "slora, fused", "slora, split", "slora, precomputed", "slora, cublas_after",
        "slora, cublas_before", "PEFT", "addmm function",
    }  # fmt: skip
    steps = train_step.grid(settings)
    assert [(batch, mode) for _, batch, _, mode, _ in steps] == [
        (64, "eager"), (64, "graph"), (256, "eager"), (256, "graph"),
    ]  # fmt: skip
    measured = {
        "linear": [(shape.point, linear.contenders(settings)) for shape in linear.grid(settings)],
        "train_step": [
            ({"model": find(name).name, "batch": batch, "precision": precision, "mode": mode}, contenders)
            for name, batch, precision, mode, contenders in steps
        ],
    }
    for bar in targets.load():
        if bar.device != "cpu" and bar.case in measured:
            names = [names for point, names in measured[bar.case] if bar.where.items() <= point.items()]
            assert len(names) == 1, bar.name
            assert {bar.contender, bar.against or bar.contender} <= set(names[0])


def test_what_is_wrong_with_a_candidate_is_in_the_state_of_the_part(
    proof: process.Proof, monkeypatch: pytest.MonkeyPatch
) -> None:
    entry = {"point": {"M": 1}, "operation": "forward", "form": "fused", "state": "wrong", "reason": "y is off"}

    def call(self: process.Proof, command: list[object], limit: float, **environ: str) -> tuple[int, str]:
        content = {"complete": False, "candidates": [entry, {"state": "right"}, {"state": "no time"}]}
        (proof.out / "candidates.json").write_text(json.dumps(content))
        return 1, "1 wrong"

    monkeypatch.setattr(process.Proof, "call", call)
    state = parts.candidates(proof, 10.0)
    assert state["state"] == "failed"
    assert state["counts"] == {"wrong": 1, "right": 1, "no time": 1}
    assert state["failed"] == ["forward, fused at {'M': 1}: y is off"]
    assert state["left_out"] == {"the rest of the candidates": "the time was up"}


@pytest.mark.parametrize("stage", [None, "first", "second"])
def test_a_case_has_all_its_share_to_measure_and_measures_its_first_point_in_any_case(
    stage: str | None, proof: process.Proof, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock of its own: the start takes 5 s, or more than there is, and every point 3 s."""
    now = 0.0
    monkeypatch.setattr("benchmarks.results.time.monotonic", lambda: now)
    monkeypatch.setattr("benchmarks.results.write_result", lambda *args: None)
    monkeypatch.setattr("benchmarks.results.roofline.measure", lambda *args: wait(start))
    taken: list[float] = []

    def wait(seconds: float) -> dict[str, Any]:
        nonlocal now
        now += seconds
        return {}

    def grid(settings: Settings, limits: object) -> Iterator[dict[str, Any]]:
        for i in range(1000):
            if settings.stop():
                return
            wait(3.0)
            taken.append(now)
            yield {"point": {"i": i}, "contender": "a"}

    def call(self: process.Proof, command: list[object], limit: float, **environ: str) -> tuple[int, str]:
        asked = command_line.parser().parse_args([str(word) for word in command[3:]])
        results.run_case(results.Case("own", ""), Settings("cpu", started=now, seconds=asked.seconds))
        return 0, ""

    monkeypatch.setattr(results.Case, "load", lambda self: grid)
    monkeypatch.setattr(process.Proof, "call", call)
    cases = [part for part in gpu.PARTS if part.name in results.CASES and part.share(stage)]
    assert len(cases) == {None: 6, "first": 2, "second": 1}[stage]
    for part in cases:
        limit = part.share(stage)
        now, start = 0.0, 5.0
        taken.clear()
        part.run(proof, limit)
        # Ended before it is killed, and with no room for another point and the grace.
        assert taken[-1] <= limit
        assert taken[-1] + 3.0 > limit - parts.GRACE
        now, start = 0.0, 1000.0
        taken.clear()
        part.run(proof, limit)
        assert taken == [1003.0]


def test_a_file_of_an_earlier_run_is_not_this_ones(
    proof: process.Proof, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    shutil.copy(RESULTS / "cpu" / "train_step.json", proof.out)
    bar = "train step, all blocks active, over PEFT, precision fp32"

    def said() -> str:
        gpu.finish(proof, 1.0)
        return next(line for line in capsys.readouterr().out.splitlines() if line.startswith(bar))

    proof.about = {"device": "a"}
    monkeypatch.setattr(process.Proof, "call", lambda *args, **environ: (1, "ModuleNotFoundError"))
    state = parts.case("train_step")(proof, 10.0)
    assert state == {"state": "failed", "exit_code": 1, "last_lines": ["ModuleNotFoundError"]}
    assert said().endswith("not measured")

    def writes(*args: object, **environ: str) -> tuple[int, str]:
        shutil.copy(RESULTS / "cpu" / "train_step.json", proof.out)
        return 0, ""

    monkeypatch.setattr(process.Proof, "call", writes)
    assert "left_out" not in parts.case("train_step")(proof, 10.0)
    assert "not measured" not in said()


def test_without_pytest_the_tests_are_skipped(proof: process.Proof, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(parts, "find_spec", lambda name: None)
    assert parts.tests(proof, 10.0) == {"state": "skipped", "reason": "pytest is not installed"}


def test_test_files_that_need_a_missing_package_are_left_out_and_others_that_break_have_failed(
    proof: process.Proof, monkeypatch: pytest.MonkeyPatch
) -> None:
    proof.dry = False
    said = PYTEST_SAYS + "====== 1 passed, 1 error in 0.20s ======\n"
    monkeypatch.setattr(process.Proof, "call", lambda *args: (1, said))
    state = parts.tests(proof, 10.0)
    assert (state["state"], state["failed"]) == ("ok", [])
    assert state["left_out"] == {"tests/b/test_b.py": "absent is not installed"}
    said = PYTEST_SAYS + PYTEST_SAYS_MORE + "====== 1 passed, 2 errors in 0.20s ======\n"
    state = parts.tests(proof, 10.0)
    assert (state["state"], state["failed"]) == ("failed", ["tests/test_c.py"])
    assert state["counts"] == {"passed": 1, "failed": 0, "error": 1, "skipped": 0}
    # A failure whose line was not recognised is one all the same.
    said = PYTEST_SAYS + "====== 1 failed, 1 error in 0.20s ======\n"
    assert parts.tests(proof, 10.0)["state"] == "failed"
    said = "tests/test_a.py::test_x SKIPPED (no GPU)\n===== 1 skipped in 0.20s =====\n"
    monkeypatch.setattr(process.Proof, "call", lambda *args: (0, said))
    assert parts.tests(proof, 10.0)["reason"] == "no test passed"


def test_a_conftest_that_needs_a_missing_package_costs_its_folder_and_not_all_tests(
    proof: process.Proof, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[str]] = []

    def call(self: process.Proof, command: list[str], limit: float) -> tuple[int, str]:
        seen.append(command)
        path = process.ROOT / "tests" / "training" / "conftest.py"
        said = f"ImportError while loading conftest '{path}'.\nE   ModuleNotFoundError: No module named 'absent'\n"
        return (4, said) if len(seen) == 1 else (0, "tests/test_a.py::test_x PASSED [100%]\n")

    monkeypatch.setattr(process.Proof, "call", call)
    state = parts.tests(proof, 60.0)
    assert (state["state"], state["left_out"]) == ("ok", {"tests/training": "absent is not installed"})
    assert [path for path in seen[0] if path not in seen[1]] == ["tests/training/test_trainer.py"]


@pytest.mark.slow
def test_the_files_given_to_pytest_hold_all_tests_for_a_gpu_and_need_no_package_that_may_be_missing() -> None:
    blocked = ("hypothesis", "sklearn", "matplotlib", "open_clip", "pytest_benchmark", "xdist")
    program = (
        "import sys, pytest\n"
        "sys.modules.update(dict.fromkeys(sys.argv[1].split()))\n"
        "sys.exit(pytest.main(['--collect-only', '-q', '-m', 'gpu', *sys.argv[2:]]))"
    )
    environ = {**os.environ, "PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    found = []
    for missing, given in ((), ()), (blocked, parts.gpu_files()):
        command = [sys.executable, "-c", program, " ".join(missing), *given]
        done = subprocess.run(command, cwd=process.ROOT, env=environ, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout[-2000:]
        found.append({line for line in done.stdout.splitlines() if "::" in line})
    everything, chosen = found
    assert len(everything) > 100
    assert chosen == everything
    assert {name.partition("::")[0] for name in everything}.issuperset(parts.FIRST)


def test_a_case_needs_no_more_than_the_packages_that_the_proof_promises(tmp_path: Path) -> None:
    """What torch, timm and peft bring with them is there; the rest is not asked for, least of all after measuring."""
    blocked = ("hypothesis", "matplotlib", "open_clip", "pytest", "rich", "sklearn",
               "tensorboard", "tomli", "tomllib", "torchmetrics", "typer")  # fmt: skip
    arguments = ["run", "--case", "linear", "--grid", "tiny", "--rounds", "3", "--only", "frozen", "--out", tmp_path]
    program = (
        f"import sys; sys.modules.update(dict.fromkeys({blocked}))\n"
        "import benchmarks.candidates, benchmarks.gpu, benchmarks.small\n"
        "from benchmarks import results, __main__\n"
        "for case in results.CASES.values(): case.load()\n"
        "sys.exit(__main__.main(sys.argv[1:]))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *map(str, arguments)], cwd=process.ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert read_result(tmp_path / "linear.json")["complete"] is True


def test_an_unknown_part_is_refused() -> None:
    with pytest.raises(BenchmarkError, match="part 'lin' is unknown"):
        gpu.chosen(argparse.Namespace(stage=None, parts=["lin"]))


EXTRAS = [part.name for part in gpu.PARTS if not part.first and not part.second]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("asked", "files"),
    [
        (["first"], ["candidates.json", "gpu-first.log", "linear.json", "merge.json", "proof-first.json"]),
        (["second"], ["candidates.json", "gpu-second.log", "proof-second.json", "train_step.json"]),
        (["--parts", *EXTRAS], ["gates.json", "gpu.log", "inference.json", "proof.json", "scaling.json"]),
    ],
    ids=["first", "second", "extras"],
)
def test_a_stage_is_rehearsed_on_the_cpu_with_the_kernels_interpreted(
    asked: list[str], files: list[str], tmp_path: Path
) -> None:
    """Every part, every case through the code that a GPU would take, and both tools, replaced by stand-ins."""
    tools, out = tmp_path / "bin", tmp_path / "out"
    tools.mkdir()
    for name in ("compute-sanitizer", "ncu"):
        (tools / name).write_text(FAKE + (f"cat <<'END'\n{NCU_SAYS}\nEND\n" if name == "ncu" else ""))
        (tools / name).chmod(0o755)
    environ = {**os.environ, "PATH": f"{tools}{os.pathsep}{os.environ.get('PATH', '')}"}
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "gpu", *asked, "--dry-run", "--out", out, "--seconds", "900"],
        cwd=process.ROOT, env=environ, capture_output=True, text=True,
    )  # fmt: skip
    log = next(out.glob("gpu*.log")).read_text()
    states = json.loads(next(out.glob("proof*.json")).read_text())["parts"]
    ran = {name: part["state"] for name, part in states.items() if part["state"] != "skipped"}
    expected = dict.fromkeys(
        [part.name for part in gpu.PARTS if part.share(asked[0])] if len(asked) == 1 else EXTRAS, "ok"
    )
    if "merge" in expected and not states["build"]["extension"]["available"]:
        expected["merge"] = "failed"
    assert ran == expected, f"{done.stdout}\n{log[-3000:]}"
    assert done.returncode == int("failed" in expected.values()), done.stderr
    assert not any(part.get("failed") for name, part in states.items() if name not in ("tests", "merge"))
    assert not any("refused" in part for part in states.values())
    # What a machine that hands back few files can carry; both stages together have eight.
    assert sorted(path.name for path in out.iterdir()) == files
    if "linear" in ran:
        # The kernels took part, interpreted, and so did every form.
        timed = {row["contender"]: row for row in read_result(out / "linear.json")["rows"] if "over_floor" in row}
        assert "slora, triton" in timed
        assert {name: timed[name]["form"] for name in layers.PINNED} == layers.PINNED
        assert states["candidates"]["counts"].keys() == {"right"}
    if "profile" in ran:
        assert states["profile"]["kernels"][0]["registers"] == "168 register/thread"
    if "sanitizer" in ran:
        assert set(states["sanitizer"]["runs"]) == {"memcheck", "racecheck"}
    assert " met, " in done.stdout
