"""What moved beyond noise between two result files of one case.

A time moved where its median changed by more than `LEAST` and a two-sided Mann-Whitney U test on the single times of
the two runs gives a share of at most `CHANCE`: so often, where nothing moved, would dealing the same times into two
groups at random set the groups as far apart. The test tells two runs apart, not two sources: a machine that was slower
throughout one of them moves everything. The ceilings of the two runs show that.
"""

from __future__ import annotations

import json
import math
from bisect import bisect_left, bisect_right
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import NormalDist
from typing import Any, NamedTuple

from benchmarks.results import BenchmarkError, median, source

# Measures that are times, memory, or counts; the rest follows from them.
MEASURES = ("seconds", "device_seconds", "forward", "forward_backward", "eager", "peak_memory_mib", "added_memory_mib",
            "flops", "bytes", "compulsory_bytes", "peak_over_outputs", "launches", "deterministic")  # fmt: skip
# A smaller change is none, whatever its test says; the memory of a process varies by less.
LEAST = 0.02
CHANCE = 0.01
# Up to this many times in a file all ways to deal them are counted; beyond, the normal distribution stands for them.
COUNTED = 20
STATES = ("skipped", "failed", "refused", "not_captured", "forward_not_captured")


class Change(NamedTuple):
    """One measure in both files.

    Attributes:
        size: the relative change, without its sign.
        line: the change in words.
        moved: whether it is beyond noise; None where that cannot be said.
    """

    size: float
    line: str
    moved: bool | None


def lines(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """A line per measure that moved, then those of which that cannot be said, then what could not be compared.

    Raises:
        BenchmarkError: the files are of different cases.
    """
    if before["case"] != after["case"]:
        raise BenchmarkError(f"the files are of different cases, {before['case']!r} and {after['case']!r}")
    runs = [f"{source(about)} of {about['date'][:10]}" for about in (before["environment"], after["environment"])]
    found = [f"{before['case']}: {' -> '.join(runs)}", *_machines(before, after)]
    old, new = _by_key(before), _by_key(after)
    both = [(key, old[key], new[key]) for key in old if key in new]
    if not both:
        own = [f"{name}: {_spelled(file)}" for name, file in (("before", old), ("after", new))]
        return [*found, "nothing could be compared: the files have no measurement in common", *own]
    changes = [change for key, a, b in both for change in _changes(" ".join(key), a, b)]
    changes.sort(reverse=True)
    states = [f"{' '.join(key)}: {text}" for key, a, b in both for text in _states(a, b)]
    moved = [change.line for change in changes if change.moved]
    unclear = [f"cannot be told from noise: {change.line}" for change in changes if change.moved is None]
    found += [*states, *moved] or ["nothing moved beyond noise"]
    found += unclear
    found += ["measure both again with 5 repetitions or more (--rounds) to tell these from noise"] * bool(unclear)
    found += [f"of the times that did not move, at most {CHANCE:.0%} are named by chance"] * bool(moved)
    for name, only, file in (("before", old.keys() - new.keys(), old), ("after", new.keys() - old.keys(), new)):
        if only:
            found.append(f"only in the file {name}: {len(only)} of {len(file)} measurements")
    return found


def _changes(where: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> list[Change]:
    """What changed in a row by more than `LEAST`."""
    found = []
    for name in MEASURES:
        a, b = old.get(name), new.get(name)
        size = 0.0 if a is None or b is None else _relative(a, b)
        if abs(size) > LEAST:
            moved, why = beyond_noise(a, b)
            if moved is not False:
                line = f"{where}: {name} {size:+.1%} ({_text(a)} -> {_text(b)}){why and f'; {why}'}"
                found.append(Change(abs(size), line, moved))
    return found


def beyond_noise(a: Any, b: Any) -> tuple[bool | None, str]:
    """Whether two measures that differ do so by more than chance, and where that cannot be said, None and why."""
    if not (isinstance(a, Mapping) and isinstance(b, Mapping)):
        return True, ""
    x, y = a.get("values"), b.get("values")
    if x is None or y is None:
        return None, "a file was written without the single times"
    if 2 / math.comb(len(x) + len(y), len(x)) > CHANCE:
        return None, f"{len(x)} and {len(y)} repetitions are too few"
    return rank_share(x, y) <= CHANCE, ""


def rank_share(a: Sequence[float], b: Sequence[float]) -> float:
    """The two-sided Mann-Whitney U test.

    Returns the share of all ways to deal `a` and `b` into groups of their sizes in which the ranks of the first sum to
    something as far from their mean. Equal values share their mean rank.
    """
    pooled = sorted([*a, *b])
    # Twice the rank, which is whole even where values are equal.
    doubled = {value: bisect_left(pooled, value) + bisect_right(pooled, value) + 1 for value in pooled}
    mean = len(a) * (len(pooled) + 1)
    off = abs(sum(doubled[value] for value in a) - mean)
    if max(len(a), len(b)) > COUNTED:
        squares = sum((doubled[value] - len(pooled) - 1) ** 2 for value in pooled)
        spread = math.sqrt(len(a) * len(b) * squares / (len(pooled) * (len(pooled) - 1)))
        return 2 * (1 - NormalDist().cdf(off / spread)) if spread else 1.0
    # ways[k][s]: how many choices of k values have ranks that sum to s.
    ways: list[Counter[int]] = [Counter({0: 1}), *(Counter() for _ in a)]
    for value in pooled:
        for k in range(len(a), 0, -1):
            for total, count in ways[k - 1].items():
                ways[k][total + doubled[value]] += count
    return sum(count for total, count in ways[-1].items() if abs(total - mean) >= off) / math.comb(len(pooled), len(a))


def _states(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
    """What can be measured, or captured in a CUDA graph, in one file only, and why."""
    return [
        f"{state.replace('_', ' ')} {'before' if state in old else 'now'}: {(old if state in old else new)[state]}"
        for state in STATES
        if (state in old) != (state in new)
    ]


def _machines(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """What sets the machines of the two runs apart."""
    devices = [result["environment"]["device"] for result in (before, after)]
    if devices[0] != devices[1]:
        return [f"the devices differ, {devices[0]} and {devices[1]}: what moved may be the device"]
    old, new = (_rates(result.get("ceilings", {})) for result in (before, after))
    moved = [
        f"{name} {_relative(old[name], new[name]):+.1%}"
        for name in old
        if name in new and abs(_relative(old[name], new[name])) > LEAST
    ]
    return [f"the ceilings differ, {', '.join(moved)}: what moved may be the machine"] if moved else []


def _rates(ceilings: Mapping[str, Any]) -> dict[str, float]:
    rates = {f"product in {dtype}": rate for dtype, rate in ceilings.get("gemm_flops_per_s", {}).items()}
    return {**rates, "copy": ceilings["copy_bytes_per_s"]} if "copy_bytes_per_s" in ceilings else rates


def _by_key(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    keys = {}
    for row in result["rows"]:
        point = json.dumps(row["point"], sort_keys=True)
        keys[point.strip("{}").replace('"', ""), row["contender"]] = row
    return keys


def _spelled(keys: Mapping[tuple[str, str], Any]) -> str:
    """The points of a file and their contenders."""
    points: dict[str, list[str]] = {}
    for point, contender in keys:
        points.setdefault(point, []).append(contender)
    return "; ".join(f"{point} ({', '.join(names)})" for point, names in points.items()) or "no measurements"


def _relative(a: Any, b: Any) -> float:
    x, y = median(a), median(b)
    assert x is not None
    assert y is not None
    return 0.0 if x == y else y / x - 1 if x else float("inf")


def _text(measure: Any) -> str:
    if isinstance(measure, Mapping):
        return f"{measure['median']:.4g} [{measure['p20']:.4g}, {measure['p80']:.4g}]"
    return f"{measure:.6g}"
