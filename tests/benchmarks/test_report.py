"""What people read is what the result files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from benchmarks.report import figures, page, tables
from benchmarks.results import RESULTS, SCHEMA, TIMES, BenchmarkError, read_result
from benchmarks.targets import judged

MARKS = "".join(
    f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in ("demo-table", "train-step-table", "works-with")
)
RESULT_FILES = sorted(RESULTS.glob("*/*.json"))
POINT = {"model": "a model", "batch": 2, "r": 16, "precision": "bf16", "mode": "eager"}
NAMES = ("frozen, dx everywhere", "PEFT, all", "slora, all active")


def _spread(value: float) -> dict[str, Any]:
    return {"median": value, "p20": 0.9 * value, "p80": 1.1 * value, "n": 5}


def _steps(**row: Any) -> list[dict[str, Any]]:
    return [{"point": POINT, "contender": name, "seconds": _spread(1.0 + i), **row} for i, name in enumerate(NAMES)]


def _result(case: str, rows: list[dict[str, Any]], **content: Any) -> dict[str, Any]:
    environment = {
        "commit": "0123456789abcdef", "dirty": False, "date": "2026-01-02T03:04:05+00:00", "device": "a device",
        "packages": {"torch": "2.11.0", "peft": "0.21.2"}, "threads": 2,
    }  # fmt: skip
    return {"schema": SCHEMA, "case": case, "complete": True, "environment": environment, "rows": rows, **content}


def _write(root: Path, device: str, result: dict[str, Any]) -> None:
    folder = root / "benchmarks" / "results" / device
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{result['case']}.json").write_text(json.dumps(result))


def _pages(root: Path) -> dict[str, str]:
    (root / "README.md").write_text(MARKS)
    return {str(path.relative_to(root)): text for path, text in page.texts(root).items()}


def test_the_texts_in_the_tree_are_what_the_result_files_give() -> None:
    assert page.stale() == [], "run: python -m benchmarks report"


@pytest.mark.parametrize("path", RESULT_FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_committed_result_has_a_clean_commit_its_single_times_and_every_time_in_a_table(path: Path) -> None:
    content = read_result(path)
    assert content["environment"]["dirty"] is False, "measured from changed source: commit, and measure it again"
    text = tables.case_table(content["case"], content["rows"]) if "rows" in content else ""
    for row in content.get("rows", ()):
        for name in TIMES & row.keys():
            assert len(row[name].get("values", ())) == row[name]["n"], "without its single times: measure it again"
            assert f"| {row['contender']} |" in text
            assert f"| {tables.cell(row, name)} |" in text or name not in tables.MEASURES


def test_what_has_no_result_is_not_measured(tmp_path: Path) -> None:
    texts = _pages(tmp_path)
    assert texts["README.md"].lower().count("not measured.") == 3
    assert "old" not in texts["README.md"]
    first = texts["benchmarks/README.md"]
    assert "0 targets are met, 0 missed" in first
    # The targets of both GPUs once, with all their points.
    assert (
        first.count("| nvidia-h100, nvidia-h200 | linear, none active, over frozen | K 768, N 768; K 768, N 3072; ")
        == 1
    )
    assert first.count("nvidia-h200 | linear,") < first.count("nvidia-h200") < len(judged({}, ["nvidia-h200"]))


def test_the_first_page_answers_its_three_questions_for_every_measured_device(tmp_path: Path) -> None:
    _write(tmp_path, "cpu", _result("train_step", _steps()))
    _write(tmp_path, "nvidia-h200", _result("train_step", _steps(peak_memory_mib=300.0)))
    text = _pages(tmp_path)["benchmarks/README.md"]
    assert "| slora, all active | 3.00 s [2.70, 3.30] | 1.50 | 3.00 s [2.70, 3.30] | 1.50 |" in text
    assert "| slora, all active | - | - | 300 | 1.00 |" in text
    assert "| a training step, all blocks active | the frozen model" in text
    assert " its first layer | 3.00 | 3.00 |" in text
    assert "![One training step on nvidia-h200](figures/nvidia-h200-train-step.png)" in text


def test_memory_of_another_machine_is_not_beside_the_times(tmp_path: Path) -> None:
    memory = _result("train_memory", [{**row, "peak_memory_mib": 123.0} for row in _steps()])
    memory["environment"]["commit"] = "fedcba9876543210"
    for result in (_result("train_step", _steps()), memory):
        _write(tmp_path, "cpu", result)
    text = _pages(tmp_path)["README.md"]
    assert "| slora, all active | 3.00 s [2.70, 3.30] (1.50) | 123 |" in text
    assert (
        "commit 0123456789. Peak memory is\nthat of a process of its own, libraries included; commit fedcba9876" in text
    )
    memory["environment"]["device"] = "another device"
    _write(tmp_path, "cpu", memory)
    assert "| slora, all active | 3.00 s [2.70, 3.30] (1.50) |\n" in _pages(tmp_path)["README.md"]


def test_times_of_two_clocks_have_no_ratio_and_the_reason_is_named(tmp_path: Path) -> None:
    rows = _steps(clock="graph")
    rows[2] |= {"clock": "events", "not_captured": "it reads the host"}
    rows.append({"point": POINT, "contender": "PEFT, few", "failed": "no compiler"})
    _write(tmp_path, "nvidia-h200", _result("train_step", rows, complete=False))
    texts = _pages(tmp_path)
    assert "| slora, all active | 3.00 s [2.70, 3.30] (-) |" in texts["README.md"]
    text = texts["benchmarks/results/nvidia-h200.md"]
    assert (
        "* slora, all active: launched call by call, not captured in a CUDA graph: it reads the host (1 of 1 points)"
        in text
    )
    assert "* PEFT, few: failed: no compiler (1 of 1 points)" in text
    assert "**Incomplete: the time was up before the grid was.**" in text


def test_the_gpu_validation_is_reported_by_its_parts(tmp_path: Path) -> None:
    parts = {
        "tests": {"state": "ok", "seconds": 41.2, "counts": {"passed": 12, "failed": 0}},
        "sanitizer": {"state": "cut", "seconds": 80.0, "left_out": {"racecheck": "the time was up"}},
        "profile": {"state": "ok", "seconds": 9.0, "kernels": [{"kernel": "_kernel", "duration": "212 us"}]},
    }
    validation = _result("proof-second", [], parts=parts)
    del validation["rows"]
    _write(tmp_path, "nvidia-h200", validation)
    text = _pages(tmp_path)["benchmarks/results/nvidia-h200.md"]
    assert "| tests | ok | 41 | passed: 12, failed: 0 |" in text
    assert "| sanitizer | cut | 80 | left out: racecheck (the time was up) |" in text
    assert "| _kernel | 212 us |" in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "1.00 s [0.900, 1.10]"), (0.9996, "1000 ms [900, 1100]"), (2e-7, "0.200 µs [0.180, 0.220]")],
)
def test_a_time_has_three_digits_and_its_percentiles_the_same_unit(value: float, text: str) -> None:
    assert tables.cell({"seconds": _spread(value)}, "seconds") == text


def test_every_figure_is_linked_and_a_bar_is_a_median_with_its_percentiles(tmp_path: Path) -> None:
    results = page.all_results()
    drawn = {path.name for path in figures.draw_all(results, tmp_path)}
    assert drawn == {file for device, cases in results.items() for file, _ in figures.links(device, cases).values()}
    assert drawn == {path.name for path in (RESULTS.parent / "figures").iterdir()}
    figure = Figure()
    figures.draw_bars(figure, {"time": _steps()})
    bars = [item for item in figure.axes[0].containers if getattr(item, "errorbar", None)]
    assert [bar.patches[0].get_width() for bar in bars] == [1.0, 2.0, 3.0]
    (ends,) = [segment[:, 0] for segment in bars[2].errorbar[2][0].get_segments()]
    assert list(ends) == pytest.approx([2.7, 3.3])


def test_damaged_files_are_named_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(MARKS.replace("<!-- /works-with -->", ""))
    with pytest.raises(BenchmarkError, match=r"README.md needs one table between <!-- works-with --> and"):
        page.write(tmp_path)
    (tmp_path / "docs").mkdir()
    (tmp_path / "docs" / "demo.json").write_text('{"runs": [{}]}')
    with pytest.raises(BenchmarkError, match=r"demo.json is not what `slora demo` writes"):
        page.write(tmp_path)
    census = _result("compatibility", [], complete=False)
    _write(tmp_path, "", census)
    with pytest.raises(BenchmarkError, match="of an interrupted census; run: python -m benchmarks compatibility"):
        page.write(tmp_path)
    assert not (tmp_path / "benchmarks" / "README.md").exists()
