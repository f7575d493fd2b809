"""Measurements during a run: losses without synchronisation, the time of training steps, the active blocks."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from statistics import fmean
from typing import Any

import torch
from torch import Tensor

from slora.layers import LoRABlocks
from slora.ops.flops import count_flops
from slora.training.result import Blocks


class Window:
    """Losses, correct predictions and gradient norms since the last record, on the device until they are read."""

    def __init__(self, size: int, device: torch.device) -> None:
        self.losses = torch.zeros(size, device=device)
        self.hits = torch.zeros((), dtype=torch.int64, device=device)
        self.norm: Tensor | None = None
        self.filled = self.seen = 0

    @property
    def full(self) -> bool:
        """Whether it must be read before the next `add`."""
        return self.filled == len(self.losses)

    def add(self, loss: Tensor, logits: Tensor | None, labels: Tensor) -> None:
        """Add a forward pass."""
        self.losses[self.filled] = loss.detach()
        self.filled += 1
        if logits is not None and logits.dim() == 2 and labels.dim() == 1:
            self.hits += (logits.detach().argmax(1) == labels).sum()
            self.seen += len(labels)

    def add_norm(self, norm: Tensor) -> None:
        """Add the gradient norm of a step; the largest is read, and NaN if there was one."""
        self.norm = norm if self.norm is None else torch.maximum(self.norm, norm)

    def read(self, mean: Callable[[Tensor], Tensor]) -> tuple[list[float], float | None, float | None]:
        """Return `(losses, accuracy, largest gradient norm)` and reset.

        Args:
            mean: averages a tensor over all processes.
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

    Steps whose FLOPs are counted run slower, so they count as the mean of the other steps; if there are no others, as
    measured.
    """

    def __init__(self, seconds: float, steps: int) -> None:
        self.earlier, self.earlier_steps = seconds, steps
        self.elapsed, self.steps, self.counted, self.slow, self.once = 0.0, 0, 0, 0.0, 0.0
        self.since = time.perf_counter()

    def step(self) -> None:
        """Note the end of a step."""
        self.steps += 1

    def read(self) -> None:
        """Add the time since the last reading."""
        now = time.perf_counter()
        self.elapsed += now - self.since
        self.since = now

    @contextlib.contextmanager
    def excluded(self) -> Iterator[None]:
        """Exclude the step inside the context, whose FLOPs are counted."""
        self.read()
        yield
        before, self.since = self.since, time.perf_counter()
        self.slow += self.since - before
        self.counted += 1

    @contextlib.contextmanager
    def once_only(self) -> Iterator[None]:
        """Count the time inside once, not towards the time per step."""
        self.read()
        yield
        before, self.since = self.since, time.perf_counter()
        self.once += self.since - before

    @contextlib.contextmanager
    def paused(self, device: torch.device) -> Iterator[None]:
        """Exclude the time inside the context."""
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


class Flops:
    """FLOPs of all processes, by `slora.ops.flops.count_flops`; 0 everywhere if not `enabled`."""

    def __init__(self, enabled: bool, processes: int, clock: Clock) -> None:
        self.enabled, self.processes, self.clock = enabled, processes, clock
        self._known: dict[Hashable, int] = {}

    def of(self, function: Callable[..., object], *args: Any) -> int:
        """Call `function` and return its FLOPs."""
        if self.enabled:
            return count_flops(function, *args) * self.processes
        function(*args)
        return 0

    def of_step(self, work: Hashable, function: Callable[..., object], *args: Any) -> int:
        """Call `function` and return its FLOPs, which are counted once for each `work`."""
        if not self.enabled or work in self._known:
            function(*args)
            return self._known.get(work, 0)
        with self.clock.excluded():
            self._known[work] = self.of(function, *args)
        return self._known[work]


class BlockLog:
    """The active blocks over a run, noted when they change.

    Args:
        layers: the adapted layers by name.
        noted: `TrainResult.active_blocks`, which grows.
    """

    def __init__(self, layers: Mapping[str, LoRABlocks], noted: list[tuple[int, Blocks]]) -> None:
        self.layers, self.noted = layers, noted

    def note(self, step: int) -> bool:
        """Note the active blocks if they have changed, and return whether they have."""
        blocks = {name: layer.activity().active for name, layer in self.layers.items()}
        if not blocks or (self.noted and self.noted[-1][1] == blocks):
            return False
        self.noted.append((step, blocks))
        return True

    def record(self, step: int, gates: Mapping[str, Sequence[float]], first: bool) -> dict[str, Any]:
        """Return the entries of a record about blocks and `gates`; the first record lists the active blocks."""
        changed = self.note(step) or first
        blocks = self.noted[-1][1]
        record: dict[str, Any] = {
            "active": sum(map(len, blocks.values())),
            "blocks": sum(layer.blocks for layer in self.layers.values()),
            "mean_gate": fmean(abs(value) for scores in gates.values() for value in scores),
        }
        if any(layer.rank_gate is not None for layer in self.layers.values()):
            record["ranks"] = sum(sum(layer.block_ranks()) for layer in self.layers.values())
            record["all_ranks"] = sum(layer.blocks * layer.r for layer in self.layers.values())
        if changed:
            record["active_blocks"] = {name: list(active) for name, active in blocks.items()}
        return record
