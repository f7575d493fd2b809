"""A point of a case: its rows, and rounds in which the implementations are timed in turns."""

from __future__ import annotations

import itertools
import random
import sys
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import TypeVar

import torch

from benchmarks.results import Row, Settings, reason_in, spread
from benchmarks.timing import COMPARABLE_ROUNDS, ORDER_SEED, Call, Sampler, first_line, release

Result = TypeVar("Result")
SamplerT = TypeVar("SamplerT", bound=Callable[[], float])


@contextmanager
def measuring(point: Row, names: Iterable[str], settings: Settings) -> Iterator[dict[str, Row]]:
    """Yield an empty row for each implementation that is wanted, by name.

    What is raised inside is the reason of all rows that have none yet, so that the other points are measured.
    """
    rows: dict[str, Row] = {name: {"point": point, "contender": name} for name in names if settings.wanted(name)}
    with reason_in(*rows.values()):
        yield rows
    torch._dynamo.reset()
    release(settings.device)
    print(f"  {' '.join(f'{key}={value}' for key, value in point.items())}", file=sys.stderr, flush=True)


def take_times(
    rows: dict[str, Row], calls: dict[str, list[Call]], settings: Settings, rounds: int, most: float,
    measure: str = "seconds", graphs: bool = False, steps: Mapping[str, int] | None = None,
) -> None:  # fmt: skip
    """Time `calls` in turns, for about `most` seconds, into `rows[name][measure]`; a call may have several `steps`.

    An implementation that raises leaves `calls`, and its row has the reason alone.
    """
    pool = torch.cuda.graph_pool_handle() if graphs and settings.on_gpu else None
    turns = itertools.count()
    makers: dict[str, Callable[[], Sampler]] = {
        name: partial(Sampler, own, settings.device, graphs, pool, turns) for name, own in calls.items()
    }
    prefix = "" if measure in ("seconds", "forward_backward") else f"{measure}_"
    for name, (seconds, sampler) in in_turns(rows, makers, settings, rounds, most).items():
        count = (steps or {}).get(name, 1)
        rows[name].update({measure: spread([value / count for value in seconds]), f"{prefix}clock": sampler.clock})
        if sampler.not_captured:
            rows[name][f"{prefix}not_captured"] = sampler.not_captured
    for name in calls.keys() - makers.keys():
        del calls[name]


def in_turns(
    rows: dict[str, Row], makers: dict[str, Callable[[], SamplerT]], settings: Settings, rounds: int, most: float
) -> dict[str, tuple[list[float], SamplerT]]:
    """Make a sampler of each implementation, call them in turns, and return the seconds of every round.

    The order of each round is drawn from `ORDER_SEED`. After `most` seconds no new round begins, provided that there
    are enough to compare. One that raises is taken out of `makers`, so that its memory is free.
    """
    samplers: dict[str, SamplerT] = {}

    def tried(name: str, act: Callable[[], Result]) -> Result | None:
        try:
            return act()
        except Exception as error:
            point, reason = rows[name]["point"], first_line(error)
        rows[name].clear()
        rows[name].update(point=point, contender=name, failed=reason)
        samplers.pop(name, None)
        del makers[name]
        return None

    for name in list(makers):
        sampler = tried(name, makers[name])
        if sampler is not None:
            samplers[name] = sampler
    taken: dict[str, list[float]] = {name: [] for name in samplers}
    start, orders = time.monotonic(), random.Random(ORDER_SEED)
    # The first round counts for nothing: clocks rise, caches and allocators settle.
    for done in range(-1, settings.repetitions(rounds)):
        if done >= COMPARABLE_ROUNDS and time.monotonic() - start > min(most, settings.left()):
            break
        for name in orders.sample(list(samplers), len(samplers)):
            value = tried(name, samplers[name])
            if value is not None and done >= 0:
                taken[name].append(value)
    return {name: (taken[name], samplers[name]) for name in samplers}
