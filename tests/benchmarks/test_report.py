"""What people read is what the result files give."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import targets
from benchmarks.report import figures, layer_figures, page, step_figure, style, summary, tables
from benchmarks.results import RESULTS, SCHEMA, TIMES, BenchmarkError, results_in, spread

TEXT = (
    "a\n<!-- demo-table -->\nold\n<!-- /demo-table -->\nb\n<!-- train-step-table -->\n<!-- /train-step-table -->\n"
    "<!-- works-with -->\nold\n<!-- /works-with -->\nc\n"
)


def _spread(value: float) -> dict[str, float]:
    return {"median": value, "p20": 0.9 * value, "p80": 1.1 * value, "n": 5}


def _result(case: str, rows: list[dict[str, Any]]) -> dict[str, Any]:
    environment: dict[str, Any] = {
        "commit": "0123456789abcdef", "dirty": False, "date": "2026-01-02T03:04:05+00:00", "device": "a processor",
        "packages": {"torch": "2.11.0", "peft": "0.21.2"}, "threads": 2,
    }  # fmt: skip
    ceilings = {"gemm_flops_per_s": {"fp32": 1e11}, "copy_bytes_per_s": 1e10}
    return {"schema": SCHEMA, "case": case, "device": "cpu", "complete": True, "environment": environment,
            "settings": {}, "ceilings": ceilings, "rows": rows}  # fmt: skip


def _write(root: Path, result: dict[str, Any], device: str = "cpu") -> None:
    folder = root / "benchmarks" / "results" / device
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
    rows: list[dict[str, Any]] = []
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
    assert text.count(page.NONE) == 3
    assert "\nGPU: not measured.\n" in text
    assert "old" not in text
    assert text.startswith("a\n")
    assert text.endswith("c\n")
    text = page.page(tmp_path)
    assert "Not measured: linear, train_step" in text
    # No bar is met or missed by what stands elsewhere.
    assert "| met |" not in text
    assert "| missed |" not in text


def test_the_demo_table_holds_means_and_spreads_of_its_runs(tmp_path: Path) -> None:
    plain = {"active": 36, "blocks": 36, "kept": 1000, "flops": 2e12, "seconds": 3.0, "shift": "digits", "scaled": []}
    runs = [
        {**plain, "method": method, "seed": seed, "accuracy": accuracy, "nll": 0.6, "knn": lost, "head": lost}
        for method, seed, accuracy, lost in (
            ("head-first", 0, 0.97, 2.0), ("head-first", 1, 0.99, 4.0),
            ("selective-distilled", 0, 0.965, 1.0), ("selective-distilled", 1, 0.985, 1.0),
        )
    ]  # fmt: skip
    (tmp_path / "docs").mkdir()
    about = {"processor": "a processor", "processes": 2, "slora": "0.1.0", "torch": "2.11.0"}
    before = {"knn": 0.99, "head": 0.995}
    demo = {"environment": about, "source_before": before, "shifts": ["digits"], "runs": runs}
    (tmp_path / "docs" / "demo.json").write_text(json.dumps(demo))
    text = page.filled(TEXT, tmp_path)
    figures = "36 | 98.00 ± 1.41 | 0.600 ± 0.000 | 3.00 ± 1.41 | 3.00 ± 1.41 | 1,000 | 2.00 | 3.0"
    assert f"| head first, LoRA on all | {figures} |" in text
    assert "Means over digits; standard deviation over 2 seeds. From `docs/demo.json`: a processor" in text
    assert "99.00 % of letters by k-NN, 99.50 % by the original head" in text
    assert "* With 64 unlabelled letters, exactly 4 blocks: " in text
    assert "at most 40 % of its forgetting: met. -0.50 ± 0.00 points on the target" in text


def test_a_readme_without_its_marks_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BenchmarkError, match="demo-table"):
        page.filled("nothing marked here", tmp_path)


def test_a_case_table_gives_ratios_to_the_limit_and_the_reason_of_what_is_missing() -> None:
    text = tables.case_table(_result("linear", _linear_rows()))
    (line,) = [line for line in text.splitlines() if "| slora, torch |" in line]
    assert "| 125 ms [112, 138] | 250 ms [225, 275] | 1.25 |" in line
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
    assert "* inputs: not rotated past the cache: a call touches enough (1 of 1 points)" in text
    rows[0]["not_counted"] = "no formula"
    text = tables.case_table(_result("train_step", rows))
    assert "* frozen, dx everywhere; PEFT, all: not counted: no formula (1 of 1 points)" in text


def test_the_page_says_where_the_model_of_costs_fails(tmp_path: Path) -> None:
    rows = _scaling_rows()
    # The prediction of the update is 0.04 s; only at the last point all percentiles are far from it.
    for row, deviation in zip((rows[1], rows[3], rows[5]), (0.3, 0.6, 0.9), strict=True):
        row.update(update_deviation=deviation, update_seconds=_spread(0.04 * (1 + deviation)))
    _write(tmp_path, _result("scaling", rows))
    text = page.page(tmp_path)
    assert "| +60% [+44%, +76%] |" in text
    assert (
        "off by more than 50% of its prediction, percentiles and all, at 1 of 3 points: "
        "curve active, active 16/16 (slora, torch, +90% [+71%, +109%])."
    ) in text


@pytest.mark.parametrize(
    ("value", "text"),
    [(1.0, "1.00 s [0.900, 1.10]"), (0.9996, "1000 ms [900, 1100]"), (2e-7, "0.200 µs [0.180, 0.220]")],
)
def test_a_time_has_three_digits_and_its_percentiles_the_same_unit(value: float, text: str) -> None:
    assert tables.seconds(_spread(value)) == text


def test_a_table_says_of_which_machine_source_and_repetitions_it_is() -> None:
    result = _result("linear", _linear_rows())
    assert tables.origin(result).startswith("a processor; torch 2.11.0, peft 0.21.2; commit 0123456789; 2026-01-02.")
    assert tables.origin(result).endswith("the median of 5 repetitions, in brackets their 20th and 80th percentile.")
    result["environment"]["dirty"] = True
    result["rows"][0]["forward"]["n"] = 3
    assert "; commit 0123456789 with changes; " in tables.origin(result)
    assert "the median of 3 to 5 repetitions" in tables.origin(result)


def test_numbers_of_two_machines_share_no_table_and_those_of_two_commits_say_so(tmp_path: Path) -> None:
    step = _result("train_step", _step_rows())
    memory = _result("train_memory", [{**row, "peak_memory_mib": 123.0} for row in _step_rows()])
    memory["environment"]["commit"] = "fedcba9876543210"
    text = summary.train_step_table(step, memory)
    assert "| 123 MiB |" in text
    assert "; commit 0123456789. " in text
    assert "; commit fedcba9876. " in text
    heading = figures.heading(figures.FIGURES["train-step"], {"train_step": step, "train_memory": memory})
    assert "a processor, commit 0123456789, memory: commit fedcba9876\n" in heading
    _write(tmp_path, memory)
    results = tmp_path / "benchmarks" / "results" / "cpu"
    point = {"model": "vit_small_patch16_224", "batch": 16, "mode": "eager", "precision": "fp32", "r": 16}
    for row in memory["rows"] + step["rows"]:
        row["point"] = point
    for result in (step, memory):
        _write(tmp_path, result)
    machines = list(targets.by_origin(targets.judged({"cpu": results_in(results)}, ["cpu"])))
    assert machines == ["a processor, commit 0123456789", "a processor, commit fedcba9876", "cpu, not measured"]
    memory["environment"]["device"] = "another processor"
    text = summary.train_step_table(step, memory)
    assert "MiB" not in text
    assert "Peak memory was measured on another machine, another processor." in text
    assert all(peak is None for _, peak in step_figure.steps({"train_step": step, "train_memory": memory}).values())
    _write(tmp_path, memory)
    machines = list(targets.by_origin(targets.judged({"cpu": results_in(results)}, ["cpu"])))
    assert machines == ["a processor, commit 0123456789", "another processor, commit fedcba9876", "cpu, not measured"]


def test_a_table_of_a_gpu_takes_the_place_of_what_was_not_measured(tmp_path: Path) -> None:
    rows = [{**row, "clock": "events", "peak_memory_mib": 300.0 + i} for i, row in enumerate(_step_rows())]
    for row in _step_rows():
        graph = {**row, "point": {**row["point"], "mode": "graph"}, "seconds": _spread(0.5), "clock": "graph"}
        rows.append(graph if "slora" not in row["contender"] else {**graph, "clock": "events", "not_captured": "why"})
    # Of another model: not in the table, not even where the first has nothing.
    rows.append({**_step_rows()[0], "point": {**rows[0]["point"], "model": "another"}, "contender": "full"})
    result = _result("train_step", rows)
    result["environment"]["device"] = "a GPU"
    _write(tmp_path, _result("linear", _linear_rows()), "nvidia-h200")
    text = page.filled(TEXT, tmp_path)
    assert "GPU: not measured" not in text
    assert "nvidia-h200: the training step was not measured; what was measured is linear." in text
    _write(tmp_path, result, "nvidia-h200")
    text = page.filled(TEXT, tmp_path)
    assert "GPU: not measured" not in text
    assert ". a GPU, torch 2.11.0; commit 0123456789. " in text
    assert "|  | fp32 | fp32, CUDA graph | fp32, peak |" in text
    (line,) = [line for line in text.splitlines() if "slora, all active |" in line]
    # No ratio of times that were taken by different clocks.
    assert line.endswith("| 3.00 s [2.70, 3.30] (1.50) | 500 ms [450, 550] (-) | 302 MiB |")
    assert "but launched call by call: slora, all active in fp32, CUDA graph." in text
    assert "| full |" not in text


def test_a_row_that_was_not_captured_is_named_with_its_clock_and_the_reason() -> None:
    rows = _linear_rows()
    rows[1].update(clock="events", not_captured="reads the host", forward_clock="events", forward_not_captured="so")
    text = tables.case_table(_result("linear", rows))
    note = "launched call by call, not captured in a CUDA graph, clock 'events'"
    assert f"* slora, torch: {note}: reads the host (1 of 1 points)" in text
    assert f"* slora, torch, forward: {note}: so (1 of 1 points)" in text


def test_what_no_formula_is_known_for_is_a_dash() -> None:
    rows = _linear_rows()
    for row in rows[:2]:
        row.update(flops=1e9, bytes=2e6, percent_of_gemm=50.0, percent_of_copy=20.0)
    rows[2].update(flops=1e9, percent_of_gemm=50.0)
    (line,) = [line for line in tables.case_table(_result("linear", rows)).splitlines() if "| PEFT |" in line]
    assert line.endswith("| 2.50 | 1.00 | - | 50 | - |")


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


def test_a_bar_of_a_figure_is_a_median_with_its_percentiles() -> None:
    pytest.importorskip("matplotlib")
    plots = style.pyplot()
    figure = layer_figures.draw_over_frozen(plots, layer_figures.over_frozen({"linear": _result("", _linear_rows())}))
    drawn = [item for item in figure.axes[0].containers if hasattr(item, "errorbar") and item.errorbar]
    assert [bar.patches[0].get_height() for bar in drawn] == pytest.approx([1.25, 2.5])
    for bar in drawn:
        height = bar.patches[0].get_height()
        (ends,) = [segment[:, 1] for segment in bar.errorbar[2][0].get_segments()]
        assert sorted(ends) == pytest.approx([0.9 * height, 1.1 * height])
    plots.close(figure)


def test_figures_name_what_they_are_of_in_words() -> None:
    heading = figures.heading(figures.FIGURES["linear"], {"linear": _result("linear", _linear_rows())})
    assert heading.splitlines() == [
        "One linear layer, all blocks active: 768 inputs, 3,072 outputs, 3,152 rows of x, rank 16, fp32",
        "a processor, commit 0123456789",
        "times: medians, and from the 20th to the 80th percentile",
    ]


def test_the_proof_on_a_gpu_is_reported_by_its_parts(tmp_path: Path) -> None:
    parts = {
        "tests": {"state": "ok", "seconds": 41.2, "counts": {"passed": 12, "failed": 0}},
        "sanitizer": {
            "state": "cut", "seconds": 80.0, "runs": {"memcheck": {"state": "ok"}},
            "left_out": {"racecheck": "the time was up"},
        },
        "profile": {"state": "ok", "seconds": 9.0, "kernels": [{"kernel": "_kernel", "duration": "212 us"}]},
    }  # fmt: skip
    proof = {**_result("proof", []), "parts": parts}
    del proof["rows"]
    _write(tmp_path, _result("linear", _linear_rows()))
    _write(tmp_path, proof)
    text = page.page(tmp_path)
    assert "| tests | ok | 41 | passed: 12, failed: 0 |" in text
    assert "| sanitizer | cut | 80 | memcheck: ok, left out: racecheck (the time was up) |" in text
    assert "| `_kernel` | 212 us |" in text


def test_a_damaged_file_of_the_demo_is_named(tmp_path: Path) -> None:
    (tmp_path / "docs").mkdir()
    for text in ("{", "[]", '{"runs": [{}]}'):
        (tmp_path / "docs" / "demo.json").write_text(text)
        with pytest.raises(BenchmarkError, match=r"demo.json is not what `slora demo` writes"):
            page.filled(TEXT, tmp_path)


@pytest.mark.parametrize(
    ("case", "rows", "message"),
    [
        ("lineal", _linear_rows(), "is of the unknown case 'lineal'; there are linear, train_step"),
        ("linear", [{"point": {"M": 1}, "contender": "a"}], "lacks K in a point, N in a point, active in a point"),
        ("train_step", [], "lacks rows; run the case 'train_step' again"),
    ],
)
def test_a_result_that_the_page_cannot_show_is_named(
    case: str, rows: list[dict[str, Any]], message: str, tmp_path: Path
) -> None:
    _write(tmp_path, _result(case, rows))
    with pytest.raises(BenchmarkError, match=rf"{case}.json .*{message}"):
        page.page(tmp_path)


def test_nothing_is_written_where_one_text_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("no marks")
    with pytest.raises(BenchmarkError):
        page.write(tmp_path, print)
    assert not (tmp_path / "benchmarks" / "README.md").exists()


RESULT_FILES = sorted(RESULTS.glob("*/*.json"))


@pytest.mark.parametrize("path", RESULT_FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_a_result_in_the_tree_is_of_committed_source_and_has_its_single_times(path: Path) -> None:
    content = json.loads(path.read_text(encoding="utf-8"))
    assert content["environment"]["dirty"] is False, "measured from changed source: commit, and measure it again"
    for row in content.get("rows", ()):
        for name in TIMES & row.keys():
            times = row[name]
            assert len(times.get("values", ())) == times["n"], "without its single times: measure it again"


def test_there_are_results_in_the_tree() -> None:
    assert RESULT_FILES


def test_a_precision_that_was_left_out_is_named_with_its_reason() -> None:
    rows = [
        {"point": {"precision": "fp32"}, "contender": "a", "seconds": spread([1.0])},
        *({"point": {"precision": p}, "contender": "a", "skipped": "no bf16 here"} for p in ("bf16", "amp")),
        {"point": {"precision": "fp32"}, "contender": "b", "skipped": "no peft here"},
    ]
    assert summary.left_out(rows) == {"bf16 and amp": "no bf16 here"}
