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
    # Bars of other devices say nothing about this one.
    assert not any("cpu" in line for line in lines[1:-1])


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
