"""`python -m tests.mutations --cases 100000`: read as many mutants of every kind, and print what went wrong.

A single case is repeated with `--first NUMBER --cases 1`; `--kind adapter` leaves the other kinds out.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
from pathlib import Path

import torch

from tests.mutations.kinds import KINDS
from tests.mutations.trials import run


def main() -> int:
    """Return how many mutants went wrong, at most 1."""
    parser = argparse.ArgumentParser(prog="python -m tests.mutations", description=__doc__)
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--kind", choices=KINDS, action="append")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    failed = False
    for name in arguments.kind or KINDS:
        with tempfile.TemporaryDirectory() as folder:
            numbers = range(arguments.first, arguments.first + arguments.cases)
            outcome = run(KINDS[name](), Path(folder) / name, numbers, arguments.seed)
        for number, what in outcome.wrong.items():
            print(f"{name} {number}: {what}")
        print(f"{name}: {outcome.loaded} loaded, {outcome.refused} refused, {len(outcome.wrong)} wrong")
        failed = failed or bool(outcome.wrong)
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
