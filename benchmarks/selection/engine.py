"""`python -m benchmarks selection`: runs what the store lacks, one process of one thread per run."""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib import metadata
from typing import Any, NamedTuple

import torch

from benchmarks import results, workers
from benchmarks.selection.registry import task_named
from benchmarks.selection.store import Run, Store, key
from benchmarks.selection.task import Configuration

SEEDS = (0, 1, 2, 3, 4)
# Of one run, the start of its process included; on a machine that others use a run of 15 s takes minutes.
SECONDS = 1800.0


class Case(NamedTuple):
    """One training run."""

    task: str
    configuration: Configuration
    seed: int
    validation: bool = False
    quick: bool = False

    @property
    def key(self) -> tuple[str, str, int]:
        """As `store.key`."""
        return self.task, self.configuration.name, self.seed

    def asked(self) -> Run:
        """The part of its line that says what was run."""
        asked: Run = {"task": self.task, "row": self.configuration.name, "seed": self.seed}
        asked["settings"] = dict(self.configuration.settings)
        if self.configuration.retain:
            asked["retain"] = self.configuration.retain
        return asked


def cases(configurations: Iterable[Configuration], tasks: Sequence[str], seeds: Sequence[int]) -> list[Case]:
    """Return one case per configuration, task and seed: seed by seed, so that a part of them covers every task."""
    configurations = list(configurations)
    return [Case(task, each, seed) for seed in seeds for each in configurations for task in tasks]


def missing(cases: Iterable[Case], store: Store) -> list[Case]:
    """Return the cases that the store has no run of, or one with other settings."""
    cases = list(cases)
    stored = {key(run): run for task in dict.fromkeys(case.task for case in cases) for run in store.runs(task)}
    return [case for case in cases if not is_of(stored.get(case.key), case)]


def is_of(run: Mapping[str, Any] | None, case: Case) -> bool:
    """Whether a stored run is what the case asks for."""
    if run is None:
        return False
    asked, scales = case.asked(), {each["scale"] for each in run["scaled"]}
    same = all(run.get(name) == asked.get(name) for name in {*asked, "retain"})
    return same and scales >= {*case.configuration.scales}


def work(case: Case) -> dict[str, Any]:
    """Train and measure once, in a process of its own."""
    torch.set_num_threads(1)
    record = task_named(case.task).run(case.configuration, case.seed, case.validation, case.quick)
    return {"state": "done", "record": record}


def run(
    cases: Sequence[Case],
    store: Store,
    jobs: int = 1,
    seconds: float = math.inf,
    say: Callable[[str], None] = print,
) -> int:
    """Run the cases that the store lacks and add each to it; return how many failed.

    Args:
        jobs: processes side by side.
        seconds: begin no new run after this time; one that has begun then is stopped and lost.
        say: prints a line.
    """
    todo = missing(cases, store)
    say(f"{len(cases) - len(todo)} of {len(cases)} runs are there, {len(todo)} to do")
    failed, about = 0, origin()
    outcomes = workers.run(work, todo, jobs, time.monotonic() + seconds, SECONDS)
    for number, (case, outcome) in enumerate(outcomes, start=1):
        named = f"{number}/{len(todo)} {case.task} {case.configuration.name} seed {case.seed}"
        if outcome["state"] == workers.NO_TIME:
            continue
        if outcome["state"] != "done":
            failed += 1
            say(f"{named}: failed: {outcome['reason']}")
            continue
        record = outcome["record"]
        store.add({**case.asked(), **about, **record})
        lost = ", ".join(f"{name} {value:+.2f}" for name, value in record["lost"].items())
        say(f"{named}: {record['target']:.2f} %, NLL {record['nll']:.3f}, lost {lost}, {record['seconds']:.0f} s")
    return failed


def origin() -> dict[str, Any]:
    """Commit and versions, as every line has them."""
    about = results.environment("cpu")
    packages = ("torch", "timm", "scikit-learn", "numpy")
    versions = [f"{name} {metadata.version(name)}" for name in packages]
    return {
        "commit": (about["commit"] or "unknown")[:10] + "-dirty" * bool(about["dirty"]),
        "versions": ", ".join([f"python {platform.python_version()}", *versions]),
    }
