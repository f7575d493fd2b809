"""The form of a result file: what was measured, on what, from which state of the source.

    {"schema": 2, "case": ..., "device": ..., "complete": true, "environment": {...}, "settings": {...},
     "ceilings": {...}, "rows": [{"point": {...}, "contender": ..., <measures>}, ...]}

A row is one contender at one point of the case's grid. A measure is a number, or the spread of repetitions:
{"median", "p20", "p80", "n", "values"}, of which older files lack "values". Every number is finite, and times and
ceilings are positive. A contender that could not run has "skipped" and the reason, one that raised "failed", one whose
result was wrong "refused"; none of these has times. `complete` is false where a run met the end of its time before the
end of its grid.
"""

from __future__ import annotations

import sys
from collections.abc import Mapping
from typing import Any

SCHEMA = 2
# Measures that are spreads or numbers, wherever they occur.
TIMES = {"seconds", "device_seconds", "forward", "forward_backward", "eager"}
MEASURES = TIMES | {
    "peak_memory_mib", "added_memory_mib", "flops", "bytes", "compulsory_bytes", "flops_per_s", "peak_over_outputs",
    "launches", "deterministic", "percent_of_gemm", "percent_of_copy", "predicted", "deviation", "floor_seconds",
    "over_floor", "of_floor",
    "update_seconds", "update_deviation", "images_per_second", "tokens_per_second",
}  # fmt: skip


def fault(content: Mapping[str, Any]) -> str | None:
    """What is wrong with a file of measurements or of the proof's parts, None where nothing is."""
    if "rows" not in content and "parts" not in content:
        return None
    about = content.get("environment")
    known = {"commit", "dirty", "date", "device", "packages"}
    if not isinstance(about, dict) or not isinstance(about.get("packages", {}), dict) or not known <= about.keys():
        return f"its environment lacks one of {', '.join(sorted(known))}"
    if not isinstance(content["case"], str):
        return "its case is no text"
    for name, allowed in (("commit", str | None), ("date", str), ("device", str)):
        if not isinstance(about[name], allowed):
            return f"{name} in its environment is no text"
    if not isinstance(about["dirty"], bool | None):
        return "dirty in its environment is none of true, false and null"
    if not _are_ceilings(content.get("ceilings", {})):
        return "its ceilings are no positive numbers under copy_bytes_per_s and gemm_flops_per_s"
    if "rows" not in content:
        parts = content["parts"]
        whole = isinstance(parts, dict) and all(
            isinstance(part, dict) and "state" in part and _is_number(part.get("seconds")) for part in parts.values()
        )
        return None if whole else "a part has no state or no seconds"
    return _fault_of_rows(content["rows"])


def _are_ceilings(ceilings: Any) -> bool:
    """Whether a file has the rates of its run, or none at all."""
    if not isinstance(ceilings, dict) or not isinstance(ceilings.get("gemm_flops_per_s", {}), dict):
        return False
    rates = [ceilings.get("copy_bytes_per_s"), *ceilings.get("gemm_flops_per_s", {None: None}).values()]
    return not ceilings or all(map(_is_positive, rates))


def _fault_of_rows(rows: Any) -> str | None:
    if not isinstance(rows, list):
        return "its rows are no list"
    for i, row in enumerate(rows):
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("point"), dict)
            or not isinstance(row.get("contender"), str)
        ):
            return f"row {i} has no point or no contender"
        if not isinstance(row.get("form", ""), str):
            return f"row {i} has no text in 'form'"
        for name in sorted(row.keys() & MEASURES):
            kind, fits = ("positive numbers", _is_positive) if name in TIMES else ("numbers", _is_number)
            if not all(map(fits, _numbers(row[name]))):
                return f"row {i} has no {kind} in {name!r}"
    return None


def _is_number(value: Any) -> bool:
    """Whether it is a finite number; what Python reads from JSON may be NaN, infinite, or an integer of any size."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= sys.float_info.max


def _is_positive(value: Any) -> bool:
    return _is_number(value) and value > 0


def _numbers(measure: Any) -> list[Any]:
    """What has to be numbers in a measure."""
    if not isinstance(measure, dict):
        return [measure]
    values = measure.get("values", [measure.get("median")])
    return [
        *(measure.get(key) for key in ("median", "p20", "p80", "n")),
        *(values if isinstance(values, list) else [None]),
    ]
