"""What differs beyond noise between two result files of one case.

A time differs where its median changed by more than `LEAST` and a two-sided Mann-Whitney U test of the single times has
p <= `P`. The test tells two runs apart, not two sources: a machine that was slower during one of them changes
everything, and its roofline too.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any

from benchmarks.results import NO_TIMES, BenchmarkError, median, need, source

# What is measured; other numbers in a row follow from these.
MEASURES = ("seconds", "device_seconds", "forward", "forward_backward", "eager", "peak_memory_mib", "added_memory_mib",
            "flops", "bytes", "compulsory_bytes", "peak_over_outputs", "launches", "deterministic")  # fmt: skip
STATES = (*NO_TIMES, "not_captured", "forward_not_captured")
LEAST, P = 0.02, 0.01


def lines(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The two runs and their rooflines, a line per measure that differs, and what is in one file only.

    Raises:
        BenchmarkError: the files are of different cases, or scipy is missing.
    """
    if before["case"] != after["case"]:
        raise BenchmarkError(f"the files are of different cases, {before['case']!r} and {after['case']!r}")
    about = [file["environment"] for file in (before, after)]
    runs = [f"{run['device']}, {source(run)}, {run['date'][:10]}" for run in about]
    old, new = _rows(before), _rows(after)
    found = [line for name in old if name in new for line in _differences(name, old[name], new[name])]
    only = [f"only in the file before: {name}" for name in old if name not in new]
    only += [f"only in the file after: {name}" for name in new if name not in old]
    roofline = list(_rooflines(before.get("ceilings", {}), after.get("ceilings", {})))
    return [f"{before['case']}: {' -> '.join(runs)}", *roofline, *(found or ["nothing differs beyond noise"]), *only]


def _rows(result: Mapping[str, Any]) -> dict[str, Mapping[str, Any]]:
    """Rows by point and implementation."""
    return {
        ", ".join([*(f"{key} {value}" for key, value in row["point"].items()), row["contender"]]): row
        for row in result["rows"]
    }


def _differences(name: str, old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    for state in STATES:
        if (state in old) != (state in new):
            yield f"{name}: {state} {'before' if state in old else 'now'}: {old.get(state, new.get(state))}"
    for measure in MEASURES:
        if measure in old and measure in new and (text := change(old[measure], new[measure])):
            yield f"{name}: {measure} {text}"


def _rooflines(old: Mapping[str, Any], new: Mapping[str, Any]) -> Iterator[str]:
    rates = [limits.get("gemm_flops_per_s", {}) | {"copy": limits.get("copy_bytes_per_s")} for limits in (old, new)]
    for name, rate in rates[0].items():
        if rate and rates[1].get(name) and (text := change(rate, rates[1][name])):
            yield f"roofline, {name}: {text}"


def change(old: Any, new: Any) -> str | None:
    """How a measure changed, None where it did by no more than `LEAST` or what noise explains."""
    a, b = median(old) or 0.0, median(new) or 0.0
    size = 0.0 if a == b else b / a - 1 if a else math.inf
    if abs(size) <= LEAST:
        return None
    text = f"{size:+.1%} ({a:.4g} -> {b:.4g})"
    if not isinstance(old, Mapping) or not isinstance(new, Mapping):
        return text
    times = [measure.get("values", []) for measure in (old, new)]
    if 2 / math.comb(sum(map(len, times)), len(times[0])) > P:
        return f"{text}, with too few repetitions to tell it from noise"
    return text if need("scipy.stats").mannwhitneyu(*times).pvalue <= P else None
