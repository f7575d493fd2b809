"""Times of contenders that take turns, so that a slow moment of the machine hits them all.

Every contender is a list of calls that do the same, each on a set of inputs of its own: together the sets are larger
than the last cache (`rotation`), so that no repetition finds its input there. All contenders have the same sets. Each
round has an order of its own, drawn from `ORDER_SEED`, so that nobody always follows the same contender. On the
CPU every call takes the next one, whoever makes it; on a GPU a contender's calls are captured in one CUDA graph
and a replay is timed between two events, with the host far enough ahead, so that no launch is in the time; where a
contender cannot be captured, or `graphs` is off, its calls are launched one by one between the events, as a user's are.
"""

from __future__ import annotations

import gc
import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch

import slora

Call = Callable[[], Any]
Result = TypeVar("Result")
WARM_UP = 3
ORDER_SEED = 0
# The fewest repetitions that have a spread.
FEWEST_ROUNDS = 3
# The fewest of which `compare` can tell a change from noise: a time limit cuts no repetition before it.
COMPARABLE_ROUNDS = 5
# Cycles of a GPU's clock in a second, rounded up.
CLOCK = 2e9


class Contestant:
    """The calls of one contender, ready to be timed.

    Attributes:
        clock: "wall" on the CPU, "graph" for replays of a CUDA graph, "events" for single launches on a GPU.
        reason: why nothing could be captured, where that was wanted.

    `turns` counts the calls on the CPU, those of all contestants that share it.
    """

    def __init__(
        self, calls: Sequence[Call], device: str, graphs: bool, pool: Any = None, turns: Iterator[int] | None = None
    ) -> None:
        self.calls = list(calls)
        self.clock = "wall" if device == "cpu" else "events"
        self.reason: str | None = None
        self.turns = itertools.count() if turns is None else turns
        for call in self.calls[:WARM_UP] if device == "cpu" else self.calls * WARM_UP:
            call()
        if device == "cpu":
            return
        torch.cuda.synchronize()
        if graphs:
            try:
                self.graph = captured(self.calls, pool)
                self.ahead = 4 * launch_seconds(self.graph.replay)
                self.clock = "graph"
            except Exception as error:
                self.reason = first_line(error)
                torch.cuda.synchronize()

    def __call__(self) -> float:
        """Seconds per call."""
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


def launch_seconds(launch: Call) -> float:
    """Seconds until `launch` returns, whatever it has put on the stream."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    launch()
    seconds = time.perf_counter() - start
    torch.cuda.synchronize()
    return seconds


def captured(calls: Sequence[Call], pool: Any = None) -> Any:
    """Return a CUDA graph of `calls`, run a few times on a side stream first, as capturing asks for.

    They run there as slora will be recorded (`slora.gates_on_device`).

    Graphs that share a `pool` share their memory: none of them may need what it computed in an earlier replay. A call
    with a method `settle` gets it called right before the capture, to read what it may not read inside.
    """
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side), slora.gates_on_device():
        for _ in range(2):
            for call in calls:
                call()
    torch.cuda.current_stream().wait_stream(side)
    torch.cuda.synchronize()
    for call in calls:
        getattr(call, "settle", lambda: None)()
    # What eager runs have left with the allocator is of no use to the graph's own pool.
    torch.cuda.empty_cache()
    graph, before = torch.cuda.CUDAGraph(), torch.cuda.current_stream()
    try:
        with torch.cuda.graph(graph, pool=pool):
            for call in calls:
                call()
    except Exception:
        recover(before)
        raise
    graph.replay()
    torch.cuda.synchronize()
    return graph


def recover(stream: torch.cuda.Stream) -> None:
    """Undo what a capture that failed leaves behind: its stream as the current one, its state of the random numbers.

    `torch.cuda.graph` ends the capture before it restores `stream`, so that an error there skips the rest.
    """
    torch.cuda.set_stream(stream)
    torch.cuda.synchronize()
    generator = torch.cuda.default_generators[torch.cuda.current_device()]
    # A copy has the same seed and offset and belongs to no capture.
    generator.graphsafe_set_state(generator.clone_state())


def interleaved(
    contenders: dict[str, list[Call]],
    device: str,
    rounds: int,
    graphs: bool = True,
    seconds: float | None = None,
    failed: dict[str, str] | None = None,
) -> dict[str, tuple[list[float], Contestant]]:
    """Time `contenders` in turns and return the seconds per call of every round, with how they were taken.

    After `seconds` no new round begins, provided that there are enough to compare. With `failed` a
    contender that raises costs the others nothing: the reason is put there and its calls are taken out of
    `contenders`, so that their memory is free. Without it what was raised is passed on.
    """
    pool = torch.cuda.graph_pool_handle() if graphs and device != "cpu" else None
    turns = itertools.count()
    ready: dict[str, Contestant] = {}

    def begun(name: str) -> Contestant:
        return Contestant(contenders[name], device, graphs, pool, turns)

    def timed(name: str) -> float:
        return ready[name]()

    # By name: whoever held a contestant here would hold its memory beyond its end.
    def tried(name: str, act: Callable[[str], Result]) -> Result | None:
        try:
            return act(name)
        except Exception as error:
            if failed is None:
                raise
            failed[name] = first_line(error)
        ready.pop(name, None)
        del contenders[name]
        release(device)
        return None

    for name in list(contenders):
        contestant = tried(name, begun)
        if contestant is not None:
            ready[name] = contestant
    taken: dict[str, list[float]] = {name: [] for name in ready}
    # The first round counts for nothing: clocks rise, caches and allocators settle.
    for name in list(ready):
        tried(name, timed)
    start, orders = time.monotonic(), random.Random(ORDER_SEED)
    for done in range(rounds):
        if seconds is not None and done >= COMPARABLE_ROUNDS and time.monotonic() - start > seconds:
            break
        for name in orders.sample(list(ready), len(ready)):
            value = tried(name, timed)
            if value is not None:
                taken[name].append(value)
    return {name: (taken[name], ready[name]) for name in ready}


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


@dataclass(frozen=True)
class Rotation:
    """How many sets of inputs calls take in turns, and why those do not suffice to outgrow the last cache."""

    sets: int
    reason: str | None = None

    @property
    def row(self) -> dict[str, Any]:
        """As the result file spells it."""
        return {"input_sets": self.sets, **({"input_reason": self.reason} if self.reason else {})}


def rotation(inputs: int, device: str, besides: int = 0, most: int | None = None) -> Rotation:
    """Decide how many sets of `inputs` bytes are made, so that no call finds its own in the last cache.

    Between two calls on one set of n, at least n calls pass: over all n sets, and over the memory that one call
    touches `besides` its inputs. Wanted is twice the cache. Where `besides` makes that alone, one set does; otherwise
    there are 2 or more, at most `most` (default: 64, or 16 on a GPU, which captures a call for each).
    """
    cache = last_cache(device)
    if besides >= 2 * cache:
        return Rotation(
            1, f"a call touches {_mib(besides)} besides its inputs, twice the last cache of {_mib(cache)} or more"
        )
    most = most or (64 if device == "cpu" else 16)
    sets = max(2, min(most, -(-(2 * cache - besides) // max(1, inputs))))
    if sets * inputs + besides > cache:
        return Rotation(sets)
    return Rotation(
        sets, f"the {sets} sets that are made at most, of {_mib(inputs)}, and {_mib(besides)} that a call touches "
        f"besides, do not outgrow the last cache of {_mib(cache)}"
    )  # fmt: skip


def _mib(size: int) -> str:
    return f"{size / 2**20:,.3g} MiB" if size < 1000 * 2**20 else f"{size / 2**20:,.0f} MiB"


def last_cache(device: str) -> int:
    """Bytes of the GPU's L2, or of the processor's last cache (32 MiB where the system does not say)."""
    if device != "cpu":
        return int(torch.cuda.get_device_properties(0).L2_cache_size)
    units = {"K": 2**10, "M": 2**20}
    sizes = [32 * 2**20]
    for file in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size"):
        text = file.read_text().strip()
        if text[-1:] in units and text[:-1].isdigit():
            sizes.append(int(text[:-1]) * units[text[-1]])
    return max(sizes)
