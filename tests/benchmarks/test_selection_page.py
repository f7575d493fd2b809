"""What the page of the selection strategies says: numbers of the table, and a paragraph that follows from them."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from statistics import fmean, stdev
from typing import Any

import pytest

from benchmarks.report import page, selection, tables
from benchmarks.selection import lines, verdicts
from benchmarks.selection.engine import Case
from benchmarks.selection.retention import retention_rows
from benchmarks.selection.rows import ALL, LINEAR, Row, rows
from benchmarks.selection.store import Store

pytestmark = pytest.mark.once

TASKS = ("digits", "inverted", "noisy", "mnist")
# Points over the curve of `_curve` of each row, and their change from seed to seed; the others are 3 below it.
OVER = {"budget-solo 11 %": (2.0, 0.1), "gates 4 %": (0.05, 0.5), "last 11 %": (-0.5, 0.1), "last 4 %": (0.5, 0.1)}


def _curve(lost: float) -> float:
    """The target of the fake plain LoRA, scaled: a straight line from the linear probe on."""
    return 60.0 + 5.0 * lost


def _measures(target: float, lost: float) -> dict[str, Any]:
    return {"target": target, "nll": 2 - target / 100, "lost": {"knn": lost - 0.5, "head": lost + 0.5}, "drift": 0.1}


def _run(row: Row, seed: int) -> dict[str, Any]:
    """A run that lies where `OVER` puts it."""
    over, spread = OVER.get(row.name, (-3.0, 0.1))
    lost = {"all": 4.0, "linear": 0.0}.get(row.strategy, 1.0 + 2 * (row.share or 0.0))
    off = 0.0 if row in (ALL, LINEAR) else over + spread * (-1) ** seed
    return {
        **_measures(_curve(lost) + off, lost), "active": 4, "blocks": 36, "ranks": 64, "kept": 970 + 64 * 192,
        "flops": 10**12 if seed == 0 else None, "seconds": 10.0,
        "scaled": [{"scale": scale, **_measures(_curve(4 * scale), 4 * scale)} for scale in row.configuration.scales],
    }  # fmt: skip


@pytest.fixture
def store(tmp_path: Path) -> Store:
    """Runs of all rows with four seeds, on all shifts of the demo."""
    store = Store(tmp_path / "benchmarks" / "results" / "selection")
    store.folder.mkdir(parents=True)
    for task in TASKS:
        made = [_line(task, row, seed) for row in rows() for seed in range(4)]
        store.path(task).write_text("".join(json.dumps(run) + "\n" for run in made))
    return store


def _line(task: str, row: Row, seed: int) -> dict[str, Any]:
    asked = Case(task, row.configuration, seed).asked()
    asked["settings"] |= {"lr": 7e-3} | ({row.weight: 2.0} if row.weight else {})
    return {**asked, "commit": "abc", "versions": "torch 2", **_run(row, seed)}


def _values(cell: str) -> tuple[float, float]:
    mean, _, error = cell.rstrip(" ▲▼").partition(" ± ")
    return float(mean), float(error)


def test_over_scaled_lora_is_the_target_less_the_curve_where_it_forgets_as_much(store: Store) -> None:
    found = {line.row.name: line for line in lines.lines(store, rows(), ["noisy"]) if line.scale == 1}
    for name, (over, spread) in OVER.items():
        assert found[name].values["over"] == pytest.approx([over + spread * (-1) ** seed for seed in range(4)])
        assert found[name].values["over nll"] == pytest.approx([-v / 100 for v in found[name].values["over"]])
    assert not found["all"].values["over"]


def test_over_several_tasks_the_mean_of_the_runs_is_compared_with_the_mean_curve(store: Store) -> None:
    # One task lies 4 points further right and another as much further left, beyond the end of their curves.
    for task, moved in (("noisy", 4.0), ("mnist", -4.0)):
        for run in [run for run in store.runs(task) if run["row"] == "budget-solo 11 %"]:
            store.add(run | {"lost": {name: value + moved for name, value in run["lost"].items()}})
    (line,) = [line for line in lines.lines(store, rows(), ["noisy", "mnist"]) if line.row.name == "budget-solo 11 %"]
    assert fmean(line.values["over"]) == pytest.approx(2.0)
    assert fmean(line.values["lost"]) == pytest.approx(1.22)


@pytest.mark.parametrize(("at", "highest"), [(0.0, 60.0), (0.5, 62.5), (2.0, 70.0), (9.0, 70.0), (-1.0, 60.0)])
def test_a_curve_is_read_off_where_no_more_is_forgotten(at: float, highest: float) -> None:
    # More forgetting for less of the target, as at the last point, is not on the line to beat.
    assert lines.read_off([(1.0, 65.0), (0.0, 60.0), (4.0, 50.0), (2.0, 70.0)], at) == highest
    assert lines.read_off([(1.0, -65.0), (0.0, -60.0), (4.0, -50.0), (2.0, -70.0)], at, least=True) == -highest


def test_the_paragraph_says_what_the_table_gives(store: Store) -> None:
    shown = selection.page(store)
    (scope,) = [scope for scope in shown["scopes"] if scope.name == "demo"]
    head = selection.heads(scope).index("over scaled LoRA")
    table = {f"{cells[0]} {cells[1]}": cells for cells in shown["rows"]["demo"] if cells[head]}
    said = verdicts.paragraph(scope.found)
    better = [name for name, cells in table.items() if (pair := _values(cells[head]))[0] > 2 * pair[1]]
    worse = [name for name, cells in table.items() if (pair := _values(cells[head]))[0] < -2 * pair[1]]
    assert sorted(better) == ["budget, solo gain 11 %", "last 4 %"]
    assert said.startswith(f"Of {len(table)} rows {len(better)} have more of the target than scaled LoRA")
    for name in better:
        mean, error = _values(table[name][head])
        assert f"{name} ({mean:+.2f} ± {error:.2f})" in said
        assert table[name][head].endswith("▲")
    assert f"{len(worse)} have less, from last 11 % (-0.50 ± 0.06) to " in said
    assert "1 are not told apart from it." in said
    assert "gates 4 %" not in said
    # 2.0 over the curve against -0.5 of the last blocks; at 4 % nothing beats them.
    assert "At 11 %, better than the best fixed rule (last): budget, solo gain (+2.50); worse: gates" in said
    assert "At 4 %, better than the best fixed rule (last): none; worse: budget, solo gain" in said


def test_a_verdict_needs_three_seeds_and_two_standard_errors(store: Store) -> None:
    def of(*values: float) -> lines.Line:
        return lines.Line(ALL, 1.0, tuple(range(len(values))), {"over": [*values]}, ())

    assert verdicts.verdict(of(1.0, 1.1)) == "too few seeds"
    for values in ((1.0, 1.1, 1.2), (-1.0, -1.1, -0.9), (1.0, 0.0, 0.1), (0.9, 0.2, 0.1, 0.5)):
        beyond = abs(fmean(values)) > 2 * stdev(values) / math.sqrt(len(values))
        expected = ("better" if fmean(values) > 0 else "worse") if beyond else "not told apart"
        assert verdicts.verdict(of(*values)) == expected


def test_runs_of_other_settings_and_seeds_that_a_task_lacks_are_not_shown(store: Store) -> None:
    def change(task: str, run: Callable[[dict[str, Any]], dict[str, Any] | None]) -> None:
        kept = [changed for each in store.runs(task) if (changed := run(each)) is not None]
        store.path(task).write_text("".join(json.dumps(each) + "\n" for each in kept))

    change("noisy", lambda run: None if run["row"] == "last 4 %" and run["seed"] == 2 else run)
    change("mnist", lambda run: run | {"settings": {"budget": 3}} if run["row"] == "first 4 %" else run)
    found = {line.row.name: line for line in lines.lines(store, rows(), TASKS)}
    assert found["last 4 %"].seeds == (0, 1, 3)
    assert "first 4 %" not in found
    assert "* mnist: first 4 %\n" in page.render("selection.md.j2", **selection.page(store))


def test_a_page_has_a_table_per_task_and_one_over_all_and_every_figure_that_it_links(
    store: Store, tmp_path: Path
) -> None:
    text = page.render("selection.md.j2", **selection.page(store))
    assert text.count("| strategy |") == 5
    drawn = {path.name for path in selection.draw_all(store, tmp_path)}
    assert drawn == set(re.findall(r"figures/(\S+\.png)\)", text))
    assert len(drawn) == 5
    assert text.count(" all (plain LoRA), scaled by 0.5 ") == 5


def test_without_a_probe_the_line_to_beat_begins_at_the_pretrained_model(store: Store) -> None:
    for task in TASKS:
        runs = [run for run in store.runs(task) if run["row"] != "linear"]
        store.path(task).write_text("".join(json.dumps(run) + "\n" for run in runs))
    found = {line.row.name: line for line in lines.lines(store, rows(), ["noisy"])}
    assert not found["budget-solo 11 %"].values["over"]
    for run in [run for run in store.runs("noisy") if run["row"] == "all"]:
        store.add(run | {"scaled": [{"scale": 0.0, **_measures(_curve(0.0), 0.0)}, *run["scaled"]]})
    again = lines.lines(store, rows(), ["noisy"])
    assert again[0].label == "pretrained model"
    assert lines.wise(again)[0] == (0.0, _curve(0.0))
    (line,) = [line for line in again if line.row.name == "budget-solo 11 %"]
    assert fmean(line.values["over"]) == pytest.approx(2.0)


def test_the_page_of_retention_shows_its_rows_with_their_weights_beside_those_to_beat(
    store: Store, tmp_path: Path
) -> None:
    assert "* noisy: all rows\n" in page.render("retention.md.j2", **selection.page(store, "retention"))
    for row in retention_rows():
        if row.strategy in ("l2", "distil-old"):
            for seed in range(4):
                store.add(_line("noisy", row, seed))
    shown = selection.page(store, "retention")
    (scope,) = [scope for scope in shown["scopes"] if scope.name == "noisy"]
    assert [(line.row.name, line.scale) for line in scope.found if line.scale == 1] == [
        (name, 1.0)
        for name in (
            "all", "linear", "all + distil-old", "all + l2", "budget-solo 11 %", "budget-solo 11 % + distil-old",
            "budget-solo 11 % + l2",
        )
    ]  # fmt: skip
    text = page.render("retention.md.j2", **shown)
    assert text.startswith("# What keeps old knowledge\n\nWritten by")
    assert "selection --table retention --tune" in text
    assert "* noisy: all rows\n" not in text
    assert "| L2 to the base | 11 % | 4 | 64 | 4 | 0.007, 2 | " in text
    assert "distillation, old 100 % (" in verdicts.paragraph(scope.found)
    drawn = {path.name for path in selection.draw_all(store, tmp_path)}
    assert set(re.findall(r"figures/(\S+\.png)\)", text)) == {name for name in drawn if name.startswith("retention-")}


def test_without_runs_there_is_no_page(tmp_path: Path) -> None:
    assert selection.page(Store(tmp_path)) == {}
    assert tables.table(["a"], [["b"]]) == "| a |\n| --- |\n| b |"
