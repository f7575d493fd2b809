"""The cases: each has a grid of points; at a point it checks every implementation, then times them in turns."""

from __future__ import annotations

import itertools
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

import torch

from benchmarks.results import Row, Settings, reason_in, spread
from benchmarks.timing import Call, Sampler, SamplerT, interleaved, release


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
    measure: str = "seconds", graphs: bool = False,
) -> None:  # fmt: skip
    """Time `calls` in turns, for about `most` seconds, into `rows[name][measure]`.

    One that raises leaves `calls`, and its row has the reason alone.
    """
    pool = torch.cuda.graph_pool_handle() if graphs and settings.on_gpu else None
    turns = itertools.count()
    makers: dict[str, Callable[[], Sampler]] = {
        name: partial(Sampler, own, settings.device, graphs, pool, turns) for name, own in calls.items()
    }
    prefix = "" if measure in ("seconds", "forward_backward") else f"{measure}_"
    for name, (seconds, sampler) in in_turns(rows, makers, settings, rounds, most).items():
        rows[name].update({measure: spread(seconds), f"{prefix}clock": sampler.clock})
        if sampler.not_captured:
            rows[name][f"{prefix}not_captured"] = sampler.not_captured
    for name in calls.keys() - makers.keys():
        del calls[name]


def in_turns(
    rows: dict[str, Row], makers: dict[str, Callable[[], SamplerT]], settings: Settings, rounds: int, most: float
) -> dict[str, tuple[list[float], SamplerT]]:
    """`timing.interleaved`; the row of an implementation that raises gets the reason and loses the rest."""
    failed: dict[str, str] = {}
    taken = interleaved(makers, settings.repetitions(rounds), settings.at_most(most), failed)
    for name, reason in failed.items():
        for key in rows[name].keys() - {"point", "contender"}:
            del rows[name][key]
        rows[name]["failed"] = reason
    return taken
