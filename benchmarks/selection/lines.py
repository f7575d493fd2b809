"""What the page says of each row: measures per seed, and the difference from scaled LoRA at equal retention."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import fmean
from typing import Any

import numpy as np

from benchmarks.selection.engine import Case, is_of
from benchmarks.selection.rows import ALL, LINEAR, SCALES, Row
from benchmarks.selection.store import Run, Store

Curve = list[tuple[float, float]]
"""A measure of the new task over the points forgotten."""


@dataclass(frozen=True)
class Line:
    """A line of a table: one row, or plain LoRA scaled.

    Attributes:
        row: what was trained.
        scale: of the update.
        seeds: those that every task of the table has.
        values: `{measure: one value per seed}`, the mean over the tasks: the fields of `Record`, "lost" for the mean of
            the measures of retention, "lost <name>" for each, and of what was trained as the page's curve does not:
            "over" and "over nll", the target and NLL less those of scaled LoRA that forgets as much.
        tuned: the learning rate on each task, and the weight of a row that has one.
    """

    row: Row
    scale: float
    seeds: tuple[int, ...]
    values: Mapping[str, list[float]]
    tuned: tuple[tuple[float, ...], ...]

    @property
    def label(self) -> str:
        """Strategy and scale."""
        if not self.scale:
            return "pretrained model"
        return self.row.label if self.scale == 1 else f"{self.row.label}, scaled by {self.scale:g}"

    def mean(self, measure: str) -> float | None:
        """The mean over seeds, None where nothing was measured."""
        return fmean(self.values[measure]) if self.values.get(measure) else None


def forgetting(measures: Mapping[str, Any]) -> float:
    """Points lost on the old task, the mean over the measures of retention."""
    return fmean(measures["lost"].values())


def curve(plain: Run, linear: Run | None, measure: str) -> Curve:
    """The curve to beat, of one task and seed: from the linear probe over the scaled updates to all of plain LoRA.

    Without a probe it begins with the update scaled by 0.
    """
    points = [*plain["scaled"], plain] if linear is None else [linear, *plain["scaled"], plain]
    return [(forgetting(each), float(each[measure])) for each in points]


def read_off(curve: Curve, at: float, least: bool = False) -> float:
    """The highest value of a curve (or the least) at a forgetting of at most `at`, interpolated."""
    ordered = sorted(curve)
    best = (np.minimum if least else np.maximum).accumulate([value for _, value in ordered])
    return float(np.interp(at, [lost for lost, _ in ordered], best))


def lines(store: Store, rows: Iterable[Row], tasks: Sequence[str]) -> list[Line]:
    """Return the lines of a table over some tasks; rows without a seed that all tasks have are left out."""
    rows = list(rows)
    stored = {
        (task, run["row"], run["seed"]): run
        for task in tasks
        for run in store.runs(task)
        if any(_is_of(run, row) for row in (ALL, LINEAR, *rows) if row.name == run["row"])
    }
    found = []
    for row in rows:
        seeds = [{seed for at, name, seed in stored if at == task and name == row.name} for task in tasks]
        shared = tuple(sorted(set.intersection(*seeds)))
        scales = [
            {each["scale"] for each in stored[task, row.name, seed]["scaled"]} for task in tasks for seed in shared
        ]
        for scale in (*sorted(set.intersection(*scales)), 1.0) if shared else ():
            told = [_means([_told(stored, row, task, seed, scale) for task in tasks]) for seed in shared]
            values = {name: [each[name] for each in told if name in each] for each in told for name in each}
            for name in ("over", "over nll"):
                # Whole or not at all: seeds are paired by their place.
                if len(values.get(name, ())) != len(shared):
                    values[name] = []
            settings = [stored[task, row.name, shared[0]]["settings"] for task in tasks]
            tuned = tuple(tuple(each[name] for name in ("lr", row.weight) if name) for each in settings)
            found.append(Line(row, scale, shared, values, tuned))
    return found


def _means(of_tasks: Sequence[Mapping[str, float | None]]) -> dict[str, float]:
    """The mean over tasks of what all of them have."""
    means = {}
    for name in of_tasks[0]:
        numbers = [value for measures in of_tasks if (value := measures.get(name)) is not None]
        if len(numbers) == len(of_tasks):
            means[name] = fmean(numbers)
    return means


def _told(
    stored: Mapping[tuple[str, str, int], Run], row: Row, task: str, seed: int, scale: float
) -> dict[str, float | None]:
    """What the page says of one run."""
    run = _at_scale(stored[task, row.name, seed], scale)
    to_beat = [stored.get((task, name, seed)) for name in ("all", "linear")]
    return _measures(run) | ({} if row in (ALL, LINEAR) else _over(run, *to_beat))


def _over(run: Run, plain: Run | None, linear: Run | None) -> dict[str, float | None]:
    """The target and NLL of a run less those of scaled LoRA that forgets as much."""
    if plain is None or (linear is None and all(each["scale"] for each in plain["scaled"])):
        return {"over": None, "over nll": None}
    at = forgetting(run)
    return {
        "over": run["target"] - read_off(curve(plain, linear, "target"), at),
        "over nll": run["nll"] - read_off(curve(plain, linear, "nll"), at, least=True),
    }


def _is_of(run: Run, row: Row) -> bool:
    """Whether a stored run is of the row as it is now, whatever tuning has chosen."""
    tuned = {name: value for name, value in run["settings"].items() if name in ("lr", row.weight)}
    configuration = replace(row.configuration, settings={**row.configuration.settings, **tuned})
    return is_of(run, Case(run["task"], configuration, run["seed"]))


def _at_scale(run: Run, scale: float) -> Run:
    """The measures of a run with its update scaled; what scaling does not change is not said twice."""
    if scale == 1.0:
        return run
    (entry,) = [each for each in run["scaled"] if each["scale"] == scale]
    return {**entry, **{name: run[name] for name in ("active", "ranks", "kept")}, "flops": None, "seconds": None}


def _measures(run: Run) -> dict[str, Any]:
    found = {name: run[name] for name in ("target", "nll", "drift", "active", "ranks", "kept", "flops", "seconds")}
    return found | {"lost": forgetting(run)} | {f"lost {name}": value for name, value in run["lost"].items()}


def wise(found: Sequence[Line]) -> Curve:
    """The mean curve of scaled LoRA in a table, for its picture; empty where its runs are missing."""
    to_beat = [each for each in found if each.row in (ALL, LINEAR)]
    scales = {each.scale for each in to_beat}
    if not scales >= {*SCALES, 1.0} or (0.0 not in scales and LINEAR not in [each.row for each in to_beat]):
        return []
    return sorted((fmean(each.values["lost"]), fmean(each.values["target"])) for each in to_beat)
