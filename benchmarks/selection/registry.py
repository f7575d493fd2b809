"""The tables, and the tasks by name. Each is made at first use, so that a missing extra costs its own task alone."""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable

from benchmarks.results import BenchmarkError
from benchmarks.selection.retention import retention_rows
from benchmarks.selection.rows import Row, rows
from benchmarks.selection.task import Task

# name of the page: the rows of its tables.
TABLES: dict[str, Callable[[], list[Row]]] = {"selection": rows, "retention": retention_rows}

# name: module with a function `task(name) -> Task`.
TASKS = {
    "digits": "benchmarks.selection.demo",
    "inverted": "benchmarks.selection.demo",
    "noisy": "benchmarks.selection.demo",
    "mnist": "benchmarks.selection.demo",
    "glyphs": "benchmarks.selection.glyph",
    "functions": "benchmarks.selection.minilm",
}
# The tasks whose validation samples decide about learning rates and penalties.
TUNED_ON = ("noisy", "mnist", "glyphs", "functions")


@functools.lru_cache(None)
def task_named(name: str) -> Task:
    """Return the task.

    Raises:
        BenchmarkError: the name is unknown.
    """
    if name not in TASKS:
        raise BenchmarkError(f"task {name!r} is unknown; use some of {', '.join(TASKS)}")
    found: Task = importlib.import_module(TASKS[name]).task(name)
    return found
