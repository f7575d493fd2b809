"""The runs on disk: a JSON line each, a file per task, rewritten atomically after every run.

    {"task": ..., "row": ..., "seed": ..., "settings": {...}, "retain": ..., "commit": ..., "versions": ...,
     <the fields of `Record`>}

A run is identified by task, row, seed and settings: with other settings it is another run, and replaces the old one.
"""

from __future__ import annotations

import fcntl
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks.results import RESULTS, BenchmarkError, made
from slora.io.atomic import write_text

FOLDER = RESULTS / "selection"
Run = dict[str, Any]


class Store:
    """The runs of a folder."""

    def __init__(self, folder: Path = FOLDER) -> None:
        self.folder = folder

    def runs(self, task: str) -> list[Run]:
        """Return the runs of a task, none if there is no file.

        Raises:
            BenchmarkError: a line is no JSON; names file and line.
        """
        path = self.path(task)
        if not path.exists():
            return []
        found = []
        for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
            try:
                found.append(json.loads(line))
            except ValueError as error:
                raise BenchmarkError(f"{path}:{number} is no JSON ({error}); remove the line") from error
        return found

    def path(self, task: str) -> Path:
        """Return the file of a task."""
        return self.folder / f"{task}.jsonl"

    def add(self, run: Run) -> None:
        """Write a run into its file, in place of one of the same task, row and seed."""
        others = [other for other in self.runs(run["task"]) if key(other) != key(run)]
        lines = [json.dumps(each) for each in sorted([*others, run], key=lambda each: (each["seed"], each["row"]))]
        write_text(self.path(run["task"]), "\n".join(lines) + "\n")

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Keep other processes from writing into the folder.

        Raises:
            BenchmarkError: another one is, or the folder cannot be made.
        """
        # On the folder: no file is left behind.
        descriptor = os.open(made(self.folder), os.O_RDONLY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            yield
        except BlockingIOError as error:
            raise BenchmarkError(
                f"another process is writing into {self.folder}; wait until it ends, or use --out"
            ) from error
        finally:
            os.close(descriptor)


def key(run: Run) -> tuple[str, str, int]:
    """What there is one run of."""
    return run["task"], run["row"], run["seed"]
