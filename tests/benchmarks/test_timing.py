"""Times are taken in turns, from inputs that do not stay in the cache."""

from __future__ import annotations

import time
import weakref

import pytest
import torch

from benchmarks import roofline, timing


def test_contenders_take_turns_in_an_order_that_changes_and_is_the_same_in_every_run() -> None:
    runs = []
    for _ in range(2):
        order: list[str] = []
        calls = {name: [lambda name=name: order.append(name)] for name in "abc"}  # noqa: B023
        taken = timing.interleaved(calls, "cpu", rounds=6)
        assert all(len(seconds) == 6 for seconds, _ in taken.values())
        runs.append(["".join(order[i : i + 3]) for i in range(0, len(order), 3)])
    # Once each to warm up, one round that does not count, then six.
    assert ["".join(sorted(turn)) for turn in runs[0]] == ["abc"] * 8
    assert len(set(runs[0][2:])) > 1
    assert runs[0] == runs[1]


def test_a_contender_that_fails_costs_the_others_nothing_and_is_let_go() -> None:
    class Fails:
        def __init__(self, after: int) -> None:
            self.left = after

        def __call__(self) -> None:
            self.left -= 1
            if self.left < 0:
                raise RuntimeError("no memory\nand a stack")

    # In the call that warms up, in the round that does not count, and in the second that does.
    calls = {"a": [Fails(0)], "b": [Fails(1)], "c": [Fails(3)], "right": [lambda: None]}
    gone = [weakref.ref(calls[name][0]) for name in "abc"]
    failed: dict[str, str] = {}
    taken = timing.interleaved(calls, "cpu", rounds=4, failed=failed)
    assert failed == dict.fromkeys("abc", "RuntimeError: no memory")
    assert {name: len(seconds) for name, (seconds, _) in taken.items()} == {"right": 4}
    assert [ref() for ref in gone] == [None] * 3
    with pytest.raises(RuntimeError, match="no memory"):
        timing.interleaved({"a": [Fails(0)]}, "cpu", rounds=4)


def test_every_repetition_gets_the_next_set_of_inputs() -> None:
    seen: list[int] = []
    timing.interleaved({"a": [lambda i=i: seen.append(i) for i in range(3)]}, "cpu", rounds=5)
    assert seen[3:] == [0, 1, 2, 0, 1, 2]


def test_no_round_begins_after_the_time_but_enough_are_taken_to_compare() -> None:
    taken = timing.interleaved({"a": [lambda: None]}, "cpu", rounds=100, seconds=0.0)
    assert len(taken["a"][0]) == 5


def test_contenders_that_take_turns_do_not_find_each_others_inputs() -> None:
    seen: list[tuple[str, int]] = []
    calls = {name: [lambda name=name, i=i: seen.append((name, i)) for i in range(5)] for name in "ab"}
    timing.interleaved(calls, "cpu", rounds=5)
    # After three calls of each to warm up, every set is used once before any is used again.
    assert [i for _, i in seen[6:]] == [i % 5 for i in range(12)]
    assert all({name for name, _ in seen[i : i + 2]} == {"a", "b"} for i in range(6, 18, 2))


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
    found = roofline.measure("cpu", "tiny", 3)
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


@pytest.mark.gpu
def test_after_a_capture_that_failed_random_numbers_are_drawn_on_the_stream_of_before() -> None:
    x, before = torch.zeros(8, device="cuda"), torch.cuda.current_stream()
    for call in (lambda: float(x[0]), lambda: float(torch.randn(8, device="cuda")[0])):
        with pytest.raises(Exception, match="captur"):
            timing.captured([call])
        assert torch.cuda.current_stream() == before
        assert torch.randn(8, device="cuda").isfinite().all()
    graph = timing.captured([lambda: x.copy_(torch.randn(8, device="cuda"))])
    first = x.clone()
    graph.replay()
    assert not torch.equal(first, x)


@pytest.mark.gpu
def test_the_launch_of_a_graph_is_not_in_its_time_and_that_of_single_calls_is() -> None:
    x = torch.zeros(1024, device="cuda")
    (_, contestant) = timing.interleaved({"a": [lambda: x.add_(1.0)]}, "cuda", rounds=3)["a"]
    assert contestant.clock == "graph"
    assert contestant.ahead > 0

    def launched_slowly() -> None:
        time.sleep(5e-3)
        x.add_(1.0)

    assert timing.between_events(launched_slowly) > 4e-3
    assert timing.between_events(launched_slowly, ahead=20e-3) < 1e-3
