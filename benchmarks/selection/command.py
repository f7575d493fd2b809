"""The command line of `python -m benchmarks selection`."""

from __future__ import annotations

import argparse
import math
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from benchmarks.results import BenchmarkError
from benchmarks.selection import tuning
from benchmarks.selection.engine import SEEDS, Case, cases, run
from benchmarks.selection.registry import TASKS, task_named
from benchmarks.selection.rows import LINEAR, SHARES, STRATEGIES, configurations_on, rows
from benchmarks.selection.store import FOLDER, Store

NAMES = ("all", "linear", *STRATEGIES)


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options."""
    command.set_defaults(call=selection)
    command.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    command.add_argument("--strategies", nargs="+", choices=NAMES, metavar="STRATEGY", help=", ".join(NAMES))
    command.add_argument("--shares", nargs="+", type=float, choices=SHARES, metavar="SHARE", help=f"some of {SHARES}")
    command.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="SEED")
    command.add_argument("--tune", action="store_true", help="choose learning rates and penalties first")
    command.add_argument("--jobs", type=int, default=1, help="processes at a time, of one thread each (default 1)")
    command.add_argument("--seconds", type=float, default=math.inf, help="end after this time; a later call goes on")
    command.add_argument("--quick", action="store_true", help="a few steps, to see that everything works; needs --out")
    command.add_argument("--out", type=Path, help="folder of the runs (default: benchmarks/results/selection)")


def selection(args: argparse.Namespace) -> int:
    """Run what the folder lacks; 1 where a run failed."""
    if args.quick and args.out is None:
        raise BenchmarkError("--quick needs --out; results/ holds whole runs")
    until = time.monotonic() + args.seconds
    store = Store(args.out or FOLDER)
    tuned, chosen = tuning.store(store), rows(args.strategies, args.shares)
    tasks = list(_here(args.tasks))
    families = dict.fromkeys(task_named(name).family for name in tasks)
    failed = 0
    with store.alone():
        if args.tune:
            # Twice: rates of gates are tried with the penalty that the first pass chooses.
            for _ in range(2):
                trials = _unique(
                    case
                    for row in chosen
                    for family in families
                    for task in tuning.tuned_on(family)
                    if row is not LINEAR or task_named(task).probe
                    for case in tuning.grid(row, task, tuned, quick=args.quick)
                )
                failed += run(trials, tuned, args.jobs, until - time.monotonic())
        todo: list[Case] = []
        for task in tasks:
            family = task_named(task).family
            found = {row.name: tuning.chosen(row, family, tuned) for row in chosen}
            untuned = [
                name for name, each in found.items() if each is None and (name != "linear" or task_named(task).probe)
            ]
            if untuned:
                print(f"{task}: not tuned, so left out: {', '.join(untuned)}")
            there = [each for each in found.values() if each is not None]
            todo += cases(configurations_on(there, task_named(task).probe), [task], args.seeds)
        todo = [case._replace(quick=args.quick) for case in sorted(todo, key=lambda case: case.seed)]
        failed += run(todo, store, args.jobs, until - time.monotonic())
    return 1 if failed else 0


def _here(names: Iterable[str]) -> Iterator[str]:
    """Yield the tasks that can run here, and say what the others lack."""
    for name in names:
        try:
            task_named(name).check()
            yield name
        except BenchmarkError as error:
            print(error)


def _unique(trials: Iterable[Case]) -> list[Case]:
    found: dict[tuple[str, str, int], Case] = {}
    for case in trials:
        found.setdefault(case.key, case)
    return list(found.values())
