"""Every architecture in a process of its own, so that one that crashes or hangs is a row and not the end."""

from __future__ import annotations

import json
import logging
import multiprocessing
import os
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

from benchmarks.compatibility.architectures import architectures, build
from benchmarks.compatibility.examination import Row, examine
from benchmarks.results import BenchmarkError, write_result
from slora.module_tree.names import near

Name = tuple[str, str]
"""Library and family."""
NAME = "compatibility"
# One of every kind of layer, and of every kind of model that something was once wrong with; seconds each.
QUICK: tuple[Name, ...] = (
    ("timm", "beit"), ("timm", "convit"), ("open_clip", "ViT-S-16-alt"), ("open_clip", "RN101"),
    ("transformers", "swinv2"), ("transformers", "wav2vec2"), ("transformers", "t5"), ("transformers", "mixtral"),
    ("transformers", "blip"),
)  # fmt: skip
PRELOADED = ["torch", "torchvision", "timm", "open_clip", "transformers", "slora", __name__]


def chosen(words: Sequence[str], quick: bool = False) -> list[Name]:
    """The architectures that `words` name: a library, a family, `library/family`, or else a part of a family's name.

    Raises:
        BenchmarkError: a word names none.
    """
    known = list(QUICK) if quick else [(lib, family) for lib, found in architectures().items() for family in found]
    found: set[Name] = set()
    for word in words:
        exact = {name for name in known if word in (*name, "/".join(name))}
        hits = exact or {name for name in known if word in name[1]}
        if not hits:
            others = near(word, [part for name in known for part in name])
            raise BenchmarkError(f"no architecture is named {word!r}; near are {', '.join(others)}")
        found |= hits
    return [name for name in known if not words or name in found]


def run(names: Sequence[Name], jobs: int, seconds: float, out: Path | None) -> list[Row]:
    """Examine `names` and return their rows in that order; write them into `out` if there is one, after each.

    Args:
        jobs: how many at a time, one thread each.
        seconds: after which one is ended.
    """
    rows: dict[Name, Row] = {}
    for name, row in each(names, jobs, seconds):
        rows[name] = row
        where = f"{len(rows)}/{len(names)} {'/'.join(name)}"
        print(f"{where}: {row['verdict']} {row['reason']}".rstrip(), flush=True)
        done = [rows[name] for name in names if name in rows]
        if out is not None:
            content = {"complete": len(done) == len(names), "settings": {"seconds": seconds}, "architectures": done}
            write_result(NAME, "cpu", content, out)
    return done if names else []


def each(
    names: Sequence[Name], jobs: int, seconds: float, task: Callable[[Name, Path], None] | None = None
) -> Iterator[tuple[Name, Row]]:
    """Yield the rows as they are done. `task`, by default `work`, writes a row to the path that it is given."""
    # Each is forked from a process that has imported everything and computed nothing.
    context = multiprocessing.get_context("forkserver")
    if task is None:
        context.set_forkserver_preload(PRELOADED)
    waiting, running = list(names), list[tuple[Name, Any, float, Path]]()
    with tempfile.TemporaryDirectory() as folder:
        try:
            while waiting or running:
                while waiting and len(running) < jobs:
                    name = waiting.pop(0)
                    path = Path(folder) / f"{len(waiting)}.json"
                    process = context.Process(target=task or work, args=(name, path))
                    process.start()
                    running.append((name, process, time.monotonic() + seconds, path))
                soonest = min(end for _, _, end, _ in running)
                wait([process.sentinel for _, process, _, _ in running], max(0.0, soonest - time.monotonic()))
                for entry in list(running):
                    name, process, end, path = entry
                    if process.is_alive() and time.monotonic() < end:
                        continue
                    running.remove(entry)
                    late = process.is_alive()
                    process.kill()
                    process.join()
                    took = round(time.monotonic() - end + seconds, 1)
                    what = f"no end after {seconds:g} s" if late else f"the process ended with {process.exitcode}"
                    row = json.loads(path.read_text()) if path.exists() else {"verdict": "failed", "reason": what}
                    yield name, {"library": name[0], "family": name[1], **row, "seconds": took}
        finally:
            for _, process, _, _ in running:
                process.kill()


def work(name: Name, path: Path) -> None:
    """Examine one architecture and write its row to `path`: what a process does."""
    import torch

    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    silent = os.open(os.devnull, os.O_WRONLY)
    for stream in (1, 2):
        os.dup2(silent, stream)
    with tempfile.TemporaryDirectory() as folder:
        row = examine(partial(build, *name), Path(folder))
    # Whole or not at all.
    path.with_suffix(".part").write_text(json.dumps(row), encoding="utf-8")
    path.with_suffix(".part").replace(path)
