"""The command line of `python -m benchmarks selection`."""

from __future__ import annotations

import argparse
import math
import time
from pathlib import Path

from benchmarks.results import BenchmarkError
from benchmarks.selection import tuning
from benchmarks.selection.engine import SEEDS, Case, cases, run
from benchmarks.selection.registry import TABLES, TASKS, task_named
from benchmarks.selection.rows import SHARES, configuration_on, some
from benchmarks.selection.store import FOLDER, Store

NAMES = tuple(dict.fromkeys(row.strategy for table in TABLES.values() for row in table()))


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options."""
    command.set_defaults(call=selection)
    command.add_argument("--tasks", nargs="+", choices=list(TASKS), default=list(TASKS), metavar="TASK")
    command.add_argument("--table", choices=list(TABLES), default="selection", help="the page (default: selection)")
    command.add_argument("--strategies", nargs="+", choices=NAMES, metavar="STRATEGY", help=", ".join(NAMES))
    command.add_argument("--shares", nargs="+", type=float, choices=SHARES, metavar="SHARE", help=f"some of {SHARES}")
    command.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="SEED")
    command.add_argument("--tune", action="store_true", help="choose learning rates and weights first")
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
    tuned, chosen = tuning.store(store), some(TABLES[args.table](), args.strategies, args.shares)
    tasks = [name for name in args.tasks if _here(name)]
    families = dict.fromkeys(task_named(name).family for name in tasks)
    deciding = [task for family in families for task in tuning.tuned_on(family)]
    failed = 0
    with store.alone():
        # Twice: rates are tried with the weight that the first pass chooses.
        for _ in range(2 * args.tune):
            trials = {
                case.key: case
                for row in chosen
                for task in deciding
                if row.fits(task_named(task))
                for case in tuning.grid(row, task, tuned, quick=args.quick)
            }
            failed += run(list(trials.values()), tuned, args.jobs, until - time.monotonic())
        todo: list[Case] = []
        for name in tasks:
            task = task_named(name)
            found = {row.name: tuning.chosen(row, task.family, tuned) for row in chosen if row.fits(task)}
            if untuned := [row for row, each in found.items() if each is None]:
                print(f"{name}: not tuned, so left out: {', '.join(untuned)}")
            there = [configuration_on(each, task) for each in found.values() if each is not None]
            todo += cases(there, [name], args.seeds)
        todo = [case._replace(quick=args.quick) for case in sorted(todo, key=lambda case: case.seed)]
        failed += run(todo, store, args.jobs, until - time.monotonic())
    return 1 if failed else 0


def _here(name: str) -> bool:
    """Whether a task can run here; says what it lacks."""
    try:
        task_named(name).check()
    except BenchmarkError as error:
        print(error)
        return False
    return True
