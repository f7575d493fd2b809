"""What moved beyond noise between two result files of one case."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from benchmarks.record import BenchmarkError, median

# Measures that are times, memory, or counts; the rest follows from them.
MEASURES = ("seconds", "device_seconds", "forward", "forward_backward", "eager", "peak_memory_mib", "added_memory_mib",
            "flops", "bytes", "compulsory_bytes", "peak_over_outputs", "launches", "deterministic")  # fmt: skip
# Numbers without a spread: memory of a process varies by less than this share.
STEADY = 0.02


def lines(before: dict[str, Any], after: dict[str, Any]) -> list[str]:
    """A line per measure that moved, then what could not be compared.

    A time moved where the ranges from the 20th to the 80th percentile do not meet; a number without a spread where it
    differs by more than 2 %.

    Raises:
        BenchmarkError: the files are of different cases.
    """
    if before["case"] != after["case"]:
        raise BenchmarkError(f"the files are of different cases, {before['case']!r} and {after['case']!r}")
    found = [f"{before['case']}: {_origin(before)} -> {_origin(after)}"]
    if before["environment"]["device"] != after["environment"]["device"]:
        found.append("the devices differ: what moved may be the device")
    old, new = _by_key(before), _by_key(after)
    moved = []
    for key in old.keys() & new.keys():
        for measure in MEASURES:
            a, b = old[key].get(measure), new[key].get(measure)
            if a is not None and b is not None and beyond_noise(a, b):
                moved.append(
                    (
                        abs(_ratio(a, b) - 1),
                        f"{key[0]} {key[1]}: {measure} {_ratio(a, b) - 1:+.1%} ({_text(a)} -> {_text(b)})",
                    )
                )
        for state in ("skipped", "failed", "refused"):
            if (state in old[key]) != (state in new[key]):
                moved.append(
                    (
                        float("inf"),
                        f"{key[0]} {key[1]}: {state} {'before' if state in old[key] else 'now'}: "
                        f"{(old[key] | new[key])[state]}",
                    )
                )
    found += [line for _, line in sorted(moved, reverse=True)] or ["nothing moved beyond noise"]
    for name, only in (("before", old.keys() - new.keys()), ("after", new.keys() - old.keys())):
        if only:
            found.append(
                f"only in the file {name}: {len(only)} of {len(old if name == 'before' else new)} measurements"
            )
    return found


def beyond_noise(a: Any, b: Any) -> bool:
    """Whether two measures differ by more than their spreads."""
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        return bool(a["p80"] < b["p20"] or b["p80"] < a["p20"])
    x, y = median(a), median(b)
    assert x is not None
    assert y is not None
    return abs(x - y) > STEADY * max(abs(x), abs(y))


def _by_key(result: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    keys = {}
    for row in result["rows"]:
        point = json.dumps(row["point"], sort_keys=True)
        keys[point.strip("{}").replace('"', ""), row["contender"]] = row
    return keys


def _ratio(a: Any, b: Any) -> float:
    x, y = median(a), median(b)
    assert x is not None
    assert y is not None
    return y / x if x else float("inf")


def _text(measure: Any) -> str:
    if isinstance(measure, Mapping):
        return f"{measure['median']:.4g} [{measure['p20']:.4g}, {measure['p80']:.4g}]"
    return f"{measure:.6g}"


def _origin(result: dict[str, Any]) -> str:
    environment = result["environment"]
    commit = (environment["commit"] or "unknown commit")[:10]
    return f"{commit}{' with changes' if environment['dirty'] else ''} of {environment['date'][:10]}"
