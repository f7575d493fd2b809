"""Peak memory of a call on the CPU, in a process of its own: what others have freed cannot hide what it needs."""

from __future__ import annotations

import ctypes
import multiprocessing
import re
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import Missing, need

# Every process imports all of these, whoever is measured in it: nobody is charged for what it imports.
LIBRARIES = ("timm", "peft")


def in_a_process(measure: Callable[..., float], *arguments: Any) -> float:
    """Return what `measure(*arguments)` gives in a new process with as many threads as this one, or raise its error."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, _prepare, (torch.get_num_threads(),)) as pool:
        return pool.submit(measure, *arguments).result()


def _prepare(threads: int) -> None:
    torch.set_num_threads(threads)
    for library in LIBRARIES:
        with suppress(Missing):
            need(library)


def peak_begins() -> float:
    """Forget the peak so far and return the resident memory, in MiB."""
    # What earlier calls have freed but the allocator has kept would hide what comes.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def peak() -> float:
    """The largest resident memory since `peak_begins`, in MiB."""
    # Not getrusage: its maximum survives exec, so a child would report its parent's.
    return _resident("VmHWM")


def _resident(field: str) -> float:
    found = re.search(rf"^{field}:\s+(\d+)", Path("/proc/self/status").read_text(), re.M)
    assert found is not None, f"/proc/self/status has no {field} line; peak memory can be measured on Linux only"
    return int(found[1]) / 1024
