"""How one time is taken; implementations take turns (`cases/rounds.py`), so that a slow moment hits them all.

Every implementation is a list of calls that do the same, each on a set of inputs of its own; together the sets are
larger than the last cache (`input_sets`), so that no call finds its input there. On the CPU every call takes the next
set, whoever makes it, by the wall clock. On a GPU a replay of one CUDA graph of all calls is timed between two events,
with the host far enough ahead, so that no launch is in the time; where nothing can be captured, or `graphs` is off, the
calls are launched one by one, as a user's are.
"""

from __future__ import annotations

import gc
import itertools
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch

import slora

Call = Callable[[], Any]
WARM_UP = 3
ORDER_SEED = 0
# The fewest repetitions that have percentiles.
FEWEST_ROUNDS = 3
# The fewest of which `compare` can tell a change from noise: a time limit cuts no repetition before it.
COMPARABLE_ROUNDS = 5
# Cycles of a GPU's clock in a second, rounded up.
CLOCK = 2e9
# Twice the last cache of an H200, and more than a core's share of one on a server.
LAST_CACHE = 128 * 2**20


class Sampler:
    """The calls of one implementation, warmed up: calling it gives the seconds per call.

    `turns` counts the calls on the CPU, of all samplers that share it. `clock` is "wall" on the CPU, on a GPU "graph"
    for replays of a CUDA graph, "events" for single launches; `not_captured` is why there is no graph.
    """

    def __init__(
        self, calls: Sequence[Call], device: str, graphs: bool = False, pool: Any = None,
        turns: Iterator[int] | None = None,
    ) -> None:  # fmt: skip
        self.calls, self.turns = calls, itertools.count() if turns is None else turns
        self.clock = "wall" if device == "cpu" else "events"
        self.not_captured: str | None = None
        for call in calls[:WARM_UP] if device == "cpu" else [*calls] * WARM_UP:
            call()
        if graphs and device != "cpu":
            try:
                self.graph = captured(calls, pool)
                start = time.perf_counter()
                self.graph.replay()
                self.ahead = 4 * (time.perf_counter() - start)
                self.clock = "graph"
            except Exception as error:
                self.not_captured = first_line(error)
            torch.cuda.synchronize()

    def __call__(self) -> float:
        if self.clock == "wall":
            call = self.calls[next(self.turns) % len(self.calls)]
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        if self.clock == "graph":
            return between_events(self.graph.replay, self.ahead) / len(self.calls)
        return between_events(lambda: [call() for call in self.calls]) / len(self.calls)


def between_events(launch: Call, ahead: float = 0.0) -> float:
    """Seconds between two events on the stream, around what `launch` puts there.

    The stream idles `ahead` seconds before the first event: a `launch` that takes the host less is not in the time.
    """
    first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    torch.cuda.synchronize()
    if ahead:
        torch.cuda._sleep(round(ahead * CLOCK))
    first.record()
    launch()
    last.record()
    torch.cuda.synchronize()
    return float(first.elapsed_time(last)) / 1e3


def captured(calls: Sequence[Call], pool: Any = None) -> Any:
    """Return a CUDA graph of `calls`, run a few times on a side stream first, as capturing asks for.

    They run there as slora will be captured (`slora.gates_on_device`). Graphs that share a `pool` share their memory:
    none of them may need what it computed in an earlier replay. A partial of a function with a method `settle` gets it
    called right before the capture, to read what it may not read inside.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), slora.gates_on_device():
        for call in [*calls, *calls]:
            call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    for call in calls:
        getattr(getattr(call, "func", None), "settle", lambda: None)()
    # What eager runs have left with the allocator is of no use to the graph's own pool.
    torch.cuda.empty_cache()
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool):
            for call in calls:
                call()
    except Exception:
        # An error ends the capture before PyTorch has restored the stream and the state of the random numbers.
        torch.cuda.set_stream(before)
        torch.cuda.synchronize()
        generator = torch.cuda.default_generators[torch.cuda.current_device()]
        # A copy has the same seed and offset and belongs to no capture.
        generator.graphsafe_set_state(generator.clone_state())
        raise
    graph.replay()
    torch.cuda.synchronize()
    return graph


def ieee_fp32() -> None:
    """Let fp32 mean fp32: a GPU's TF32 would be another precision under the same name."""
    torch.backends.cuda.matmul.fp32_precision = "ieee"
    # First the older switch, whose readers would otherwise raise.
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cudnn.conv.fp32_precision = "ieee"  # type: ignore[attr-defined]


def release(device: str) -> None:
    """Free the memory that nothing refers to any more."""
    gc.collect()
    if device != "cpu":
        torch.cuda.empty_cache()


def first_line(error: Exception) -> str:
    """An exception in one line: what follows may be a stack of the C++ side."""
    return f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else 'no message'}"


def input_sets(size: int) -> int:
    """How many sets of inputs of `size` bytes outgrow the last cache: at least 2, at most 16."""
    return max(2, min(16, -(-LAST_CACHE // max(1, size))))
