"""Times are taken in turns, from inputs that do not stay in the cache."""

from __future__ import annotations

import itertools
import time
from functools import partial
from typing import Any

import pytest
import torch

from benchmarks import timing
from benchmarks.cases.rounds import in_turns
from benchmarks.results import Row, Settings


def _in_turns(calls: dict[str, list[Any]], rounds: int, most: float = 1e9) -> tuple[Any, dict[str, Row]]:
    rows: dict[str, Row] = {name: {"point": {}, "contender": name, "flops": 1} for name in calls}
    turns = itertools.count()
    makers: dict[str, Any] = {name: partial(timing.Sampler, own, "cpu", turns=turns) for name, own in calls.items()}
    return in_turns(rows, makers, Settings(), rounds, most), rows


def test_implementations_take_turns_in_an_order_that_changes_and_is_the_same_in_every_run() -> None:
    runs = []
    for _ in range(2):
        order: list[str] = []
        calls = {name: [lambda name=name: order.append(name)] for name in "abc"}  # noqa: B023
        taken, _ = _in_turns(calls, 6)
        assert all(len(seconds) == 6 for seconds, _ in taken.values())
        runs.append(["".join(order[i : i + 3]) for i in range(0, len(order), 3)])
    # Once each to warm up, one round that does not count, then six.
    assert ["".join(sorted(turn)) for turn in runs[0]] == ["abc"] * 8
    assert len(set(runs[0][2:])) > 1
    assert runs[0] == runs[1]


def test_every_call_gets_the_next_set_of_inputs_whoever_makes_it() -> None:
    seen: list[tuple[str, int]] = []
    _in_turns({name: [lambda name=name, i=i: seen.append((name, i)) for i in range(5)] for name in "ab"}, 5)
    # After three calls of each to warm up, every set is used once before any is used again.
    assert [i for _, i in seen[6:]] == [i % 5 for i in range(12)]
    assert all({name for name, _ in seen[i : i + 2]} == {"a", "b"} for i in range(6, 18, 2))


def test_no_round_begins_after_the_time_but_enough_are_taken_to_compare() -> None:
    taken, _ = _in_turns({"a": [lambda: None]}, 100, most=0.0)
    assert len(taken["a"][0]) == timing.COMPARABLE_ROUNDS


def test_sets_of_inputs_outgrow_the_cache_within_bounds() -> None:
    assert timing.input_sets(timing.LAST_CACHE // 7) == 8
    assert (timing.input_sets(2**40), timing.input_sets(1)) == (2, 16)


@pytest.mark.gpu
def test_a_captured_call_is_replayed_and_one_that_cannot_be_is_launched() -> None:
    x, before = torch.zeros(1024, device="cuda"), torch.cuda.current_stream()
    sampler = timing.Sampler([lambda: x.add_(1.0)], "cuda", graphs=True)
    assert sampler.clock == "graph"
    value = float(x[0])
    sampler()
    assert float(x[0]) == value + 1.0
    reads = timing.Sampler([lambda: float(torch.randn(8, device="cuda")[0])], "cuda", graphs=True)
    assert reads.clock == "events"
    assert reads.not_captured
    # A capture that failed leaves the stream and the random numbers as they were.
    assert torch.cuda.current_stream() == before
    assert torch.randn(8, device="cuda").isfinite().all()


@pytest.mark.gpu
def test_the_launch_of_a_graph_is_not_in_its_time_and_that_of_single_calls_is() -> None:
    x = torch.zeros(1024, device="cuda")

    def launched_slowly() -> None:
        time.sleep(5e-3)
        x.add_(1.0)

    assert timing.between_events(launched_slowly) > 4e-3
    assert timing.between_events(launched_slowly, ahead=20e-3) < 1e-3
