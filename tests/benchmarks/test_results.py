"""The command line and the result files: what is wrong is one sentence, and nothing is half-written."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import results, roofline
from benchmarks.results import SCHEMA, read_result

TINY = ["--grid", "tiny"]


def run(*arguments: object) -> int:
    return command_line.main([str(word) for word in arguments])


def _row(name: str = "a", **measures: Any) -> dict[str, Any]:
    return {"point": {"M": 1}, "contender": name, **measures}


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Any:
    """`case(*rows, name="own")` registers a case with a point for each row; an exception among them is raised."""
    cases = {}

    def measure(row: Any, *_: Any) -> list[dict[str, Any]]:
        # fp32 means fp32, and the older switch can still be read.
        assert torch.backends.cuda.matmul.fp32_precision == "ieee"
        assert not torch.backends.cudnn.allow_tf32
        if isinstance(row, BaseException):
            raise row
        return [row]

    def register(*rows: Any, name: str = "own") -> None:
        cases[name] = rows
        monkeypatch.setitem(results.CASES, name, results.Case("own", "of the test"))
        monkeypatch.setattr(roofline, "measure", lambda *args: {"copy_bytes_per_s": 1.0, "gemm_flops_per_s": {}})

    module = SimpleNamespace(grid=lambda settings, name: cases[name], measure=measure)
    monkeypatch.setitem(sys.modules, "benchmarks.cases.own", module)
    return register


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--case", "linear", *TINY, "--out", __file__], "cannot be created (File exists)"),
        (["run", "--case", "linear", "--grid", "quick"], "a part of a run needs --out"),
        (["run", "--case", "linear", "--only", "PEFT"], "a part of a run needs --out"),
        (["gpu", "--dry-run", "--out", "x", "--parts", "lin"], "there is no step 'lin'"),
        (["compare", "no.json", "other.json"], "no.json does not exist"),
    ],
    ids=lambda value: " ".join(Path(word).name for word in value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: list[str], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert not list(tmp_path.iterdir())
    said = capsys.readouterr().err
    assert message in said
    assert said.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [["run", "--case", "linear", "--device", "cuda"], ["gpu", "first"]])
def test_without_a_gpu_a_gpu_is_not_measured(arguments: list[str], tmp_path: Path, capsys: Any) -> None:
    assert run(*arguments, "--out", tmp_path / "out") == 2
    assert "no CUDA GPU is visible" in capsys.readouterr().err


@pytest.mark.parametrize("limit", [[], ["--seconds", "1000"]], ids=["whole", "limited"])
def test_a_case_that_fails_is_one_line_and_the_next_case_is_run(
    limit: list[str], tmp_path: Path, case: Any, capsys: Any
) -> None:
    case(_row(seconds=1.0), torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"))
    case(_row(seconds=2.0), name="other")
    assert run("run", "--case", "own", "other", "--out", tmp_path, *limit) == 1
    assert capsys.readouterr().err == "benchmarks: case 'own' failed: OutOfMemoryError: CUDA out of memory.\n"
    assert read_result(tmp_path / "other.json")["rows"] == [_row(seconds=2.0)]
    # What a limited time may cut short is written after every point.
    assert (tmp_path / "own.json").exists() is bool(limit)
    assert not limit or read_result(tmp_path / "own.json")["complete"] is False


def test_an_interrupted_run_leaves_the_file_that_was_there(tmp_path: Path, case: Any, capsys: Any) -> None:
    (tmp_path / "own.json").write_text("what was there")
    case(_row(seconds=1.0), KeyboardInterrupt())
    assert run("run", "--case", "own", "--out", tmp_path) == 2
    assert "interrupted" in capsys.readouterr().err
    assert [(path.name, path.read_text()) for path in tmp_path.iterdir()] == [("own.json", "what was there")]


def test_a_run_whose_time_is_up_has_its_first_point_and_is_marked_incomplete(tmp_path: Path) -> None:
    assert run("run", "--case", "linear", *TINY, "--only", "frozen", "--out", tmp_path, "--seconds", "0") == 0
    result = read_result(tmp_path / "linear.json")
    assert [row["contender"] for row in result["rows"]] == ["frozen F.linear"]
    assert result["complete"] is False


def test_a_result_says_what_was_measured_on_what_and_from_which_source(
    tmp_path: Path, case: Any, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setenv("SLORA_COMMIT", "abc-dirty")
    case(_row("a", seconds=results.spread([0.4, 0.5, 0.6])), _row("b", skipped="no reason"))
    assert run("run", "--case", "own", "--out", tmp_path) == 0
    result = read_result(tmp_path / "own.json")
    assert (result["schema"], result["device"], result["complete"]) == (SCHEMA, "cpu", True)
    about = result["environment"]
    assert (about["commit"], about["dirty"]) == ("abc", True)
    assert torch.__version__.startswith(about["packages"]["torch"])
    assert {"date", "device", "threads", "python"} <= about.keys()
    said = capsys.readouterr().out
    assert "500 ms" in said
    assert "skipped: no reason" in said


@pytest.mark.parametrize(("text", "message"), [("{half", "is not readable JSON"), ("[]", "has schema None")])
def test_a_file_of_another_form_is_named(text: str, message: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "linear.json").write_text(text)
    assert run("compare", *[tmp_path / "linear.json"] * 2) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("name", "dirty"),
    [("README.md", False), ("benchmarks/results/cpu/linear.json", False), ("setup.py", True), ("kernels/new.py", True)],
)
def test_the_source_is_changed_by_new_source_and_not_by_what_the_benchmarks_write(
    name: str, dirty: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in [name for name in os.environ if name.startswith("GIT_") or name == "SLORA_COMMIT"]:
        monkeypatch.delenv(variable)
    monkeypatch.setattr(results, "ROOT", tmp_path)
    for path in ("README.md", "setup.py", "slora/ops.py", "benchmarks/results/cpu/linear.json", "kernels/old.py"):
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).write_text("")
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false", "-C", tmp_path]
    for arguments in (["init"], ["add", "."], ["commit", "--message", "first"]):
        subprocess.run([*git, *arguments], capture_output=True, check=True)
    (tmp_path / name).write_text("changed")
    head = subprocess.run([*git, "rev-parse", "HEAD"], capture_output=True, text=True, check=True).stdout.strip()
    about = results.environment("cpu")
    assert (about["commit"], about["dirty"]) == (head, dirty)
    # The commit of a repository that merely contains the source says nothing.
    monkeypatch.setattr(results, "ROOT", tmp_path / "slora")
    about = results.environment("cpu")
    assert (about["commit"], about["dirty"], results.source(about)) == (None, None, "unknown commit")
