"""What differs beyond noise between two result files of one case.

A time differs where its median changed by more than `LEAST` and a two-sided Mann-Whitney U test of the single times has
p <= `P`. The test tells two runs apart, not two sources: a machine that was slower during one of them changes
everything.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from benchmarks.results import NO_TIMES, TIMES, BenchmarkError, median, need, source

MEASURES = (*sorted(TIMES), "peak_memory_mib", "added_memory_mib", "flops", "peak_over_outputs", "launches")
LEAST, P = 0.02, 0.01


def lines(before: Mapping[str, Any], after: Mapping[str, Any]) -> list[str]:
    """The two runs, a line per measure that differs, and what is in one file only.

    Raises:
        BenchmarkError: the files are of different cases, of something else than a case, have no point in common, or
            scipy is missing.
    """
    if before["case"] != after["case"]:
        raise BenchmarkError(f"the files are of different cases, {before['case']!r} and {after['case']!r}")
    if "rows" not in before or "rows" not in after:
        raise BenchmarkError(f"{before['case']!r} is not a case: only files of `python -m benchmarks run` have times")
    about = [file["environment"] for file in (before, after)]
    found = [
        f"{before['case']}: " + " -> ".join(f"{run['device']}, {source(run)}, {run['date'][:10]}" for run in about)
    ]
    old, new = ({(str(row["point"]), row["contender"]): row for row in file["rows"]} for file in (before, after))
    if old.keys().isdisjoint(new):
        raise BenchmarkError("the files have no implementation at one point in common; compare runs of one grid")
    for key in dict.fromkeys([*old, *new]):
        a, b = old.get(key, {"absent": "no such row"}), new.get(key, {"absent": "no such row"})
        changes = [f"{m} {text}" for m in MEASURES if m in a and m in b and (text := change(a[m], b[m]))]
        for state in (*NO_TIMES, "absent"):
            if (state in a) != (state in b):
                changes.append(f"{state} {'before' if state in a else 'now'}: {a.get(state, b.get(state))}")
        found += [f"{', '.join(key)}: {text}" for text in changes]
    return found if len(found) > 1 else [*found, "nothing differs beyond noise"]


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
