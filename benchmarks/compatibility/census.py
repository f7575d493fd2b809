"""Every architecture in a process of its own, so that one that crashes or hangs is a row and not the end."""

from __future__ import annotations

import logging
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.compatibility.architectures import TABLES, architectures, build
from benchmarks.compatibility.checks import Row, check
from benchmarks.results import BenchmarkError, environment, write_result
from slora.module_tree.names import near

Task = Callable[[str, Connection], None]
PRELOADED = ["torch", "torchvision", "timm", "open_clip", "transformers", "slora", __name__]


def chosen(words: Sequence[str], quick: bool = False) -> list[str]:
    """The architectures, as `library/family`, that `words` name: a library, a family, both, or a part of a family.

    Raises:
        BenchmarkError: a word names none.
    """
    known: list[str] = TABLES["quick"].split() if quick else []
    known = known or [f"{library}/{family}" for library, found in architectures().items() for family in found]
    found: set[str] = set()
    for word in words:
        exact = {name for name in known if word in (name, *name.split("/", 1))}
        hits = exact or {name for name in known if word in name.split("/", 1)[1]}
        if not hits:
            others = near(word, [part for name in known for part in name.split("/", 1)])
            raise BenchmarkError(f"no architecture is named {word!r}; near are {', '.join(others)}")
        found |= hits
    return [name for name in known if not words or name in found]


def work(name: str, sender: Connection) -> None:
    """Check one architecture, without a word, and send its row: what a process does."""
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silent, stream)
    with tempfile.TemporaryDirectory() as folder:
        sender.send(check(partial(build, *name.split("/", 1)), Path(folder)))


def run(names: Sequence[str], jobs: int, seconds: float, out: Path | None, task: Task = work) -> list[Row]:
    """Return the rows of `names`, in their order; write them into `out/compatibility.json`, if given, after each.

    Args:
        names: architectures as `library/family`.
        jobs: how many at a time, one thread each.
        seconds: after which one is ended.
        out: a folder.
        task: what sends the row of a name, in a process.
    """
    # Each is forked from a process that has imported everything and computed nothing.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    about, rows = environment("cpu"), list[Row]()
    with ThreadPoolExecutor(jobs) as threads:
        try:
            for row in threads.map(partial(_in_a_process, context, task, seconds), names):
                rows.append(row)
                where = f"{len(rows)}/{len(names)} {row['library']}/{row['family']}"
                print(f"{where}: {row['verdict']} {row['reason']}".rstrip(), flush=True)
                if out is not None:
                    whole = len(rows) == len(names)
                    asked = {"seconds": seconds}
                    content = {"environment": about, "complete": whole, "settings": asked, "architectures": rows}
                    write_result("compatibility", "cpu", content, out)
        finally:
            # Of an interrupted census.
            threads.shutdown(wait=False, cancel_futures=True)
            for child in multiprocessing.active_children():
                child.kill()
    return rows


def _in_a_process(context: Any, task: Task, seconds: float, name: str) -> Row:
    """The row of `name`, with how long it took; "failed" where the process crashes or takes more than `seconds`."""
    start = time.monotonic()
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=task, args=(name, sender), daemon=True)
    process.start()
    sender.close()
    row: Row = {"verdict": "failed", "reason": f"no end after {seconds:g} s"}
    try:
        if receiver.poll(seconds):
            row = receiver.recv()
    except EOFError:
        process.join()
        row["reason"] = f"the process ended with {process.exitcode}"
    process.kill()
    process.join()
    library, family = name.split("/", 1)
    return {"library": library, "family": family, **row, "seconds": round(time.monotonic() - start, 1)}
