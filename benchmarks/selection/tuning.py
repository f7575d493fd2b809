"""Learning rates, and the penalties of gates: chosen on validation samples, the same small grid for every row.

The rate of a row is the one with the highest mean of target less forgetting on validation samples: a point of the new
task is worth a point of the old one. The penalty of gates is the one that ends nearest to the share of blocks. Neither
sees a test sample or a seed of the page.
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
# With gate_lr 0.1 in 200 steps, from a few blocks switched off to nearly all.
PENALTIES = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0)


def store(folder: Store | None = None) -> Store:
    """Return the store of the tuning runs of the folder of a store."""
    return Store((folder.folder if folder else FOLDER) / "tuning")


def tuned_on(family: str) -> list[str]:
    """Return the tasks that decide for a family."""
    return [name for name in TUNED_ON if task_named(name).family == family]


def grid(row: Row, task: str, tuned: Store, seeds: Sequence[int] = SEEDS, quick: bool = False) -> list[Case]:
    """Return the tuning runs of a row on a task, as far as those that they build on are there.

    Rates of gates follow once their penalty is chosen.
    """
    family = task_named(task).family
    trials = _penalties(row, family) if row.strategy == "gates" else []
    trials = [*trials, *(_candidates(row, family, tuned, seeds) or ())]
    return [Case(task, trial, seed, validation=True, quick=quick) for trial in trials for seed in seeds]


def chosen(row: Row, family: str, tuned: Store, seeds: Sequence[int] = SEEDS) -> Configuration | None:
    """Return the configuration with what is tuned; None while tuning runs are missing."""
    trials = _candidates(row, family, tuned, seeds)
    found = [_runs(trial, tuned_on(family), tuned, seeds) for trial in trials or ()]
    if not trials or any(not runs for runs in found):
        return None
    scores = [fmean(score(run) for run in runs or ()) for runs in found]
    return dataclasses.replace(row.configuration, settings=trials[scores.index(max(scores))].settings)


def _candidates(row: Row, family: str, tuned: Store, seeds: Sequence[int]) -> list[Configuration] | None:
    """The configurations of which tuning takes the best; None while another choice has to be made first."""
    if row.strategy != "gates":
        return [_trial(row, lr=rate) for rate in _rates(family)]
    penalty = penalty_of(row, family, tuned, seeds)
    return None if penalty is None else [_trial(row, lr=rate, penalty=penalty) for rate in _rates(family)]


def penalty_of(row: Row, family: str, tuned: Store, seeds: Sequence[int] = SEEDS) -> float | None:
    """Return the penalty that ends nearest to the share of a row of gates, by ratio; None while runs are missing."""
    assert row.share is not None
    distances: dict[float, float] = {}
    for penalty, trial in zip(PENALTIES, _penalties(row, family), strict=True):
        found = _runs(trial, tuned_on(family), tuned, seeds)
        if not found:
            return None
        # Half a block for none: a ratio to 0 says nothing.
        share = fmean(max(run["active"], 0.5) / run["blocks"] for run in found)
        distances[penalty] = abs(math.log(share / row.share))
    return min(distances, key=lambda penalty: distances[penalty])


def score(run: Run) -> float:
    """Target percent less the points forgotten, the mean over the measures of retention."""
    return float(run["target"]) - fmean(run["lost"].values())


def _runs(trial: Configuration, tasks: Sequence[str], tuned: Store, seeds: Sequence[int]) -> list[Run] | None:
    wanted = [Case(task, trial, seed) for task in tasks for seed in seeds]
    stored = {key(run): run for task in tasks for run in tuned.runs(task)}
    found = [run for case in wanted if is_of(run := stored.get(case.key), case) and run is not None]
    return found if len(found) == len(wanted) else None


def _trial(row: Row, **tuned: float) -> Configuration:
    # Rows of gates that have the same penalty have the same runs.
    name = row.strategy if "penalty" in tuned else row.name
    named = ", ".join([name, *(f"{setting} {value:g}" for setting, value in tuned.items())])
    return Configuration(named, {**row.configuration.settings, **tuned}, retain=row.configuration.retain)


def _penalties(row: Row, family: str) -> list[Configuration]:
    rates = sorted(_rates(family))
    return [_trial(row, lr=rates[len(rates) // 2], penalty=penalty) for penalty in PENALTIES]


def _rates(family: str) -> Sequence[float]:
    tasks = tuned_on(family)
    return task_named(tasks[0]).rates if tasks else ()
