"""The command line of `python -m benchmarks retention`."""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.results import RESULTS, environment
from benchmarks.retention.runs import RUNS, read
from benchmarks.retention.table import chosen_weight
from benchmarks.retention.variants import BASES, SCALES, SEEDS, SHIFTS, TUNED_ON, TUNING_SEEDS, VARIANTS
from slora.io.atomic import write_text

FOLDER = RESULTS / "retention"


class Case(NamedTuple):
    """A run, by what determines it."""

    base: str
    variant: str
    weight: float
    shift: str
    seed: int
    validation: bool


def add_options(command: argparse.ArgumentParser) -> None:
    """Add the options."""
    command.set_defaults(call=retention)
    command.add_argument("--bases", nargs="+", choices=BASES, default=list(BASES), metavar="METHOD")
    command.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT")
    command.add_argument("--shifts", nargs="+", choices=SHIFTS, default=list(SHIFTS), metavar="SHIFT")
    command.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS), metavar="SEED")
    command.add_argument("--tune", action="store_true", help="choose weights first")
    command.add_argument("--seconds", type=float, default=math.inf, help="begin no new run after this time")
    command.add_argument("--out", type=Path, default=FOLDER, help="folder of the runs")


def retention(args: argparse.Namespace) -> int:
    """Run what the folder lacks, one run after the other; `python -m benchmarks report` makes the page."""
    until, path = time.monotonic() + args.seconds, args.out / RUNS
    source = None
    for case in wanted(args, runs := read(path)):
        if time.monotonic() > until:
            break
        from benchmarks.retention.run import run_variant
        from slora.demo import methods

        source = methods.source() if source is None else source
        found = run_variant(*case[:5], source, case.validation, SCALES if case.variant == "none" else ())
        about = environment("cpu")
        runs.append(found | {"commit": about["commit"], "torch": about["packages"]["torch"]})
        write_text(path, "".join(json.dumps(run) + "\n" for run in runs))
        print(*case, f"target {100 * found['accuracy']:.2f} % NLL {found['nll']:.3f}", flush=True)
    return 0


def wanted(args: argparse.Namespace, runs: list[dict[str, Any]]) -> Iterator[Case]:
    """Yield the runs that `runs`, which grows meanwhile, does not hold."""
    pairs = [(base, name) for base in args.bases for name in args.variants if base in VARIANTS[name].bases]
    plain = (BASES[0], "none")
    if args.tune:
        for seed in TUNING_SEEDS:
            yield from _lacking(runs, Case(*plain, 0.0, TUNED_ON, seed, True))
            for base, name in pairs:
                for weight in VARIANTS[name].weights:
                    yield from _lacking(runs, Case(base, name, weight, TUNED_ON, seed, True))
    for seed in args.seeds:
        for shift in args.shifts:
            for base, name in dict.fromkeys([plain, *pairs]):
                best = chosen_weight(runs, base, name)
                if best is not None:
                    yield from _lacking(runs, Case(base, name, best, shift, seed, False))


def _lacking(runs: Sequence[dict[str, Any]], case: Case) -> Iterator[Case]:
    if not any(all(run[name] == value for name, value in case._asdict().items()) for run in runs):
        yield case
