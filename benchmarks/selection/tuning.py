"""Learning rates and weights: chosen on validation samples, the same small grid for every row.

The rate of a row is the one with the highest mean of target less forgetting on validation samples: a point of the new
task is worth a point of the old one. A weight is chosen first, at a middle rate, by the same rule; of gates the penalty
that ends nearest to the share of blocks. None sees a test sample or a seed of the page.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from statistics import fmean

from benchmarks.selection.engine import Case, is_of
from benchmarks.selection.registry import TUNED_ON, task_named
from benchmarks.selection.rows import Row
from benchmarks.selection.store import FOLDER, Run, Store, key
from benchmarks.selection.task import Configuration

SEEDS = (100,)


def store(folder: Store | None = None) -> Store:
    """Return the store of the tuning runs of the folder of a store."""
    return Store((folder.folder if folder else FOLDER) / "tuning")


def tuned_on(family: str) -> list[str]:
    """Return the tasks that decide for a family."""
    return [name for name in TUNED_ON if task_named(name).family == family]


def grid(row: Row, task: str, tuned: Store, quick: bool = False) -> list[Case]:
    """Return the tuning runs of a row on a task, as far as those that they build on are there.

    Rates follow once a weight is chosen.
    """
    family = task_named(task).family
    trials = [*_weighted(row, family), *(_candidates(row, family, tuned) or ())]
    return [Case(task, trial, seed, validation=True, quick=quick) for trial in trials for seed in SEEDS]


def chosen(row: Row, family: str, tuned: Store) -> Configuration | None:
    """Return the configuration with what is tuned; None while tuning runs are missing."""
    trials = _candidates(row, family, tuned)
    found = [_runs(trial, tuned_on(family), tuned) for trial in trials or ()]
    if not trials or any(not runs for runs in found):
        return None
    scores = [fmean(score(run) for run in runs or ()) for runs in found]
    return dataclasses.replace(row.configuration, settings=trials[scores.index(max(scores))].settings)


def _candidates(row: Row, family: str, tuned: Store) -> list[Configuration] | None:
    """The configurations of which tuning takes the best; None while another choice has to be made first."""
    if not row.weight:
        return [_trial(row, lr=rate) for rate in _rates(family)]
    weight = weight_of(row, family, tuned)
    return None if weight is None else [_trial(row, lr=rate, **{row.weight: weight}) for rate in _rates(family)]


def weight_of(row: Row, family: str, tuned: Store) -> float | None:
    """Return the best of the weights of a row; None while runs are missing."""
    found = [_runs(trial, tuned_on(family), tuned) for trial in _weighted(row, family)]
    missed = [_missed(row, runs) for runs in found if runs]
    return row.weights[missed.index(min(missed))] if missed and len(missed) == len(found) else None


def _missed(row: Row, runs: Sequence[Run]) -> float:
    """How far the runs of a weight are from what it is for: the share of blocks, as a ratio, or the highest score."""
    if row.weight != "penalty":
        return -fmean(map(score, runs))
    assert row.share is not None
    # Half a block for none: a ratio to 0 says nothing.
    return abs(math.log(fmean(max(run["active"], 0.5) / run["blocks"] for run in runs) / row.share))


def score(run: Run) -> float:
    """Target percent less the points forgotten, the mean over the measures of retention."""
    return float(run["target"]) - fmean(run["lost"].values())


def _runs(trial: Configuration, tasks: Sequence[str], tuned: Store) -> list[Run] | None:
    wanted = [Case(task, trial, seed) for task in tasks for seed in SEEDS]
    stored = {key(run): run for task in tasks for run in tuned.runs(task)}
    found = [run for case in wanted if is_of(run := stored.get(case.key), case) and run is not None]
    return found if len(found) == len(wanted) else None


def _trial(row: Row, **tuned: float) -> Configuration:
    # Rows of gates that have the same penalty have the same runs.
    name = row.strategy if row.weight == "penalty" else row.name
    named = ", ".join([name, *(f"{setting} {value:g}" for setting, value in tuned.items())])
    return Configuration(named, {**row.configuration.settings, **tuned}, retain=row.configuration.retain)


def _weighted(row: Row, family: str) -> list[Configuration]:
    rates = sorted(_rates(family))
    return [_trial(row, lr=rates[len(rates) // 2], **{row.weight: weight}) for weight in row.weights]


def _rates(family: str) -> Sequence[float]:
    tasks = tuned_on(family)
    return task_named(tasks[0]).rates if tasks else ()
