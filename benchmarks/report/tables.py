"""What the pages take from result files: every number is a measure of a row, or a ratio of two medians."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.results import NO_TIMES, TIMES, median

Row = Mapping[str, Any]
Cases = dict[str, dict[str, Any]]
"""The result files of one device, by case."""
TABLES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
MEASURES: dict[str, tuple[str, str, float]] = TABLES["measures"]
RATIOS: dict[str, list[tuple[str, str, str]]] = TABLES["ratios"]
LIMITS: list[dict[str, Any]] = TABLES["limits"]


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table; columns that nobody fills are left out."""
    used = [i for i in range(len(heads)) if not rows or any(row[i] not in ("", "-") for row in rows)]
    lines = [heads, ["---"] * len(heads), *rows]
    return "\n".join("| " + " | ".join(line[i] for i in used) + " |" for line in lines)


def cell(row: Row, measure: str) -> str:
    """A measure of a row: three digits of a time, of repetitions the median with its percentiles in brackets."""
    value = median(row.get(measure))
    if value is None:
        return "-"
    _, form, unit = MEASURES[measure]
    if form:
        return f"{value / unit:{form}}"
    unit, name = next((u for u in ((1.0, "s"), (1e-3, "ms")) if value >= u[0]), (1e-6, "µs"))
    ends = [row[measure][end] for end in ("p20", "p80")] if isinstance(row[measure], Mapping) else []
    digits = [f"{v / unit:#.3g}".rstrip(".") if v / unit < 999.5 else f"{v / unit:.0f}" for v in (value, *ends)]
    return f"{digits[0]} {name}" + (f" [{digits[1]}, {digits[2]}]" if ends else "")


def ratio(row: Row, base: Row, measure: str) -> str:
    """The measure of `row` over that of `base`; a dash where one is missing, or different clocks took the times."""
    value, other = median(row.get(measure)), median(base.get(measure))
    if value is None or not other or (measure in TIMES and row.get("clock") != base.get("clock")):
        return "-"
    return f"{value / other:.2f}"


def over_limit(entry: dict[str, Any], cases: Cases) -> str:
    """The ratio that an entry of `LIMITS` asks for."""
    for rows in points(cases[entry["case"]]["rows"]) if entry["case"] in cases else ():
        if entry["where"].items() <= rows[0]["point"].items():
            base = named(rows, entry["limit"])
            found = [ratio(named(rows, name), base, entry["measure"]) for name in entry["implementations"]]
            return next((text for text in found if text != "-"), "-")
    return "-"


def named(rows: Sequence[Row], implementation: str) -> Row:
    """The row of an implementation, empty where there is none."""
    return next((row for row in rows if row["contender"] == implementation), {})


def points(rows: Sequence[Row]) -> list[list[Row]]:
    """The rows of each point, in the order of the file."""
    found: dict[str, list[Row]] = {}
    for row in rows:
        found.setdefault(json.dumps(row["point"]), []).append(row)
    return list(found.values())


def shared(rows: Sequence[Row]) -> dict[str, Any]:
    """What all points have in common."""
    return {key: value for key, value in rows[0]["point"].items() if all(r["point"].get(key) == value for r in rows)}


def spelled(point: Mapping[str, Any]) -> str:
    """A point, or a part of one, in words."""
    return ", ".join(f"{key} {value}" for key, value in point.items())


def steps(cases: Cases) -> dict[str, dict[str, Row]]:
    """The rows of one training step by precision and implementation, of the first of several models.

    A step that is one CUDA graph is a precision of its own.
    """
    rows = cases["train_step"]["rows"] if "train_step" in cases else []
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        point = row["point"]
        same = all(point[key] == rows[0]["point"][key] for key in ("model", "batch", "r"))
        if "seconds" in row and same and point["mode"] in ("eager", "graph"):
            column = point["precision"] + ", CUDA graph" * (point["mode"] == "graph")
            found.setdefault(column, {})[row["contender"]] = row
    return found


def case_table(case: str, rows: Sequence[Row]) -> str:
    """A line per point and implementation that was measured; a point stands in its first line."""
    ratios, common, body = RATIOS.get(case, []), shared(rows), []
    for at_point in points(rows):
        point = {key: value for key, value in at_point[0]["point"].items() if key not in common}
        for i, row in enumerate(row for row in at_point if not row.keys() & set(NO_TIMES)):
            over = [ratio(row, named(at_point, base), measure) for measure, base, _ in ratios]
            cells = [cell(row, measure) for measure in MEASURES]
            body.append(["" if i else spelled(point), row["contender"], *cells[:5], *over, *cells[5:]])
    heads = [head for head, _, _ in MEASURES.values()]
    return table(["point", "implementation", *heads[:5], *(head for *_, head in ratios), *heads[5:]], body)


def repetitions(rows: Sequence[Row]) -> str:
    """How often the times of `rows` were taken: "5" or "5 to 9"."""
    counts = {row[kind]["n"] for row in rows for kind in TIMES & row.keys()} or {1}
    return " to ".join(str(n) for n in sorted({min(counts), max(counts)}))
