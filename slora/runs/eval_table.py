"""The table of `slora evaluate`: rows of before and after, their means, and forgetting. Imports no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

TITLES = {
    "id": "in distribution",
    "ood": "out of distribution",
    "zero-shot": "zero-shot classification",
    "retrieval": "image-text retrieval",
    "knn": "k-NN on features",
    "few-shot": "few-shot on features",
}

FORGETTING = (
    "mean change of zero-shot accuracy, retrieval recall and k-NN accuracy on data sets other than the run's: first "
    "over the rows of a data set, then over data sets; below 0: forgotten"
)

# Tasks that measure what a model knew before.
RETAINED = ("zero-shot", "retrieval", "knn")

Row = dict[str, Any]


def row(task: str, data: str, metric: str, before: float | None, after: float, count: int) -> Row:
    """Return a row.

    Args:
        task: one of `TITLES`.
        metric: what the shares `before` and `after` are of; before is None if the model could not do it.
        count: queries.
    """
    change = None if before is None else after - before
    values = {"before": before, "after": after, "change": change, "count": count}
    return {"task": task, "data": data, "metric": metric, **values}


def means(rows: Sequence[Row]) -> dict[str, dict[str, float | None]]:
    """Return `{"id" or "ood": {"before", "after", "change"}}`: means of the top-1 accuracy over the rows of each."""
    found: dict[str, dict[str, float | None]] = {}
    for task in ("id", "ood"):
        own = [row for row in rows if row["task"] == task]
        if own:
            values = {key: [row[key] for row in own] for key in ("before", "after", "change")}
            found[task] = {key: None if None in each else fmean(each) for key, each in values.items()}
    return found


def forgetting(rows: Sequence[Row], own: str) -> dict[str, Any] | None:
    """Return `{"mean_change", "sets", "definition"}` as `FORGETTING` says; None if no row measures it.

    Args:
        own: name of the run's data set, which does not count.
    """
    changes: dict[tuple[str, str], list[float]] = {}
    for row in rows:
        if row["task"] in RETAINED and row["data"] != own and row["change"] is not None:
            changes.setdefault((row["task"], row["data"]), []).append(row["change"])
    if not changes:
        return None
    value = fmean(fmean(each) for each in changes.values())
    return {"mean_change": value, "sets": len(changes), "definition": FORGETTING}


def as_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the rows and means of an evaluation as lines of a table; shares in percent, changes in points."""
    head = f"{'data':<28} {'metric':<20} {'before %':>8} {'after %':>8} {'points':>8} {'NLL':>17} {'ECE %':>17}"
    lines = [head]
    task = ""
    for row in result["rows"]:
        if row["task"] != task:
            task = row["task"]
            lines.append(TITLES[task])
        nll, ece = (_pair(row.get(key), factor) for key, factor in (("nll", 1.0), ("calibration_error", 100.0)))
        name = f"  {shown(row['data'])}"
        lines.append(f"{name:<28} {row['metric']:<20} {_cells(row)} {nll:>17} {ece:>17}".rstrip())
    for key, values in result["means"].items():
        lines.append(f"{TITLES[key] + ', mean':<49} {_cells(values)}")
    if result["forgetting"] is not None:
        found = result["forgetting"]
        name = f"forgetting, mean change over {found['sets']} set{'' if found['sets'] == 1 else 's'}"
        lines.append(f"{name:<67} {100 * found['mean_change']:+8.2f} (below 0: forgotten)")
    return lines


def shown(data: str) -> str:
    """Return the name of a data set for a table: of a folder its last part."""
    return data.rstrip("/").rpartition("/")[2] if data.startswith("imagefolder:") else data


def _cells(row: Mapping[str, Any]) -> str:
    before, change = row["before"], row["change"]
    first = "-" if before is None else f"{100 * before:.2f}"
    last = "-" if change is None else f"{100 * change:+.2f}"
    return f"{first:>8} {100 * row['after']:8.2f} {last:>8}"


def _pair(values: Mapping[str, Any] | None, factor: float) -> str:
    if values is None:
        return ""
    before = "-" if values["before"] is None else f"{factor * values['before']:.3g}"
    return f"{before} -> {factor * values['after']:.3g}"
