"""`python -m benchmarks`: bad input is one clear sentence and exit code 2, and nothing is half-written."""

from __future__ import annotations

import json
import math
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import __main__ as command_line
from benchmarks import ceilings, record, registry, running
from benchmarks.contenders import layer as layers
from benchmarks.record import BenchmarkError, read_result
from benchmarks.schema import SCHEMA

TINY = ["--grid", "tiny", "--rounds", "3"]


def run(*arguments: object) -> int:
    return command_line.main([str(word) for word in arguments])


@pytest.fixture
def case(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Put a case of one's own in the registry: `case(rows)`; rows are yielded, an exception among them is raised."""

    cases = {}

    def put(*rows: Any, name: str = "own") -> None:
        def steps(settings: Any, limits: Any) -> Iterator[dict[str, Any]]:
            for row in rows:
                if isinstance(row, BaseException):
                    raise row
                yield row

        cases[name] = steps
        monkeypatch.setitem(registry.CASES, name, registry.Case(name, "of the test"))
        monkeypatch.setattr(registry.Case, "load", lambda self: cases[self.name])
        monkeypatch.setattr(ceilings, "measure", lambda settings: {"copy_bytes_per_s": 1.0, "gemm_flops_per_s": {}})

    return put


def _row(contender: str = "a", **measures: Any) -> dict[str, Any]:
    return {"point": {"M": 1}, "contender": contender, **measures}


def test_a_case_that_fails_leaves_the_others_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    measure, begun = running.run_case, []

    def run_case(case: Any, *rest: Any) -> Path:
        begun.append(case.name)
        if case.name == "linear":
            raise BenchmarkError("linear went wrong")
        return measure(case, *rest)

    monkeypatch.setattr(running, "run_case", run_case)
    assert run("run", "--case", "linear", "merge", *TINY, "--out", tmp_path) == 2
    assert begun == ["linear", "merge"]
    assert read_result(tmp_path / "merge.json")["complete"]
    assert "linear went wrong" in capsys.readouterr().err


@pytest.mark.parametrize("keep", [False, True])
def test_what_nobody_foresaw_in_a_case_is_one_line_and_the_next_case_is_run(
    keep: bool, tmp_path: Path, case: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    case(_row("a", seconds=1.0), torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate"))
    case(_row("a", seconds=2.0), name="other")
    assert run("run", "--case", "own", "--case", "other", "--out", tmp_path, *["--keep-partial"] * keep) == 1
    kept = f"what it measured before is in {tmp_path / 'own.json'}" if keep else "nothing of it was written"
    said = capsys.readouterr()
    assert said.err == f"benchmarks: case 'own' failed: OutOfMemoryError: CUDA out of memory.; {kept}\n"
    assert read_result(tmp_path / "other.json")["rows"] == [_row("a", seconds=2.0)]
    assert (tmp_path / "own.json").exists() is keep


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
def test_an_interrupt_in_the_import_of_torch_is_one_sentence_and_exit_code_2(
    number: signal.Signals, tmp_path: Path
) -> None:
    # NumPy under torch: the exception is swallowed, and another one comes of it.
    (tmp_path / "torch.py").write_text(
        f"import os, time\ntry:\n    os.kill(os.getpid(), {number.value})\n    time.sleep(30)\n"
        "except BaseException:\n    raise RuntimeError from None\n"
    )
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks", "run", "--case", "linear"],
        cwd=Path(command_line.__file__).parents[1], env={**os.environ, "PYTHONPATH": str(tmp_path)},
        capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == "\nbenchmarks: interrupted; nothing was written\n"
    assert done.returncode == 2


def test_a_run_that_is_asked_to_terminate_is_interrupted() -> None:
    code = (
        "import os, runpy, signal, sys; from benchmarks import running\n"
        "running.run_case = lambda *arguments: os.kill(os.getpid(), signal.SIGTERM)\n"
        "runpy.run_module('benchmarks', run_name='__main__')"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "run", "--case", "linear"],
        cwd=Path(command_line.__file__).parents[1], capture_output=True, text=True,
    )  # fmt: skip
    assert done.stderr == "\nbenchmarks: interrupted; nothing was written for the case in progress\n"
    assert done.returncode == 2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run", "--case", "liner"], "case 'liner' is unknown; there are linear,"),
        (["run", "--case", "linear", "--device", "tpu"], "device 'tpu' is unknown; use cpu or cuda"),
        (["run", "--case", "all", "--device", "tpu"], "device 'tpu' is unknown; use cpu or cuda"),
        (["run", "--case", "merge", "--case", "liner"], "case 'liner' is unknown; there are linear,"),
        (["run", "--case", "linear", "--grid", "small"], "--grid 'small' is unknown; there are tiny,"),
        (["run", "--case", "train_memory", "--device", "cuda"], "case 'train_memory' is measured on cpu only, not on"),
        (["run", "--case", "linear", *TINY, "--out", __file__], "is no folder); choose another folder"),
        (["run", "--case", "linear", *TINY, "--out", "/proc/out"], "cannot be written into"),
        (["bars", "--results", "nowhere"], "nowhere is no folder"),
        (["gpu", "--dry-run", "--out", "x", "--seconds", "-1"], "--seconds -1 leaves no time"),
        (["gpu", "--dry-run", "--out", __file__], "is no folder); choose another folder"),
        (["run", "--case", "linear", "--rounds", "1"], "--rounds 1 is below 3"),
        (["run", "--case", "linear", "--threads", "0"], "--threads 0 is not a positive number"),
        (["run", "--case", "linear", "--quick"], "the quick grid needs --out"),
        (["run", "--case", "linear", "--only", "PEFT"], "--only needs --out"),
        (["run", "--case", "linear", "--seconds", "60"], "--seconds needs --out"),
        (["run", "--case", "linear", "--keep-partial"], "--keep-partial needs --out"),
        (["run", "--case", "linear", "--rounds", "4"], "--rounds 4 needs --out"),
        (["run", "--case", "linear", "--seconds", "-5", "--out", "x"], "--seconds -5 is no time"),
        (["run", "--case", "linear", "--seconds", "nan", "--out", "x"], "--seconds nan is no time"),
        (["gpu", "--dry-run", "--out", "x", "--seconds", "nan"], "--seconds nan leaves no time"),
        (["compare", "no.json", "other.json"], "no.json does not exist"),
        (["gpu", "--dry-run"], "name a folder with --out"),
        (["gpu", "--dry-run", "--out", "x", "--parts", "bild"], "part 'bild' is unknown; there are build,"),
    ],
    ids=lambda value: " ".join(Path(word).name for word in value) if isinstance(value, list) else "",
)
def test_bad_input_is_one_sentence_and_exit_code_2(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.chdir(tmp_path)
    assert run(*arguments) == 2
    assert not list(tmp_path.iterdir())
    said = capsys.readouterr().err
    assert message in said
    assert "Traceback" not in said
    assert said.count("\n") == 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
@pytest.mark.parametrize("arguments", [["run", "--case", "linear", "--device", "cuda"], ["gpu"]])
def test_without_a_gpu_a_gpu_is_not_measured(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(*arguments, "--out", tmp_path / "out") == 2
    assert "no CUDA GPU is visible" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_a_case_whose_package_is_missing_says_which(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    assert run("run", "--case", "train_step", *TINY, "--out", tmp_path) == 2
    assert "timm cannot be imported" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("package", ["rich", "matplotlib"])
def test_a_report_whose_package_is_missing_says_which(package: str, capsys: pytest.CaptureFixture[str]) -> None:
    # What is imported by now would hide that it is missing.
    code = (
        f"import sys; sys.modules[{package!r}] = None; from benchmarks.__main__ import main; sys.exit(main(['report']))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=Path(command_line.__file__).parents[1], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert f"{package} cannot be imported" in done.stderr
    assert "the report needs it" in done.stderr
    assert done.stderr.count("\n") == 1


def test_a_missing_peer_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    problem = layers.Problem(layers.Shape(8, 8, 4, 2, 1, 1, "fp32"), "cpu", sets=1)
    with pytest.raises(layers.Missing, match="peft cannot be imported"):
        layers.CONTENDERS["PEFT"](problem)


def test_a_contender_that_is_nowhere_in_the_case_is_refused_before_anything_is_measured(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(ceilings, "measure", None)
    assert run("run", "--case", "linear", *TINY, "--only", "PETF", "--only", "PFET", "--out", tmp_path) == 2
    said = capsys.readouterr().err
    assert "case 'linear': no contender has 'PETF' or 'PFET' in its name; there are frozen F.linear; " in said
    assert said.count("\n") == 1


def test_an_interrupted_run_leaves_the_file_that_was_there(
    tmp_path: Path, case: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "own.json").write_text("what was there")
    case(_row(seconds=1.0), KeyboardInterrupt())
    assert run("run", "--case", "own", "--out", tmp_path) == 2
    assert "interrupted; nothing was written" in capsys.readouterr().err
    assert [path.name for path in tmp_path.iterdir()] == ["own.json"]
    assert (tmp_path / "own.json").read_text() == "what was there"


def test_a_run_whose_time_is_up_has_its_first_point_and_is_marked_incomplete(tmp_path: Path) -> None:
    assert run("run", "--case", "linear", *TINY, "--only", "frozen", "--out", tmp_path, "--seconds", "0") == 0
    result = read_result(tmp_path / "linear.json")
    assert [row["contender"] for row in result["rows"]] == ["frozen F.linear"]
    assert result["complete"] is False


def test_partial_results_are_kept_where_that_is_asked_for(
    tmp_path: Path, case: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    case(KeyboardInterrupt())
    assert run("run", "--case", "own", "--out", tmp_path, "--keep-partial") == 2
    assert "interrupted; nothing was written" in capsys.readouterr().err
    case(_row("a"), _row("b"), KeyboardInterrupt())
    assert run("run", "--case", "own", "--out", tmp_path, "--keep-partial") == 2
    assert f"interrupted; what it measured before is in {tmp_path / 'own.json'}\n" in capsys.readouterr().err
    result = read_result(tmp_path / "own.json")
    assert [row["contender"] for row in result["rows"]] == ["a", "b"]
    assert result["complete"] is False


def test_a_wrong_result_is_not_timed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    right = layers.CONTENDERS["addmm function"]

    def wrong(problem: layers.Problem) -> layers.Layer:
        layer = right(problem)
        forward = layer.forward
        layer.forward = lambda x: forward(x) * 1.001
        return layer

    monkeypatch.setitem(layers.CONTENDERS, "addmm function", wrong)
    code = run("run", "--case", "linear", *TINY, "--only", "addmm", "frozen", "--out", tmp_path)
    assert code == 2
    assert "a wrong result was not timed: addmm function" in capsys.readouterr().err
    rows = [row for row in read_result(tmp_path / "linear.json")["rows"] if row["contender"] == "addmm function"]
    refused = [row for row in rows if "refused" in row]
    assert refused
    assert not any("forward_backward" in row for row in refused)


def test_a_file_of_another_schema_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    old = tmp_path / "linear.json"
    old.write_text(json.dumps({"schema": 1, "case": "linear", "results": {}}))
    assert run("compare", old, old) == 2
    assert f"has schema 1, this version reads {SCHEMA}" in capsys.readouterr().err
    assert run("bars", "--results", tmp_path) == 2
    old.write_text("{half")
    assert run("compare", old, old) == 2
    assert "is not readable JSON" in capsys.readouterr().err


def test_a_schema_is_told_from_what_only_looks_like_it(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "linear.json"
    path.write_text(json.dumps({"schema": str(SCHEMA), "case": "linear", "rows": []}))
    assert run("compare", path, path) == 2
    assert f"has schema '{SCHEMA}', this version reads {SCHEMA};" in capsys.readouterr().err


HALF = {"median": 1.0, "p20": 1.0, "p80": 1.0, "n": 2, "values": [1.0, None]}
ENVIRONMENT = {"commit": None, "dirty": None, "date": "2026-01-02", "device": "a", "packages": {}}
RATES = {"copy_bytes_per_s": 1.0, "gemm_flops_per_s": {"fp32": 0.0}}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"rows": []}, "its environment lacks one of commit, date, device"),
        ({"environment": ENVIRONMENT, "rows": 5}, "its rows are no list"),
        ({"environment": ENVIRONMENT, "rows": [{"contender": "a"}]}, "row 0 has no point"),
        (
            {"environment": ENVIRONMENT, "rows": [_row(), _row(seconds={"median": 1.0})]},
            "row 1 has no positive numbers in",
        ),
        ({"environment": ENVIRONMENT, "rows": [_row(forward=HALF)]}, "row 0 has no positive numbers in 'forward'"),
        ({"environment": ENVIRONMENT, "rows": [_row(forward="fast")]}, "row 0 has no positive numbers in 'for"),
        ({"environment": ENVIRONMENT, "rows": [_row(seconds=0.0)]}, "row 0 has no positive numbers in 'seconds'"),
        ({"environment": ENVIRONMENT, "rows": [_row(seconds=math.inf)]}, "row 0 has no positive numbers in 'seconds'"),
        ({"environment": ENVIRONMENT, "rows": [_row(deviation=math.nan)]}, "row 0 has no numbers in 'deviation'"),
        ({"environment": ENVIRONMENT, "rows": [_row(flops=10**400)]}, "row 0 has no numbers in 'flops'"),
        ({"environment": ENVIRONMENT, "rows": [_row(launches=True)]}, "row 0 has no numbers in 'launches'"),
        ({"environment": ENVIRONMENT, "rows": [_row(flops="many")]}, "row 0 has no numbers in 'flops'"),
        ({"environment": ENVIRONMENT, "rows": [_row(form=5)]}, "row 0 has no text in 'form'"),
        ({"environment": {**ENVIRONMENT, "date": 5}, "rows": []}, "date in its environment is no text"),
        ({"environment": {**ENVIRONMENT, "commit": 5}, "rows": []}, "commit in its environment is no text"),
        ({"environment": ENVIRONMENT, "rows": [], "ceilings": [1]}, "its ceilings are no positive numbers under copy"),
        ({"environment": ENVIRONMENT, "rows": [], "ceilings": {"copy_bytes_per_s": 1}}, "its ceilings are no positive"),
        (
            {"environment": ENVIRONMENT, "rows": [], "ceilings": RATES},
            "its ceilings are no positive numbers under copy",
        ),
        ({"environment": {**ENVIRONMENT, "dirty": "no"}, "rows": []}, "dirty in its environment is none of true"),
        ({"environment": ENVIRONMENT, "parts": {"build": {}}}, "a part has no state"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_damaged_file_is_named_with_what_is_wrong(
    content: dict[str, Any], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "linear.json"
    path.write_text(json.dumps({"schema": SCHEMA, "case": "linear", **content}))
    assert run("compare", path, path) == 2
    said = capsys.readouterr().err
    assert f"{path} is damaged: {message}" in said
    assert said.endswith("run the case 'linear' again\n")


def test_a_folder_that_can_no_longer_be_written_into_is_one_sentence(
    tmp_path: Path, case: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    case(_row(seconds=1.0))
    (tmp_path / "out").write_text("a file has come between")
    monkeypatch.setattr(running, "require_writable", lambda folder: None)
    assert run("run", "--case", "own", "--out", tmp_path / "out") == 2
    said = capsys.readouterr().err
    assert "own.json could not be written" in said
    assert said.count("\n") == 1


def test_a_result_says_what_was_measured_on_what_and_from_which_source(
    tmp_path: Path, case: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SLORA_COMMIT", "")
    case(_row("a", seconds={"median": 0.5, "p20": 0.4, "p80": 0.6, "n": 3}), _row("b", skipped="no reason"))
    assert run("run", "--case", "own", "--out", tmp_path, "--commit", "abc-dirty") == 0
    result = read_result(tmp_path / "own.json")
    assert (result["schema"], result["device"], result["complete"]) == (SCHEMA, "cpu", True)
    about = result["environment"]
    assert (about["commit"], about["dirty"]) == ("abc", True)
    assert torch.__version__.startswith(about["packages"]["torch"])
    assert {"date", "device", "threads", "python"} <= about.keys()
    said = capsys.readouterr().out
    assert "500 ms" in said
    assert "skipped: no reason" in said


@pytest.fixture
def git(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Let the source be a repository with one commit: `git(*arguments)` runs git in it."""
    for name in [name for name in os.environ if name.startswith("GIT_") or name == "SLORA_COMMIT"]:
        monkeypatch.delenv(name)
    monkeypatch.setattr(record, "ROOT", tmp_path)

    def call(*arguments: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@example.org", "-c", "commit.gpgsign=false"]
        return subprocess.run(
            ["git", *who, *arguments], cwd=tmp_path, capture_output=True, text=True, check=True
        ).stdout.strip()

    for name in ("README.md", "setup.py", "slora/ops.py", "benchmarks/README.md", "benchmarks/results/cpu/linear.json"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / ".gitignore").write_text("*.so\n")
    call("init")
    call("add", ".")
    call("commit", "--message", "first")
    return call


@pytest.mark.parametrize(
    ("name", "dirty"),
    [
        ("README.md", False),
        ("benchmarks/README.md", False),
        ("benchmarks/figures/cpu-linear.png", False),
        ("benchmarks/results/cpu/linear.json", False),
        ("benchmarks/results/cpu/merge.json", False),
        ("slora/_C.so", False),
        ("notes.txt", False),
        ("setup.py", True),
        ("slora/ops.py", True),
        ("slora/new.py", True),
        ("kernels/deep/new.py", True),
        ("csrc/new.cu", True),
        ("benchmarks/new.py", True),
    ],
)
def test_the_source_is_changed_by_new_source_and_not_by_what_the_benchmarks_write(
    name: str, dirty: bool, tmp_path: Path, git: Any
) -> None:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text("changed")
    about = record.environment("cpu")
    assert (about["commit"], about["dirty"]) == (git("rev-parse", "HEAD"), dirty)


def test_the_commit_of_source_that_is_no_repository_is_unknown(
    tmp_path: Path, git: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(record, "ROOT", tmp_path / "slora")
    about = record.environment("cpu")
    assert (about["commit"], about["dirty"]) == (None, None)
    assert record.source(about) == "unknown commit"
    assert record.source({"commit": "0123456789ab", "dirty": None}) == "commit 0123456789, perhaps with changes"


def test_list_names_every_case(capsys: pytest.CaptureFixture[str]) -> None:
    assert run("list") == 0
    said = capsys.readouterr().out
    assert all(name in said for name in registry.CASES)


@pytest.mark.parametrize(
    ("flags", "grid"), [([], "default"), (["--quick"], "quick"), (["--full"], "full"), (["--grid", "tiny"], "tiny")]
)
def test_the_default_grid_is_run_unless_another_is_asked_for(flags: list[str], grid: str) -> None:
    assert command_line.parser().parse_args(["run", "--case", "linear", *flags]).grid == grid
