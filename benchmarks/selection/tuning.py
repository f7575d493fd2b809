"""Learning rates, and the penalties of gates: chosen on validation samples, the same small grid for every row.

The rate of a row is the one with the highest mean of target less forgetting on validation samples: a point of the new
task is worth a point of the old one. The penalty of gates is the one that ends nearest to the share of blocks. Neither
sees a test sample or a seed of the page.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean

from benchmarks.selection.engine import Case, is_of, with_settings
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
    """Return the tuning runs of a row on a task; rates of gates follow once their penalty is chosen."""
    rates = task_named(task).rates
    if row.strategy == "gates":
        trials = [_penalised(row, penalty, _middle(rates)) for penalty in PENALTIES]
        penalty = penalty_of(row, task_named(task).family, tuned, seeds)
        trials += [] if penalty is None else [_rated(row, rate, penalty) for rate in rates]
    else:
        trials = [_rated(row, rate) for rate in rates]
    return [Case(task, trial, seed, validation=True, quick=quick) for trial in trials for seed in seeds]


def chosen(row: Row, family: str, tuned: Store, seeds: Sequence[int] = SEEDS) -> Configuration | None:
    """Return the configuration with its learning rate, and penalty; None while tuning runs are missing."""
    penalty = penalty_of(row, family, tuned, seeds) if row.strategy == "gates" else None
    tasks = tuned_on(family)
    if not tasks or (row.strategy == "gates" and penalty is None):
        return None
    scores: dict[float, float] = {}
    for rate in task_named(tasks[0]).rates:
        found = _runs(_rated(row, rate, penalty), tasks, tuned, seeds)
        if found is None:
            return None
        scores[rate] = fmean(score(run) for run in found)
    best = max(scores, key=lambda rate: scores[rate])
    settings = {"lr": best} | ({} if penalty is None else {"penalty": penalty})
    return with_settings(row.configuration, **settings)


def penalty_of(row: Row, family: str, tuned: Store, seeds: Sequence[int] = SEEDS) -> float | None:
    """Return the penalty that ends nearest to the share of a row of gates, by ratio; None while runs are missing."""
    tasks = tuned_on(family)
    assert row.share is not None
    distances: dict[float, float] = {}
    for penalty in PENALTIES:
        found = _runs(_penalised(row, penalty, _middle(task_named(tasks[0]).rates)), tasks, tuned, seeds)
        if found is None:
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


def _rated(row: Row, rate: float, penalty: float | None = None) -> Configuration:
    settings = {**row.configuration.settings, "lr": rate} | ({} if penalty is None else {"penalty": penalty})
    return Configuration(f"{row.name}, lr {rate:g}", settings, retain=row.configuration.retain)


def _penalised(row: Row, penalty: float, rate: float) -> Configuration:
    # The same run for every share.
    settings = {**row.configuration.settings, "lr": rate, "penalty": penalty}
    return Configuration(f"{row.strategy}, penalty {penalty:g}", settings, retain=row.configuration.retain)


def _middle(rates: Sequence[float]) -> float:
    return sorted(rates)[len(rates) // 2]
