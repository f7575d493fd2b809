"""What people read is what the result files say."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from matplotlib.figure import Figure

from benchmarks.report import figures, page, tables
from benchmarks.results import RESULTS, SCHEMA, TIMES, BenchmarkError, read_result

MARKS = "".join(
    f"<!-- {name} -->\nold\n<!-- /{name} -->\n" for name in ("demo-table", "train-step-table", "works-with")
)
RESULT_FILES = sorted(RESULTS.glob("*/*.json"))
POINT = {"model": "a model", "batch": 2, "r": 16, "precision": "bf16", "mode": "eager"}


def _steps(**measures: Any) -> list[dict[str, Any]]:
    """Rows of a training step: times of 1, 2 and 3 s."""
    times = [{"median": i, "p20": 0.9 * i, "p80": 1.1 * i, "n": 5} for i in (1.0, 2.0, 3.0)]
    names = ("frozen, dx everywhere", "PEFT, all", "slora, all active")
    return [{"point": POINT, "contender": n, "seconds": t, **measures} for n, t in zip(names, times, strict=True)]


def _pages(root: Path, results: dict[str, dict[str, Any]]) -> dict[str, str]:
    """The pages of `results`, by device and case."""
    for device, cases in results.items():
        folder = root / "benchmarks" / "results" / device
        folder.mkdir(parents=True, exist_ok=True)
        for case, content in cases.items():
            about = {"commit": f"{case:0<40}", "dirty": False, "date": "2026-01-02", "device": "a device",
                     "packages": {}}  # fmt: skip
            whole = {"schema": SCHEMA, "case": case, "complete": True, "environment": about, **content}
            (folder / f"{case}.json").write_text(json.dumps(whole))
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
            assert f"| {tables.cell(row, name)} |" in text


def test_what_has_no_result_is_not_measured(tmp_path: Path) -> None:
    texts = _pages(tmp_path, {})
    assert "old" not in texts["README.md"]
    assert texts["README.md"].lower().count("not measured.") == 3
    first = texts["benchmarks/README.md"]
    assert "0 targets are met, 0 missed" in first
    assert first.count("linear, none active, over frozen;") == 2


def test_the_first_page_answers_its_three_questions_for_every_measured_device(tmp_path: Path) -> None:
    gpu = _steps(peak_memory_mib=300.0)
    texts = _pages(tmp_path, {"cpu": {"train_step": {"rows": _steps()}}, "nvidia-h200": {"train_step": {"rows": gpu}}})
    first = texts["benchmarks/README.md"]
    assert "| slora, all active | 3.00 s [2.70, 3.30] | 1.50 | 3.00 s [2.70, 3.30] | 1.50 |" in first
    assert "| slora, all active | - | - | 300 | 1.00 |" in first
    assert "its first layer | 3.00 | 3.00 |" in first
    assert "![One training step on nvidia-h200](figures/nvidia-h200-train-step.png)" in first


def test_a_device_page_gives_the_reason_of_what_is_missing_and_no_ratio_of_two_clocks(tmp_path: Path) -> None:
    rows = [*_steps(clock="graph"), {"point": POINT, "contender": "PEFT, few", "failed": "no compiler"}]
    rows[2] |= {"clock": "events", "not_captured": "it reads the host"}
    tests = {"state": "cut", "seconds": 41.2, "counts": {"passed": 12}, "reason": "the time was up"}
    profile = {"state": "ok", "seconds": 9.0, "kernels": [{"kernel": "_kernel", "duration": "212 us"}]}
    validation = {"parts": {"tests": tests, "profile": profile}}
    results = {"nvidia-h200": {"train_step": {"rows": rows, "complete": False}, "gpu-second": validation}}
    texts = _pages(tmp_path, results)
    assert "| slora, all active | 3.00 s [2.70, 3.30] (-) |" in texts["README.md"]
    for line in (
        "| slora, all active | 3.00 s [2.70, 3.30] | - | - |",
        "* not captured: slora, all active: it reads the host",
        "* failed: PEFT, few: no compiler",
        "**Incomplete: the time was up before the grid was.**",
        "| tests | cut | 41 | passed: 12, the time was up |",
        "| _kernel | 212 us |",
    ):
        assert f"{line}\n" in texts["benchmarks/results/nvidia-h200.md"]


@pytest.mark.parametrize(("value", "text"), [(1.0, "1.00 s"), (0.9996, "1000 ms"), (2e-7, "0.200 µs")])
def test_a_time_has_three_digits_and_the_unit_that_suits_it(value: float, text: str) -> None:
    assert tables.cell({"seconds": value}, "seconds") == text


def test_every_figure_is_linked_and_a_bar_is_a_median_with_its_percentiles(tmp_path: Path) -> None:
    results = page.all_results()
    drawn = {path.name for path in figures.draw_all(results, tmp_path)}
    assert drawn == {file for device, cases in results.items() for file, _ in figures.links(device, cases).values()}
    # Those of the selection strategies have a test of their own.
    kept = {path.name for path in (RESULTS.parent / "figures").iterdir()}
    assert drawn == {name for name in kept if not name.startswith("selection-")}
    figure = Figure()
    figures.draw_bars(figure, {"time": _steps()})
    bars = [item for item in figure.axes[0].containers if getattr(item, "errorbar", None)]
    assert [bar.patches[0].get_width() for bar in bars] == [1.0, 2.0, 3.0]
    (ends,) = [segment[:, 0] for segment in bars[2].errorbar[2][0].get_segments()]
    assert list(ends) == pytest.approx([2.7, 3.3])


def test_a_mark_that_is_missing_is_named_and_nothing_is_written(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text(MARKS.replace("<!-- /works-with -->", ""))
    with pytest.raises(BenchmarkError, match=r"README.md needs one table between <!-- works-with --> and"):
        page.write(tmp_path)
    assert not (tmp_path / "benchmarks" / "README.md").exists()
