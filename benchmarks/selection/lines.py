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

# Fields of `Record`: those that a scaled update has, too, what was trained, and what it took.
MEASURES, TRAINED, COST = ("target", "nll", "drift"), ("active", "ranks", "kept"), ("flops", "seconds")


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
    seeds = {seed for _, _, seed in stored}
    names = {name for _, name, _ in stored}
    # Means over the tasks come first: the curve of one task is steep where a single sample is forgotten or not.
    means = {
        (name, seed): _mean([stored[task, name, seed] for task in tasks])
        for name in names
        for seed in sorted(seeds)
        if all((task, name, seed) in stored for task in tasks)
    }
    found = []
    for row in rows:
        runs = {seed: run for (name, seed), run in means.items() if name == row.name}
        scales = [{each["scale"] for each in run["scaled"]} for run in runs.values()]
        for scale in (*sorted(set.intersection(*scales)), 1.0) if runs else ():
            told = [
                _told(_at_scale(run, scale), row, means.get((ALL.name, seed)), means.get((LINEAR.name, seed)))
                for seed, run in runs.items()
            ]
            values = {
                name: [value for each in told if (value := each.get(name)) is not None]
                for name in (*told[0], "over", "over nll")
            }
            for name in ("over", "over nll"):
                # Whole or not at all: seeds are paired by their place.
                if len(values[name]) != len(runs):
                    values[name] = []
            settings = [stored[task, row.name, min(runs)]["settings"] for task in tasks]
            tuned = tuple(tuple(each[name] for name in ("lr", row.weight) if name) for each in settings)
            found.append(Line(row, scale, tuple(runs), values, tuned))
    return found


def _mean(runs: Sequence[Run]) -> Run:
    """The mean of the measures of runs on several tasks."""

    def of(parts: Sequence[Mapping[str, Any]], *names: str) -> dict[str, Any]:
        numbers = {name: [part[name] for part in parts] for name in names}
        means = {name: None if None in values else fmean(values) for name, values in numbers.items()}
        lost = {name: fmean(part["lost"][name] for part in parts) for name in parts[0]["lost"]}
        return means | {"lost": lost}

    scales = [{each["scale"]: each for each in run["scaled"]} for run in runs]
    scaled = [
        {"scale": scale, **of([each[scale] for each in scales], *MEASURES)}
        for scale in sorted(set.intersection(*map(set, scales)))
    ]
    return of(runs, *MEASURES, *TRAINED, *COST) | {"scaled": scaled}


def _told(run: Run, row: Row, plain: Run | None, linear: Run | None) -> dict[str, Any]:
    """What the page says of a run."""
    found = {name: run[name] for name in (*MEASURES, *TRAINED, *COST)}
    found |= {"lost": forgetting(run)} | {f"lost {name}": value for name, value in run["lost"].items()}
    return found if row in (ALL, LINEAR) else found | _over(run, plain, linear)


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
    return {**entry, **{name: run[name] for name in TRAINED}, **dict.fromkeys(COST)}


def wise(found: Sequence[Line]) -> Curve:
    """The mean curve of scaled LoRA in a table, for its picture; empty where its runs are missing."""
    to_beat = [each for each in found if each.row in (ALL, LINEAR)]
    scales = {each.scale for each in to_beat}
    if not scales >= {*SCALES, 1.0} or (0.0 not in scales and LINEAR not in [each.row for each in to_beat]):
        return []
    return sorted((fmean(each.values["lost"]), fmean(each.values["target"])) for each in to_beat)
