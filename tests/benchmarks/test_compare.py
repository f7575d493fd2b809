"""Two result files side by side, and one beside the targets."""

from __future__ import annotations

import random
from typing import Any

import pytest

import slora
from benchmarks import compare, targets
from benchmarks.cases import linear, merge, model
from benchmarks.results import RESULTS, BenchmarkError, Settings, results_in, spread

POINT = {"K": 768, "N": 768, "M": 50432, "r": 16, "active": "0", "dtype": "bf16"}
NAME = "linear, none active, over frozen, K 768, N 768"


def result(*rows: dict[str, Any], case: str = "linear", **more: Any) -> dict[str, Any]:
    about = {"commit": "0123456789ab", "dirty": False, "date": "2026-01-02", "device": "a GPU"}
    return {"case": case, "device": "nvidia-h200", "complete": True, "environment": about, "rows": list(rows), **more}


def row(contender: str = "slora, auto", low: float = 1.0, middle: float = 1.0, high: float = 1.0, **more: Any) -> Any:
    times = {"median": middle, "p20": low, "p80": high}
    return {"point": POINT, "contender": contender, "forward_backward": times, **more}


def noisy(middle: float, rounds: int, seed: int, noise: float = 0.1) -> dict[str, Any]:
    """A file of 300 measurements with lognormal noise."""
    draw = random.Random(seed)
    times = [spread([middle * draw.lognormvariate(0.0, noise) for _ in range(rounds)]) for _ in range(300)]
    return result(*({"point": {"M": i}, "contender": "a", "seconds": t} for i, t in enumerate(times)))


@pytest.mark.parametrize("rounds", [5, 9, 31])
def test_a_change_is_told_from_noise(rounds: int) -> None:
    before = noisy(1.0, rounds, 1)
    named = [line for line in compare.lines(before, noisy(1.0, rounds, 2)) if "seconds" in line]
    # Expected are 3; three standard deviations of a count of rare events on top.
    assert len(named) <= 300 * compare.P + 3 * (300 * compare.P) ** 0.5
    for middle in (2.0, 0.5):
        assert len([line for line in compare.lines(before, noisy(middle, rounds, 2)) if "seconds" in line]) == 300
    # Beyond doubt, and of no interest.
    small = compare.lines(noisy(1.0, rounds, 1, 1e-4), noisy(1.01, rounds, 2, 1e-4))
    assert small[1:] == ["nothing differs beyond noise"]
    assert "too few repetitions" in compare.lines(noisy(1.0, 3, 1), noisy(3.0, 3, 2))[1]


def test_all_that_differs_between_two_files_is_named() -> None:
    before = result(row("a", peak_memory_mib=100.0, launches=0), row("b"))
    lost = {"point": POINT, "contender": "a", "peak_memory_mib": 103.0, "launches": 1, "failed": "no compiler"}
    assert compare.lines(before, result(lost, row("c")))[1:] == [
        f"{POINT}, a: peak_memory_mib +3.0% (100 -> 103)",
        f"{POINT}, a: launches +inf% (0 -> 1)",
        f"{POINT}, a: failed now: no compiler",
        f"{POINT}, b: absent now: no such row",
        f"{POINT}, c: absent before: no such row",
    ]
    with pytest.raises(BenchmarkError, match="different cases"):
        compare.lines(before, result(case="merge"))


@pytest.mark.parametrize(
    ("low", "middle", "high", "clock", "verdict"),
    [
        (0.99, 1.0, 1.009, "graph", "met"),
        (0.99, 1.0, 1.011, "graph", "met, within noise"),
        (1.009, 1.1, 1.2, "graph", "missed, within noise"),
        (1.011, 1.1, 1.2, "graph", "missed"),
        (0.99, 1.0, 1.009, "events", "not measured, taken by different clocks, events and graph"),
    ],
)
def test_a_target_is_a_ratio_at_one_point(low: float, middle: float, high: float, clock: str, verdict: str) -> None:
    file = result(row("frozen F.linear", clock="graph"), row("slora, auto", low, middle, high, clock=clock))
    (found,) = [one for one in targets.judged({"nvidia-h200-nvl": {"linear": file}}, ["nvidia-h200-nvl"])
                if one.target.name == NAME]  # fmt: skip
    number = "-" if clock == "events" else f"{middle:.3f} [{low:.3f}, {high:.3f}]"
    assert found.row == [NAME, number, "at most 1.01", verdict]


def test_a_target_may_be_a_measure_and_a_slice_of_a_gpu_has_none() -> None:
    point = {"model": "vit_large_patch16_224", "dtype": "bf16", "r": 16}
    for count, verdict in ((0, "missed, incomplete"), (1, "met, incomplete"), (2, "missed, incomplete")):
        launched = {"point": point, "contender": "slora batched_merge_", "launches": count}
        results = {"nvidia-h100": {"merge": result(launched, case="merge", complete=False)}}
        (found,) = [one for one in targets.judged(results) if one.number is not None]
        assert found.row == ["merge, launches, r 16", f"{count:.3f}", "exactly 1", verdict]
        assert targets.judged(results, ["nvidia-h100-mig-1g-18gb", "nvidia-h20"]) == []


def test_the_targets_of_the_cpu_are_measured_and_the_stages_of_a_gpu_measure_the_others(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    lines = targets.lines({"cpu": results_in(RESULTS / "cpu")}, ["cpu"])
    assert lines[-1].endswith(" 0 not measured")
    monkeypatch.setattr(slora.merging, "extension_info", lambda: {"available": True, "cuda": "13.0"})
    rows: dict[str, list[dict[str, Any]]] = {}
    quick = Settings("cuda", "quick")
    for name, module in (("linear", linear), ("merge", merge), ("train_step", model)):
        monkeypatch.setattr(module, "fill", lambda *_, **__: None)
        points = module.grid(quick, name)  # type: ignore[attr-defined]
        rows[name] = [row for point in points for row in module.measure(point, quick, {}, name)]  # type: ignore[attr-defined]
    for target in targets.load():
        if target.device != "cpu":
            names = [row["contender"] for row in rows[target.case] if target.where.items() <= row["point"].items()]
            assert {target.contender, target.against or target.contender} <= set(names)
            assert len(set(names)) == len(names)
    # What a minute of a GPU is not for.
    points = {name: len({str(row["point"]) for row in found}) for name, found in rows.items()}
    assert points == {"linear": 12, "merge": 1, "train_step": 4}
    # A run of the default grid that is cut short has the targets, too.
    for module, count in ((linear, 12), (model, 2)):
        first, whole = (module.grid(Settings("cuda", grid))[:count] for grid in ("quick", "default"))  # type: ignore[attr-defined]
        assert first == whole
