"""What people read is what the result files give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks.record import SCHEMA, BenchmarkError
from benchmarks.report import figures, page, tables

TEXT = (
    "a\n<!-- demo-table -->\nold\n<!-- /demo-table -->\nb\n<!-- train-step-table -->\n<!-- /train-step-table -->\nc\n"
)


def _spread(value: float) -> dict[str, float]:
    return {"median": value, "p20": 0.9 * value, "p80": 1.1 * value, "n": 5}


def _result(case: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    environment = {
        "commit": "0123456789abcdef", "dirty": False, "date": "2026-01-02T03:04:05+00:00", "device": "a processor",
        "packages": {"torch": "2.11.0", "peft": "0.21.2"}, "threads": 2,
    }  # fmt: skip
    ceilings = {"gemm_flops_per_s": {"fp32": 1e11}, "copy_bytes_per_s": 1e10}
    return {"schema": SCHEMA, "case": case, "device": "cpu", "complete": True, "environment": environment,
            "settings": {}, "ceilings": ceilings, "rows": rows}  # fmt: skip


def _write(root: Path, result: dict[str, Any]) -> None:
    folder = root / "benchmarks" / "results" / "cpu"
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{result['case']}.json").write_text(json.dumps(result))


def _linear_rows() -> list[dict[str, Any]]:
    point = {"K": 768, "N": 3072, "M": 3152, "r": 16, "active": "1", "dtype": "fp32"}
    times = {"frozen F.linear": 0.2, "slora, torch": 0.25, "PEFT": 0.5}
    rows: list[dict[str, Any]] = [
        {"point": point, "contender": name, "forward": _spread(value / 2), "forward_backward": _spread(value)}
        for name, value in times.items()
    ]
    return [*rows, {"point": point, "contender": "PEFT, compiled", "failed": "no compiler"}]


def _scaling_rows() -> list[dict[str, Any]]:
    rows = []
    for share in ("0/16", "4/16", "16/16"):
        point = {"curve": "active", "K": 768, "N": 3072, "M": 3152, "r": 16, "active": share, "dtype": "fp32"}
        rows.append({"point": point, "contender": "frozen F.linear", "forward_backward": _spread(0.2)})
        rows.append({"point": point, "contender": "slora, torch", "forward_backward": _spread(0.25), "predicted": 0.24})
    return rows


def _step_rows() -> list[dict[str, Any]]:
    point = {"model": "a model", "batch": 2, "r": 16, "precision": "fp32", "mode": "eager"}
    names = ("frozen, dx everywhere", "PEFT, all", "slora, all active")
    return [{"point": point, "contender": name, "seconds": _spread(1.0 + i)} for i, name in enumerate(names)]


def test_the_texts_in_the_tree_are_what_the_result_files_give() -> None:
    assert page.stale() == [], "run: python -m benchmarks report"


def test_a_missing_result_says_not_measured(tmp_path: Path) -> None:
    text = page.filled(TEXT, tmp_path)
    assert text.count(page.NOT_MEASURED) == 2
    assert "old" not in text
    assert text.startswith("a\n")
    assert text.endswith("c\n")
    text = page.page(tmp_path)
    assert "Not measured: linear, train_step" in text
    # No bar is met or missed by what stands elsewhere.
    assert "| met |" not in text
    assert "| missed |" not in text


def test_the_demo_table_holds_means_and_spreads_of_its_runs(tmp_path: Path) -> None:
    run = {"method": "lora", "active": 36, "blocks": 36, "trainable": 1000, "flops": 2e12, "seconds": 3.0}
    runs = [
        {**run, "seed": 0, "target_accuracy": 0.97, "source_after": 0.90},
        {**run, "seed": 1, "target_accuracy": 0.99, "source_after": 0.94},
        {**run, "method": "selective", "seed": 0, "active": 6, "target_accuracy": 0.965, "source_after": 0.97},
    ]
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "demo.json").write_text(json.dumps({"source_before": 0.99, "runs": runs}))
    text = page.filled(TEXT, tmp_path)
    assert "| LoRA on all blocks | 98.00 ± 1.41 | 7.00 ± 2.83 | 36.0 of 36 | 1,000 | 2.00 | 3.0 |" in text
    assert "over 2 seeds" in text
    assert "* Target within 1 point of LoRA: missed. Selective reaches 96.5 %, 1.5 points below LoRA's 98.0 %." in text


def test_a_readme_without_its_marks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="demo-table"):
        page.filled("nothing marked here", tmp_path)


def test_a_case_table_gives_ratios_to_the_limit_and_the_reason_of_what_is_missing() -> None:
    text = tables.case_table(_result("linear", _linear_rows()))
    (line,) = [line for line in text.splitlines() if "| slora, torch |" in line]
    assert "| 125 ms | 250 ms | 1.25 |" in line
    assert "* PEFT, compiled: failed: no compiler (1 of 1 points)" in text


def test_steps_show_flops_and_what_part_of_the_ceilings_they_are_where_that_was_counted() -> None:
    rows = _step_rows()
    assert "GFLOP" not in tables.case_table(_result("train_step", rows))
    rows[0].update(flops=1.234e12, percent_of_gemm=61.7, compulsory_bytes=2e9, percent_of_copy=20.0)
    rows[1]["not_counted"] = "no formula"
    rows[2].update(input_sets=1, input_reason="a call touches enough")
    text = tables.case_table(_result("train_step", rows))
    assert "| GFLOP | % GEMM | compulsory MB | % copy |" in text
    (line,) = [line for line in text.splitlines() if "| frozen, dx everywhere |" in line]
    assert line.endswith("| 1,234 | 62 | 2,000 | 20 |")
    assert "It is no measured traffic." in text
    assert "* PEFT, all: not counted: no formula (1 of 1 points)" in text
    assert "* inputs are not rotated past the cache: a call touches enough (1 of 1 points)" in text


def test_an_incomplete_result_says_so(tmp_path: Path) -> None:
    _write(tmp_path, {**_result("linear", _linear_rows()), "complete": False})
    assert "Incomplete" in page.page(tmp_path)


def test_every_figure_is_drawn_and_linked_from_the_page(tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    for case, rows in (("linear", _linear_rows()), ("scaling", _scaling_rows()), ("train_step", _step_rows())):
        _write(tmp_path, _result(case, rows))
    drawn = figures.draw_all(page.all_results(tmp_path), tmp_path / "benchmarks" / "figures")
    text = page.page(tmp_path)
    assert {path.name for path in drawn} == {"cpu-linear.png", "cpu-train-step.png", "cpu-active.png"}
    for path in drawn:
        assert path.read_bytes().startswith(b"\x89PNG")
        assert f"(figures/{path.name})" in text


def test_the_proof_on_a_gpu_is_reported_by_its_parts(tmp_path: Path) -> None:
    parts = {
        "tests": {"state": "ok", "seconds": 41.2, "counts": {"passed": 12, "failed": 0}},
        "sanitizer": {"state": "cut", "seconds": 80.0, "runs": {"memcheck": {"state": "ok"}}},
        "profile": {"state": "ok", "seconds": 9.0, "kernels": [{"kernel": "_kernel", "duration": "212 us"}]},
    }
    proof = {**_result("proof", []), "parts": parts}
    del proof["rows"]
    _write(tmp_path, _result("linear", _linear_rows()))
    _write(tmp_path, proof)
    text = page.page(tmp_path)
    assert "| tests | ok | 41 | passed: 12, failed: 0 |" in text
    assert "| sanitizer | cut | 80 | memcheck: ok |" in text
    assert "| `_kernel` | 212 us |" in text


def test_a_damaged_file_of_the_demo_is_named(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for text in ("{", "[]", '{"runs": [{}]}'):
        (tmp_path / "docs" / "demo.json").write_text(text)
        with pytest.raises(BenchmarkError, match=r"demo.json is not what `slora demo` writes"):
            page.filled(TEXT, tmp_path)


def test_nothing_is_written_where_one_text_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("no marks")
    with pytest.raises(BenchmarkError):
        page.write(tmp_path, print)
    assert not (tmp_path / "benchmarks" / "README.md").exists()
