"""How a case is to be run: device, size of the grid, repetitions, and how much time is left."""

from __future__ import annotations

import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, get_args

import torch

from benchmarks.record import BenchmarkError

Grid = Literal["tiny", "quick", "default", "full"]
GRIDS: tuple[Grid, ...] = get_args(Grid)
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
# The least number of repetitions that has a spread.
FEWEST_ROUNDS = 3
# The least of which `compare` can tell what moved from noise: the time of a point cuts no repetition before it.
COMPARABLE_ROUNDS = 5


def process_began() -> float:
    """When this process started, imports included, on the clock of `time.monotonic`; now where that is not known."""
    now = time.monotonic()
    try:
        # Field 22 of the line, counted behind the program's name, which may have blanks: ticks since the system began.
        ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
        return now - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))
    except (OSError, AttributeError, ValueError, IndexError):
        return now


@dataclass
class Settings:
    """What the command line asks for.

    Attributes:
        device: "cpu" or "cuda".
        grid: "tiny" only shows that the code runs, "quick" touches every kind of point, "default" covers the bars,
            "full" is the whole grid.
        rounds: repetitions of every contender; None: what suits the grid.
        only: parts of contender names; empty: all.
        seconds: the time that the case may take from `started` on, None without limit. A case asks `stop` before
            every point: its first one is measured in any case, with few repetitions where the time is up.
        started: when that time began, on the clock of `time.monotonic`.
        stopped: whether the grid was left before its end.
    """

    device: str = "cpu"
    grid: Grid = "default"
    rounds: int | None = None
    only: tuple[str, ...] = ()
    seconds: float | None = None
    started: float = field(default_factory=time.monotonic)
    stopped: bool = False
    begun: int = 0

    def __post_init__(self) -> None:
        if self.device not in ("cpu", "cuda"):
            raise BenchmarkError(f"device {self.device!r} is unknown; use cpu or cuda")
        if self.device == "cuda" and not torch.cuda.is_available():
            raise BenchmarkError("no CUDA GPU is visible (torch.cuda.is_available() is False); use --device cpu")
        if self.seconds is not None and not self.seconds >= 0:
            raise BenchmarkError(f"--seconds {self.seconds:g} is no time; give 0 or more")
        if self.rounds is not None and self.rounds < FEWEST_ROUNDS:
            raise BenchmarkError(f"--rounds {self.rounds} is below {FEWEST_ROUNDS}, too few for percentiles")

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is measured."""
        return self.device == "cuda"

    @property
    def most_inputs(self) -> int | None:
        """The most sets of inputs that are made, None for what suits the device (`timing.rotation`)."""
        return 2 if self.grid == "tiny" else None

    def repetitions(self, usual: int) -> int:
        """How many rounds to take where `usual` would do."""
        if self.rounds is not None:
            return self.rounds
        return (
            FEWEST_ROUNDS if self.grid == "tiny" else max(FEWEST_ROUNDS, usual // 2 if self.grid == "quick" else usual)
        )

    def wanted(self, contender: str) -> bool:
        """Whether this contender takes part."""
        return not self.only or any(part in contender for part in self.only)

    def left(self) -> float | None:
        """Seconds left, None without limit."""
        return None if self.seconds is None else self.seconds - (time.monotonic() - self.started)

    def at_most(self, seconds: float) -> float:
        """`seconds`, or what is left where that is less: how long repetitions may go on."""
        left = self.left()
        return seconds if left is None else max(0.0, min(seconds, left))

    def over(self) -> bool:
        """Whether the time is up."""
        left = self.left()
        return left is not None and left <= 0

    def stop(self) -> bool:
        """Whether to leave the grid before its next point, which otherwise begins."""
        self.stopped = self.begun > 0 and self.over()
        self.begun += 1
        return self.stopped
