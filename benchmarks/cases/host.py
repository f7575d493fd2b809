"""Host time per layer: forward and backward of one layer with tensors so small that only the calls themselves count.

On one thread of the CPU, whatever the device: in eager mode a GPU waits for the host wherever this is longer than what
it has to compute. A second point has real tensors, where a layer without an active block may cost nothing.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.cases.rounds import measuring, take_times
from benchmarks.implementations.layer import FROZEN, IMPLEMENTATIONS, Layer, Problem, Shape
from benchmarks.results import Row, Settings, reason_in
from benchmarks.timing import Call

RANK = 4
# Calls per repetition: enough for the clock, and over before another process takes the core.
CALLS = 10
# The implementation of a layer, its active blocks, and of how many.
WAYS = {
    "frozen nn.Linear": (FROZEN, 1, 1),
    "addmm function": ("addmm function", 1, 1),
    "PEFT": ("PEFT", 1, 1),
    "slora": ("slora, torch", 1, 1),
    "slora, three blocks": ("slora, torch", 3, 3),
    "slora, none active": ("slora, torch", 0, 1),
}
REAL = ("frozen nn.Linear", "slora, none active")
Point = tuple[int, int, int, tuple[str, ...]]


def grid(settings: Settings, case: str = "host") -> list[Point]:
    """`(M, K, N, names)`; N is that of one block."""
    tiny = (4, 16, 16, tuple(WAYS))
    return [tiny] if settings.grid == "tiny" else [tiny, (788, 384, 1536, REAL)]


def measure(point: Point, settings: Settings, roofline: dict[str, Any], case: str) -> list[Row]:
    """The rows of a point."""
    M, K, N, names = point
    calls: dict[str, list[Call]] = {}
    number, before = CALLS if M == 4 else 1, torch.get_num_threads()
    torch.set_num_threads(1)
    with measuring({"M": M, "K": K, "N": N, "r": RANK, "dtype": "fp32"}, names, settings) as rows:
        for name, row in rows.items():
            with reason_in(row):
                implementation, active, blocks = WAYS[name]
                problem = Problem(Shape(K, N * blocks, M, RANK, active, blocks), "cpu", sets=1)
                calls[name] = [partial(_steps, IMPLEMENTATIONS[implementation](problem), problem, number)]
        take_times(rows, calls, settings, 201, 20.0, steps=dict.fromkeys(calls, number))
    torch.set_num_threads(before)
    return list(rows.values())


def _steps(layer: Layer, problem: Problem, number: int) -> None:
    """Forward and backward, `number` times, called as a module is."""
    (x,), (dy,), module, forward = problem.xs, problem.dys, nn.Module(), layer.forward
    if not isinstance(forward, nn.Module):
        module.forward = forward
        forward = module
    with layer.around():
        for _ in range(number):
            forward(x).backward(dy)
            for tensor in (x, *layer.parameters.values()):
                tensor.grad = None
