"""Two result files side by side, and one beside the bars."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bars, compare
from benchmarks.record import SCHEMA, BenchmarkError, spread


def _file(rows: list[dict[str, Any]], case: str = "linear", device: str = "nvidia-h200") -> dict[str, Any]:
    environment = {"commit": "0123456789ab", "dirty": False, "date": "2026-01-02T00:00:00", "device": device,
                   "packages": {}}  # fmt: skip
    return {"schema": SCHEMA, "case": case, "device": device, "environment": environment, "rows": rows}


def _row(contender: str, low: float, middle: float, high: float, **more: Any) -> dict[str, Any]:
    times = {"median": middle, "p20": low, "p80": high, "n": 9}
    return {"point": {"M": 1}, "contender": contender, "forward_backward": times, **more}


def test_only_what_moved_beyond_the_spread_is_named() -> None:
    before = _file([_row("a", 0.9, 1.0, 1.1), _row("b", 0.9, 1.0, 1.1)])
    after = _file([_row("a", 1.05, 1.2, 1.3), _row("b", 1.15, 1.3, 1.4)])
    lines = compare.lines(before, after)
    assert len(lines) == 2
    assert "M: 1 b: forward_backward +30.0%" in lines[1]


def test_numbers_without_a_spread_move_by_more_than_two_percent() -> None:
    assert not compare.beyond_noise(100.0, 101.0)
    assert compare.beyond_noise(100.0, 103.0)


def test_nothing_moved_says_so_and_what_is_in_one_file_only_is_counted() -> None:
    lines = compare.lines(_file([_row("a", 1, 1, 1)]), _file([_row("a", 1, 1, 1), _row("b", 1, 1, 1)]))
    assert lines[1] == "nothing moved beyond noise"
    assert lines[2] == "only in the file after: 1 of 2 measurements"


def test_a_contender_that_can_no_longer_run_is_named() -> None:
    lost = {"point": {"M": 1}, "contender": "a", "failed": "no compiler"}
    assert "a: failed now: no compiler" in compare.lines(_file([_row("a", 1, 1, 1)]), _file([lost]))[1]


def test_files_of_two_cases_are_not_compared() -> None:
    with pytest.raises(BenchmarkError, match="different cases"):
        compare.lines(_file([]), _file([], "merge"))


def test_spread_is_median_and_percentiles() -> None:
    assert spread([5.0, 1.0, 2.0, 3.0, 4.0, 6.0]) == {"median": 3.5, "p20": 2.0, "p80": 5.0, "n": 6}


def _bar_rows(ours: float) -> list[dict[str, Any]]:
    point = {"K": 768, "N": 768, "M": 50432, "r": 16, "active": "1", "dtype": "bf16"}
    return [
        {**_row("frozen F.linear", 1, 1, 1), "point": point},
        {**_row("slora, auto", ours, ours, ours), "point": point},
    ]


@pytest.mark.parametrize(("ours", "word"), [(1.29, "met"), (1.31, "missed")])
def test_a_bar_is_a_ratio_at_one_point(ours: float, word: str, tmp_path: Path) -> None:
    (tmp_path / "linear.json").write_text(json.dumps(_file(_bar_rows(ours))))
    lines = bars.lines(tmp_path)
    (line,) = [line for line in lines if line.startswith("linear, all active, over frozen, K 768, N 768")]
    assert line.endswith(word)
    assert f"{ours:.3f}" in line
    (other,) = [line for line in lines if line.startswith("linear, all active, over frozen, K 768, N 3072")]
    assert other.endswith("not measured")
    # A file that is not whole, or of changed source, is shown as such.
    result = {**_file(_bar_rows(ours)), "complete": False}
    result["environment"]["dirty"] = True
    (tmp_path / "linear.json").write_text(json.dumps(result))
    (line,) = [
        line for line in bars.lines(tmp_path) if line.startswith("linear, all active, over frozen, K 768, N 768")
    ]
    assert line.endswith(f"{word}, incomplete, source with changes")
    # Bars of other devices say nothing about this one.
    assert not any("cpu" in line for line in lines[1:-1])


def test_times_by_different_clocks_are_no_ratio() -> None:
    bar = next(bar for bar in bars.load() if bar.name == "linear, all active, over frozen")
    frozen, ours = _bar_rows(1.1)
    found = bars.value(bar, _file([{**frozen, "clock": "graph"}, {**ours, "clock": "graph"}]))
    assert bars.verdict(bar, found) == "met"
    found = bars.value(bar, _file([{**frozen, "clock": "events"}, {**ours, "clock": "graph"}]))
    assert bars.verdict(bar, found) == "not measured"
    assert found.notes == ("taken by different clocks, graph and events",)


@pytest.mark.parametrize(("count", "word"), [(0, "missed"), (1, "met"), (2, "missed")])
def test_a_merge_starts_exactly_one_kernel(count: int, word: str) -> None:
    bar = next(bar for bar in bars.load() if bar.measure == "launches")
    row = {"point": dict(bar.where), "contender": bar.contender, "launches": count}
    assert bars.verdict(bar, bars.value(bar, _file([row], "merge"))) == word


def test_a_bar_holds_for_the_variants_of_its_device(tmp_path: Path) -> None:
    assert bars.is_device("nvidia-h200-nvl", "nvidia-h200")
    assert not bars.is_device("nvidia-h20", "nvidia-h200")
    assert not bars.is_device("nvidia-h2000", "nvidia-h200")
    result = _file(_bar_rows(1.2), device="nvidia-h200-nvl")
    (tmp_path / "nvidia-h200-nvl").mkdir()
    (tmp_path / "nvidia-h200-nvl" / "linear.json").write_text(json.dumps(result))
    assert "1 met" in bars.lines(tmp_path / "nvidia-h200-nvl")[-1]
    assert sum(found.number is not None for _, found in bars.judged(results=tmp_path)) == 1


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('per = "seconds"\nlimits = [{ at_most = 1 }]', "has the unknown key 'per'"),
        ("limits = [{ most = 1 }]", "needs one of at_most, at_least, exactly"),
        ("limits = [{ at_most = 1, at_least = 0 }]", "needs one of at_most, at_least, exactly"),
    ],
)
def test_a_bar_that_says_something_else_is_refused(text: str, message: str, tmp_path: Path) -> None:
    head = '[[bars]]\nname = "a"\ndevice = "cpu"\ncase = "linear"\nwhere = {}\ncontender = "b"\nmeasure = "seconds"\n'
    (tmp_path / "bars.toml").write_text(head + text)
    with pytest.raises(BenchmarkError, match=message):
        bars.load(tmp_path / "bars.toml")


def test_every_bar_names_a_case_and_contenders_that_exist() -> None:
    from benchmarks.contenders import layer, merge, model
    from benchmarks.registry import CASES

    names = {
        "linear": set(layer.CONTENDERS),
        "train_step": set(model.CONTENDERS),
        "train_memory": set(model.CONTENDERS),
    }
    source = Path(merge.__file__).read_text(encoding="utf-8")
    for bar in bars.load():
        assert bar.case in CASES
        for contender in filter(None, (bar.contender, bar.against)):
            assert contender in names[bar.case] if bar.case in names else f'"{contender}"' in source
        assert isinstance(bar.limit, int | float)
