"""What is measured while a run goes on: losses without waiting for the device, and the time of training steps."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator

import torch
from torch import Tensor


class Window:
    """Losses, hits and gradient norms of the steps since the last record, kept on the device until it is read."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.losses = torch.zeros(size, device=device)
        self.hits = torch.zeros((), dtype=torch.int64, device=device)
        self.norm: Tensor | None = None
        self.filled = self.seen = 0

    @property
    def full(self) -> bool:
        """Whether it has to be read."""
        return self.filled == len(self.losses)

    def add(self, loss: Tensor, logits: Tensor, labels: Tensor) -> None:
        """Take in a forward pass."""
        self.losses[self.filled] = loss.detach()
        self.filled += 1
        if logits.dim() == 2 and labels.dim() == 1:
            self.hits += (logits.detach().argmax(1) == labels).sum()
            self.seen += len(labels)

    def add_norm(self, norm: Tensor) -> None:
        """Take in the norm of a step's gradient; a NaN stays."""
        self.norm = norm if self.norm is None else torch.maximum(self.norm, norm)

    def read(self, mean: Callable[[Tensor], Tensor]) -> tuple[list[float], float | None, float | None]:
        """Return `(losses, accuracy, largest gradient norm)` and start afresh.

        Args:
            mean: makes of a tensor of this process the mean over all.
        """
        losses = mean(self.losses[: self.filled]).tolist()
        accuracy = mean(self.hits.float()).item() / self.seen if self.seen else None
        norm = None if self.norm is None else self.norm.item()
        self.hits.zero_()
        self.filled = self.seen = 0
        self.norm = None
        return losses, accuracy, norm


class Clock:
    """Time spent in training steps.

    Steps whose FLOPs are counted run slower, so they weigh as much as the mean of the others; where there are no
    others, their own time stands.
    """

    def __init__(self, seconds: float, steps: int) -> None:
        self.earlier, self.earlier_steps = seconds, steps
        self.elapsed, self.steps, self.counted, self.slow, self.once = 0.0, 0, 0, 0.0, 0.0
        self.since = time.perf_counter()

    def step(self) -> None:
        """Note the end of a step."""
        self.steps += 1

    def read(self) -> None:
        """Take in the time since the last reading."""
        now = time.perf_counter()
        self.elapsed += now - self.since
        self.since = now

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Leave out the step inside."""
        self.read()
        yield
        before, self.since = self.since, time.perf_counter()
        self.slow += self.since - before
        self.counted += 1

    @contextlib.contextmanager
    def apart(self) -> Iterator[None]:
        """Count what happens inside once, not as a part of each step."""
        self.read()
        yield
        before, self.since = self.since, time.perf_counter()
        self.once += self.since - before

    @contextlib.contextmanager
    def paused(self, device: torch.device) -> Iterator[None]:
        """Leave out what happens inside."""
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        self.read()
        yield
        self.since = time.perf_counter()

    def rate(self) -> float:
        """Steps per second."""
        if self.steps == self.counted:
            return self.steps / self.slow if self.slow > 0 else 0.0
        return (self.steps - self.counted) / self.elapsed if self.elapsed > 0 else 0.0

    def seconds(self) -> float:
        """Seconds in all steps of the run."""
        measured = self.steps - self.counted
        return self.earlier + self.once + (self.elapsed * self.steps / measured if measured else self.slow)
