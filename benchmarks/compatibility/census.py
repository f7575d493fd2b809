"""Every architecture in processes apart, so that one that crashes or hangs is a row and not the end."""

from __future__ import annotations

import logging
import math
import os
import tempfile
import time
import warnings
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch

from benchmarks import workers
from benchmarks.compatibility.architectures import architectures, build
from benchmarks.compatibility.checks import Row, check
from benchmarks.results import BenchmarkError, environment, write_result

# Of one architecture, the start of its process included.
SECONDS = 600.0


def chosen(words: Sequence[str]) -> list[str]:
    """The architectures, as `library/family`, that have one of `words` in their name; all without any.

    Raises:
        BenchmarkError: a word is in no name.
    """
    known = [f"{library}/{family}" for library, families in architectures().items() for family in families]
    for word in words:
        if not any(word in name for name in known):
            raise BenchmarkError(f"no architecture has {word!r} in its name; names are like {known[0]}")
    return [name for name in known if not words or any(word in name for word in words)]


def work(name: str) -> Row:
    """Check one architecture without a word."""
    start, library, family = time.monotonic(), *name.split("/", 1)
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silent, stream)
    os.close(silent)
    with tempfile.TemporaryDirectory() as folder:
        row = check(partial(build, library, family), Path(folder))
    return {**row, "seconds": round(time.monotonic() - start, 1)}


def run(names: Sequence[str], jobs: int, out: Path | None) -> list[Row]:
    """Return the rows of `names`, in their order, and write them into `out/compatibility.json`, if given.

    `jobs` are examined at a time, with one thread each.
    """
    found: dict[str, Row] = {}
    for name, outcome in workers.run(work, names, jobs, math.inf, SECONDS):
        library, family = name.split("/", 1)
        # A process that ended leaves a "state" in place of a verdict.
        row = {"library": library, "family": family, "verdict": outcome.get("state"), **outcome}
        found[name] = row
        print(f"{len(found)}/{len(names)} {name}: {row['verdict']} {row['reason']}".rstrip(), flush=True)
    rows = [found[name] for name in names]
    if out is not None:
        write_result("compatibility", "cpu", {"environment": environment("cpu"), "architectures": rows}, out)
    return rows
