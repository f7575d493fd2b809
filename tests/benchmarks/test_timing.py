"""Times are taken in turns, from inputs that do not stay in the cache."""

from __future__ import annotations

import pytest
import torch

from benchmarks import ceilings, timing
from benchmarks.settings import Settings


def test_contenders_take_turns() -> None:
    order: list[str] = []
    calls = {name: [lambda name=name: order.append(name)] for name in "abc"}
    taken = timing.interleaved(calls, "cpu", rounds=4)
    # Once each to warm up, one round that does not count, then four.
    assert order == ["a", "b", "c"] * 6
    assert all(len(seconds) == 4 for seconds, _ in taken.values())


def test_every_repetition_gets_the_next_set_of_inputs() -> None:
    seen: list[int] = []
    timing.interleaved({"a": [lambda i=i: seen.append(i) for i in range(3)]}, "cpu", rounds=5)
    assert seen[3:] == [0, 1, 2, 0, 1, 2]


def test_no_round_begins_after_the_time_but_the_fewest_are_taken() -> None:
    taken = timing.interleaved({"a": [lambda: None]}, "cpu", rounds=100, seconds=0.0)
    assert len(taken["a"][0]) == 3


def test_contenders_that_take_turns_do_not_find_each_others_inputs() -> None:
    seen: list[tuple[str, int]] = []
    calls = {name: [lambda name=name, i=i: seen.append((name, i)) for i in range(5)] for name in "ab"}
    timing.interleaved(calls, "cpu", rounds=5)
    # After three calls of each to warm up, every set is used once before any is used again.
    assert seen[6:] == [("ab"[i % 2], i % 5) for i in range(12)]


@pytest.mark.parametrize(
    ("inputs", "besides", "most", "sets"),
    [(30, 0, None, 7), (1000, 0, None, 2), (30, 150, None, 2), (10, 100, None, 10), (1, 0, None, 64), (30, 0, 5, 5)],
)
def test_sets_of_inputs_make_twice_the_cache_with_what_a_call_touches_besides(
    inputs: int, besides: int, most: int | None, sets: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(timing, "last_cache", lambda device: 100)
    found = timing.rotation(inputs, "cpu", besides, most)
    assert found.sets == sets
    assert (found.reason is None) == (sets * inputs + besides > 100)
    assert found.row["input_sets"] == sets


def test_inputs_that_a_call_itself_drives_out_are_not_rotated_and_the_reason_is_kept(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(timing, "last_cache", lambda device: 100 * 2**20)
    found = timing.rotation(1, "cuda", besides=300 * 2**20)
    assert found.row == {
        "input_sets": 1,
        "input_reason": "a call touches 300 MiB besides its inputs, twice the last cache of 100 MiB or more",
    }
    assert timing.rotation(1, "cuda", besides=199 * 2**20).sets == 16


def test_ceilings_are_rates_of_this_machine() -> None:
    found = ceilings.measure(Settings("cpu", "tiny"))
    assert set(found["gemm_flops_per_s"]) == {"fp32", "bf16"}
    assert all(rate > 1e6 for rate in [*found["gemm_flops_per_s"].values(), found["copy_bytes_per_s"]])


@pytest.mark.gpu
def test_a_captured_call_is_replayed_and_one_that_cannot_be_is_launched() -> None:
    x = torch.zeros(1024, device="cuda")

    def reads_the_device() -> None:
        x.add_(1.0)
        float(x[0])

    taken = timing.interleaved({"captured": [lambda: x.add_(1.0)], "reads": [reads_the_device]}, "cuda", rounds=3)
    assert taken["captured"][1].clock == "graph"
    assert taken["reads"][1].clock == "events"
    assert taken["reads"][1].reason
    before = float(x[0])
    taken["captured"][1]()
    assert float(x[0]) == before + 1.0
