"""What a reader may take for a small file: seconds, and memory beyond what the process has already."""

from __future__ import annotations

import contextlib
import resource
import signal
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

SECONDS = 10
MEMORY = 64 << 20


class TooLong(BaseException):
    """Not an `Exception`, so that no reader takes it for damage of its file."""


@contextlib.contextmanager
def limited(seconds: float = SECONDS, memory: int = MEMORY) -> Iterator[None]:
    """Raise `TooLong` in what takes longer than `seconds`; let no allocation succeed beyond `memory` bytes more.

    A timer interrupts regular expressions and waits for pipes, too. Main thread only.
    """

    def stop(number: int, frame: FrameType | None) -> None:
        raise TooLong(f"not finished after {seconds} seconds")

    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    present = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        resource.setrlimit(resource.RLIMIT_AS, (present + memory, hard))
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
