"""Peak memory of a call on the CPU, in a process of its own: what others have freed cannot hide what it needs."""

from __future__ import annotations

import ctypes
import multiprocessing
import re
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch

from benchmarks.results import BenchmarkError, Missing, need
from benchmarks.timing import first_line

# Every process imports all of these, whoever is measured in it: no contender is charged for what it imports.
LIBRARIES = ("timm", "peft")


def in_a_process(measure: Callable[..., float], *arguments: Any) -> float:
    """Return what `measure(*arguments)` gives in a new process with as many threads as this one.

    Raises:
        Missing: `measure` raised it.
        BenchmarkError: `measure` raised something else, or the process has ended without an answer.
    """
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_answer, args=(sender, torch.get_num_threads(), measure, arguments))
    try:
        with _interrupts_ignored():
            process.start()
        # Only the process holds its end now, so that its death ends the wait.
        sender.close()
        value, missing, failed = receiver.recv()
    except EOFError:
        value, missing, failed = None, None, "it has ended without an answer"
    except BaseException:
        process.kill()
        raise
    finally:
        process.join()
        receiver.close()
    if missing is not None:
        raise Missing(missing)
    if failed is not None:
        raise BenchmarkError(f"the process that measures memory, exit code {process.exitcode}: {failed}")
    return float(value)


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Ctrl-C reaches a whole group: a process that is started here leaves it, and what to say, to this one."""
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


def _answer(sender: Connection, threads: int, measure: Callable[..., float], arguments: tuple[Any, ...]) -> None:
    torch.set_num_threads(threads)
    for library in LIBRARIES:
        with suppress(Missing):
            need(library)
    try:
        sender.send((measure(*arguments), None, None))
    except Missing as reason:
        sender.send((None, str(reason), None))
    except Exception as error:
        sender.send((None, None, first_line(error)))
    sender.close()


def peak_begins() -> float:
    """Let the peak begin anew and return the resident memory, in MiB."""
    # What earlier steps have freed but the allocator has kept would hide what comes.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def peak() -> float:
    """The largest resident memory since `peak_begins`, in MiB."""
    # Not getrusage: its maximum survives exec, so a child would report its parent's.
    return _resident("VmHWM")


def _resident(field: str) -> float:
    status = Path("/proc/self/status")
    found = re.search(rf"^{field}:\s+(\d+)", status.read_text() if status.exists() else "", re.M)
    if found is None:
        raise BenchmarkError(f"/proc/self/status has no {field} line; peak memory can be measured on Linux only")
    return int(found[1]) / 1024
