"""Two result files side by side, and one beside the bars."""

from __future__ import annotations

import itertools
import json
import random
from pathlib import Path
from typing import Any

import pytest

from benchmarks import bars, compare
from benchmarks.results import SCHEMA, BenchmarkError, spread


def _file(rows: list[dict[str, Any]], case: str = "linear", device: str = "nvidia-h200") -> dict[str, Any]:
    environment = {"commit": "0123456789ab", "dirty": False, "date": "2026-01-02T00:00:00", "device": device,
                   "packages": {}}  # fmt: skip
    return {"schema": SCHEMA, "case": case, "device": device, "environment": environment, "rows": rows}


def _row(contender: str, low: float, middle: float, high: float, **more: Any) -> dict[str, Any]:
    times = {"median": middle, "p20": low, "p80": high, "n": 9}
    return {"point": {"M": 1}, "contender": contender, "forward_backward": times, **more}


def _times(middle: float, rows: int, rounds: int, seed: int, noise: float = 0.1) -> dict[str, Any]:
    """A file of `rows` measurements with lognormal noise."""
    draw = random.Random(seed)
    return _file(
        [
            {
                "point": {"M": i},
                "contender": "a",
                "seconds": spread([middle * draw.lognormvariate(0.0, noise) for _ in range(rounds)]),
            }
            for i in range(rows)
        ]
    )


def _named(lines: list[str]) -> int:
    return sum("seconds" in line and "cannot be told" not in line for line in lines)


@pytest.mark.parametrize("rounds", [5, 9, 31])
def test_where_nothing_changed_no_more_is_named_than_the_share_that_is_stated(rounds: int) -> None:
    rows = 1000
    named = _named(compare.lines(_times(1.0, rows, rounds, 1), _times(1.0, rows, rounds, 2)))
    # The bound is an expectation: three standard deviations of a count of rare events on top.
    expected = compare.CHANCE * rows
    assert named <= expected + 3 * expected**0.5


def test_files_with_nothing_in_common_are_said_to_be_so() -> None:
    other = {**_row("b", 1, 1, 1), "point": {"M": 2, "r": 4}}
    lines = compare.lines(_file([_row("a", 1, 1, 1), _row("b", 1, 1, 1)]), _file([other]))
    assert lines[1:] == [
        "nothing could be compared: the files have no measurement in common", "before: M: 1 (a, b)",
        "after: M: 2, r: 4 (b)",
    ]  # fmt: skip


def test_a_real_change_is_named_and_one_below_the_least_is_not() -> None:
    before = _times(1.0, 50, 5, 1, noise=0.02)
    lines = compare.lines(before, _times(1.3, 50, 5, 2, noise=0.02))
    assert _named(lines) == 50
    assert lines[-1] == "of the times that did not move, at most 1% are named by chance"
    assert _named(compare.lines(before, _times(0.7, 50, 5, 2, noise=0.02))) == 50
    # Beyond any doubt, and of no interest.
    small = compare.lines(_times(1.0, 50, 5, 1, noise=1e-4), _times(1.01, 50, 5, 2, noise=1e-4))
    assert small[1:] == ["nothing moved beyond noise"]


def test_times_that_are_too_few_are_no_verdict() -> None:
    lines = compare.lines(_times(1.0, 1, 3, 1), _times(3.0, 1, 3, 2))
    assert lines[1] == "nothing moved beyond noise"
    assert lines[2].startswith("cannot be told from noise: M: 0 a: seconds +")
    assert lines[2].endswith("; 3 and 3 repetitions are too few")
    assert "measure both again with 5 repetitions or more" in lines[3]
    lines = compare.lines(_file([_row("a", 1, 1, 1)]), _file([_row("a", 2, 2, 2)]))
    assert "; a file was written without the single times" in lines[2]


@pytest.mark.parametrize(
    ("a", "b"),
    [([1, 2, 3], [4, 5, 6]), ([1, 2, 2, 5], [2, 3, 3]), ([1, 1], [1, 1, 1]), ([5, 1, 4, 2, 8], [3, 9, 7, 6, 10, 11])],
)
def test_the_share_is_that_of_all_ways_to_deal_the_values(a: list[float], b: list[float]) -> None:
    """U is counted pair by pair here, and every choice of places is listed."""
    pooled = [*a, *b]

    def off(chosen: tuple[int, ...]) -> float:
        others = [pooled[i] for i in range(len(pooled)) if i not in chosen]
        wins = sum((pooled[i] > y) + 0.5 * (pooled[i] == y) for i in chosen for y in others)
        return abs(wins - len(a) * len(b) / 2)

    deals = [off(chosen) for chosen in itertools.combinations(range(len(pooled)), len(a))]
    assert compare.rank_share(a, b) == sum(deal >= deals[0] for deal in deals) / len(deals)


def test_for_many_times_the_share_is_that_of_the_normal_distribution() -> None:
    stats = pytest.importorskip("scipy.stats")
    draw = random.Random(0)
    a, b = ([draw.randint(0, 30) + shift for _ in range(count)] for shift, count in ((0, 25), (4, 40)))
    expected = stats.mannwhitneyu(a, b, method="asymptotic", use_continuity=False).pvalue
    assert compare.rank_share(a, b) == pytest.approx(expected, rel=1e-9)
    assert compare.rank_share([1.0] * 30, [1.0] * 30) == 1.0


def test_numbers_without_a_spread_move_by_more_than_two_percent() -> None:
    def rows(value: float) -> dict[str, Any]:
        return _file([{"point": {"M": 1}, "contender": "a", "peak_memory_mib": value}])

    assert compare.lines(rows(100.0), rows(101.0))[1:] == ["nothing moved beyond noise"]
    assert "peak_memory_mib +3.0% (100 -> 103)" in compare.lines(rows(100.0), rows(103.0))[1]


def test_what_the_machines_differ_in_is_said() -> None:
    before, after = _file([]), _file([])
    before["ceilings"] = {"gemm_flops_per_s": {"fp32": 100.0, "bf16": 100.0}, "copy_bytes_per_s": 10.0}
    after["ceilings"] = {"gemm_flops_per_s": {"fp32": 80.0, "bf16": 101.0}, "copy_bytes_per_s": 11.0}
    assert compare.lines(before, after)[1] == (
        "the ceilings differ, product in fp32 -20.0%, copy +10.0%: what moved may be the machine"
    )
    after["environment"]["device"] = "another"
    assert "the devices differ, nvidia-h200 and another" in compare.lines(before, after)[1]


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


def test_a_spread_is_median_and_percentiles_and_the_values() -> None:
    values = [5.0, 1.0, 2.0, 3.0, 4.0, 6.0]
    assert spread(values) == {"median": 3.5, "p20": 2.0, "p80": 5.0, "n": 6, "values": values}


def _bar_rows(ours: float) -> list[dict[str, Any]]:
    point = {"K": 768, "N": 768, "M": 50432, "r": 16, "active": "0", "dtype": "bf16"}
    return [
        {**_row("frozen F.linear", 1, 1, 1), "point": point},
        {**_row("slora, auto", ours, ours, ours), "point": point},
    ]


@pytest.mark.parametrize(("ours", "word"), [(1.009, "met"), (1.011, "missed")])
def test_a_bar_is_a_ratio_at_one_point(ours: float, word: str, tmp_path: Path) -> None:
    (tmp_path / "linear.json").write_text(json.dumps(_file(_bar_rows(ours))))
    lines = bars.lines(tmp_path)
    assert "-- nvidia-h200; commit 0123456789" in lines
    (line,) = [line for line in lines if line.startswith("linear, none active, over frozen, K 768, N 768")]
    assert line.endswith(word)
    assert f"{ours:.3f}" in line
    (other,) = [line for line in lines if line.startswith("linear, none active, over frozen, K 768, N 3072")]
    assert other.endswith("not measured")
    # A file that is not whole, or of changed source, is shown as such.
    result = {**_file(_bar_rows(ours)), "complete": False}
    result["environment"]["dirty"] = True
    (tmp_path / "linear.json").write_text(json.dumps(result))
    (line,) = [
        line for line in bars.lines(tmp_path) if line.startswith("linear, none active, over frozen, K 768, N 768")
    ]
    assert line.endswith(f"{word}, incomplete, source with changes")
    # Bars of other devices say nothing about this one.
    assert not any("cpu" in line for line in lines[1:-1])


def test_times_by_different_clocks_are_no_ratio() -> None:
    bar = next(bar for bar in bars.load() if bar.name == "linear, none active, over frozen")
    frozen, ours = _bar_rows(1.0)
    found = bars.value(bar, _file([{**frozen, "clock": "graph"}, {**ours, "clock": "graph"}]))
    assert bars.verdict(bar, found) == "met"
    found = bars.value(bar, _file([{**frozen, "clock": "events"}, {**ours, "clock": "graph"}]))
    assert bars.verdict(bar, found) == "not measured"
    assert found.notes == ("taken by different clocks, graph and events",)


def test_a_bar_shows_the_least_and_the_greatest_ratio_of_the_percentiles() -> None:
    bar = next(bar for bar in bars.load() if bar.name == "linear, none active, over frozen")
    point = _bar_rows(1)[0]["point"]
    rows = [_row("frozen F.linear", 0.8, 1.0, 1.6), _row("slora, auto", 1.2, 1.5, 2.0)]
    found = bars.value(bar, _file([{**row, "point": point} for row in rows]))
    assert found.text == "1.500 [0.750, 2.500]"


@pytest.mark.parametrize(
    ("low", "ours", "high", "words"),
    [
        (0.99, 1.0, 1.009, "met"),
        (0.99, 1.0, 1.011, "met, within noise"),
        (1.009, 1.1, 1.2, "missed, within noise"),
        (1.011, 1.1, 1.2, "missed"),
    ],
)
def test_a_verdict_whose_ends_lie_on_both_sides_of_the_limit_says_so(
    low: float, ours: float, high: float, words: str, tmp_path: Path
) -> None:
    frozen, own = _bar_rows(ours)
    own = {**_row("slora, auto", low, ours, high), "point": own["point"]}
    (tmp_path / "linear.json").write_text(json.dumps(_file([frozen, own])))
    lines = bars.lines(tmp_path)
    (line,) = [line for line in lines if line.startswith("linear, none active, over frozen, K 768, N 768")]
    assert line.endswith(f"1.01   {words}")
    assert f"1 {words.split(',')[0]}" in lines[-1]


@pytest.mark.parametrize(("count", "word"), [(0, "missed"), (1, "met"), (2, "missed")])
def test_a_merge_starts_exactly_one_kernel(count: int, word: str) -> None:
    bar = next(bar for bar in bars.load() if bar.measure == "launches")
    row = {"point": dict(bar.where), "contender": bar.contender, "launches": count}
    assert bars.verdict(bar, bars.value(bar, _file([row], "merge"))) == word


def test_a_bar_holds_for_the_variants_of_its_device(tmp_path: Path) -> None:
    assert bars.is_device("nvidia-h200-nvl", "nvidia-h200")
    assert not bars.is_device("nvidia-h20", "nvidia-h200")
    assert not bars.is_device("nvidia-h2000", "nvidia-h200")
    result = _file(_bar_rows(1.0), device="nvidia-h200-nvl")
    (tmp_path / "nvidia-h200-nvl").mkdir()
    (tmp_path / "nvidia-h200-nvl" / "linear.json").write_text(json.dumps(result))
    assert "1 met" in bars.lines(tmp_path / "nvidia-h200-nvl")[-1]
    assert sum(found.number is not None for _, found in bars.judged(results=tmp_path)) == 1


def test_bars_of_several_devices_are_a_bar_for_each() -> None:
    devices = [bar.device for bar in bars.load() if bar.measure == "of_floor"]
    assert sorted(set(devices)) == ["nvidia-h100", "nvidia-h200"]
    assert len(devices) == 12


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
    from benchmarks.cases import host
    from benchmarks.contenders import layer, merge, model
    from benchmarks.results import CASES

    names = {
        "host": set(host.CONTENDERS),
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
