"""The choice of an algorithm by measurement: what is measured, when, and what is remembered where."""

from __future__ import annotations

import contextlib
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from slora.ops.backends import autotune as tuning
from slora.ops.backends import triton

CPU = torch.device("cpu")


class Clock:
    """Stands in for the GPU's events: every candidate takes the time that it returns."""

    def __init__(self) -> None:
        self.measured: list[str] = []

    def __call__(self, call: Callable[[], Any], device: torch.device, eager: bool) -> float:
        name, milliseconds = call()
        self.measured.append(name)
        if milliseconds is None:
            raise torch.cuda.OutOfMemoryError("no room")
        return milliseconds


@pytest.fixture(autouse=True)
def clock(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Clock:
    clock = Clock()
    monkeypatch.setattr(tuning, "_milliseconds", clock)
    monkeypatch.setenv("SLORA_CACHE", str(tmp_path / "cache"))
    tuning._warn.cache_clear()
    return clock


def candidates(**milliseconds: float | None) -> dict[str, Callable[[], Any]]:
    return {name: (lambda name=name, t=t: (name, t)) for name, t in milliseconds.items()}


SLOW_FIRST = candidates(fused=2.0, accumulate=3.0, addmm=1.0)


def test_the_fastest_candidate_is_chosen_and_not_measured_again(clock: Clock) -> None:
    assert [tuning.choose("shape", 100, CPU, SLOW_FIRST) for _ in range(3)] == ["addmm"] * 3
    assert clock.measured == ["fused", "accumulate", "addmm"]


def test_a_single_candidate_is_not_measured(clock: Clock) -> None:
    assert tuning.choose("shape", 100, CPU, candidates(fused=1.0)) == "fused"
    assert clock.measured == []


def test_the_choice_is_in_the_file_with_every_time(clock: Clock) -> None:
    assert tuning.choose("shape", 100, CPU, SLOW_FIRST) == "addmm"
    content = json.loads(tuning.cache_file().read_text())
    (entries,) = content["environments"].values()
    assert entries == {
        "shape M<=128": {"choice": "addmm", "milliseconds": {"fused": 2.0, "accumulate": 3.0, "addmm": 1.0}}
    }


def test_every_power_of_two_of_rows_is_measured_once(clock: Clock) -> None:
    for M in (50432, 40000, 32769):
        assert tuning.choose("shape", M, CPU, SLOW_FIRST) == "addmm"
    assert len(clock.measured) == 3
    for M in (32768, 20000):
        assert tuning.choose("shape", M, CPU, candidates(fused=1.0, addmm=2.0)) == "fused"
    tuning.choose("other", 40000, CPU, SLOW_FIRST)
    assert len(clock.measured) == 3 + 2 + 3
    assert tuning.choose("shape", 50000, CPU, candidates(fused=1.0, addmm=2.0)) == "addmm"


def test_a_candidate_that_the_device_has_no_room_for_is_left_out() -> None:
    assert tuning.choose("shape", 100, CPU, candidates(fused=None, addmm=2.0)) == "addmm"
    with pytest.raises(torch.cuda.OutOfMemoryError, match="no room"):
        tuning.choose("another", 100, CPU, candidates(fused=None, addmm=None))


def test_a_candidate_that_fails_is_left_out_with_a_warning() -> None:
    def broken() -> Any:
        raise RuntimeError("PassManager::run failed")

    with pytest.warns(UserWarning, match=r"fused is left out on cpu, .*RuntimeError: PassManager::run failed"):
        assert tuning.choose("shape", 100, CPU, {"fused": broken, **candidates(addmm=2.0)}) == "addmm"
    with pytest.raises(RuntimeError, match="PassManager"):
        tuning.choose("another", 100, CPU, {"fused": broken, "addmm": broken})


def test_a_choice_that_is_no_candidate_any_more_is_measured_anew(clock: Clock) -> None:
    tuning.choose("shape", 100, CPU, SLOW_FIRST)
    assert tuning.choose("shape", 100, CPU, candidates(fused=1.0, accumulate=2.0)) == "fused"
    assert len(clock.measured) == 5


def test_nothing_is_measured_while_a_graph_is_captured(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_capturing", lambda device: True)
    assert tuning.choose("shape", 100, CPU, SLOW_FIRST) is None
    assert clock.measured == []
    assert not tuning.cache_file().exists()
    monkeypatch.setattr(tuning, "_capturing", lambda device: False)
    assert tuning.choose("shape", 100, CPU, SLOW_FIRST) == "addmm"
    monkeypatch.setattr(tuning, "_capturing", lambda device: True)
    assert tuning.choose("shape", 100, CPU, SLOW_FIRST) == "addmm"


def test_deterministic_algorithms_take_the_default_whatever_was_measured(clock: Clock, poisoned: None) -> None:
    torch.use_deterministic_algorithms(False)
    assert tuning.choose("shape", 100, CPU, SLOW_FIRST) == "addmm"
    torch.use_deterministic_algorithms(True)
    assert tuning.choose("shape", 100, CPU, SLOW_FIRST) == "fused"


DAMAGED = {
    "not JSON": "{",
    "a list": "[]",
    "another format": '{"format": 99, "environments": {}}',
    "no environments": '{"format": 2}',
    "entries without a choice": '{"format": 2, "environments": {"a": {"b": {}}}}',
    "text for entries": '{"format": 2, "environments": {"a": "b"}}',
    "binary": "\0\1\2",
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_a_damaged_or_foreign_file_is_ignored_with_a_warning_and_replaced(damage: str, clock: Clock) -> None:
    path = tuning.cache_file()
    path.parent.mkdir()
    path.write_text(DAMAGED[damage])
    with pytest.warns(UserWarning, match=r"forms.json is ignored .* not a cache of slora"):
        assert tuning.choose("shape", 100, CPU, SLOW_FIRST) == "addmm"
    assert len(clock.measured) == 3
    assert json.loads(path.read_text())["format"] == tuning.FORMAT


def test_choices_of_other_devices_and_versions_stay_and_do_not_count(clock: Clock) -> None:
    path = tuning.cache_file()
    path.parent.mkdir()
    foreign = {"Another GPU, torch 1, triton 1, kernels 0": {"shape M<=128": {"choice": "fused"}}}
    path.write_text(json.dumps({"format": tuning.FORMAT, "environments": foreign}))
    assert tuning.choose("shape", 100, CPU, SLOW_FIRST) == "addmm"
    environments = json.loads(path.read_text())["environments"]
    assert set(environments) == {*foreign, tuning.environment(CPU)}
    assert {"torch", "triton", "kernels"} <= set(tuning.environment(CPU).replace(",", "").split())


def choose_often(rank: int, folder: Path) -> None:
    os.environ["SLORA_CACHE"] = str(folder)
    warnings.simplefilter("error")
    tuning._milliseconds = lambda call, device, eager: call()  # type: ignore[assignment]
    for i in range(20):
        tuning.choose(f"{rank}-{i}", 100, CPU, {"fused": lambda: 1.0, "addmm": lambda: 2.0})


def test_processes_that_write_at_once_leave_a_whole_file(two_processes: Callable[..., list[Any]]) -> None:
    two_processes(choose_often, tuning.cache_file().parent)
    (entries,) = json.loads(tuning.cache_file().read_text())["environments"].values()
    # At worst those that wrote at the same instant lost entries to one another.
    assert len(entries) >= 20
    assert all(entry["choice"] == "fused" for entry in entries.values())
    assert [path.name for path in tuning.cache_file().parent.iterdir()] == ["forms.json"]


def test_a_folder_that_cannot_be_written_to_is_a_warning(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("SLORA_CACHE", str(tmp_path / "file"))
    with pytest.warns(UserWarning, match="is not cached: .* Set SLORA_CACHE to a folder"):
        assert tuning.choose("shape", 100, CPU, SLOW_FIRST) == "addmm"


@pytest.mark.parametrize(
    ("variables", "expected"),
    [
        ({"SLORA_CACHE": "/a/b"}, "/a/b/forms.json"),
        ({"SLORA_CACHE": "", "XDG_CACHE_HOME": "/x"}, "/x/slora/forms.json"),
        ({"SLORA_CACHE": "", "XDG_CACHE_HOME": "", "HOME": "/h"}, "/h/.cache/slora/forms.json"),
        ({"SLORA_CACHE": "~/c", "HOME": "/h"}, "/h/c/forms.json"),
    ],
)
def test_the_cache_is_where_the_environment_says(
    variables: dict[str, str], expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(tuning.cache_file()) == expected


def test_the_cache_is_described_for_the_doctor() -> None:
    assert tuning.describe_cache().endswith("forms.json (not written yet)")
    tuning.choose("shape", 100, CPU, SLOW_FIRST)
    assert tuning.describe_cache().endswith("forms.json (1 choices)")


def test_calls_are_queued_behind_a_delay_between_two_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    queue: list[str] = []

    class Event:
        def __init__(self, enable_timing: bool) -> None:
            assert enable_timing

        def record(self) -> None:
            queue.append("event")

        def synchronize(self) -> None:
            queue.append("wait")

        def elapsed_time(self, stop: Any) -> float:
            return 10.0

    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "_sleep", lambda cycles: queue.append("delay"))
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: queue.append("wait"))
    monkeypatch.setattr(torch.cuda, "device", lambda device: contextlib.nullcontext())
    seconds = iter(range(1000))
    monkeypatch.setattr(tuning.time, "perf_counter", lambda: next(seconds))
    assert tuning._milliseconds(lambda: queue.append("call"), CPU, False) == 10.0 / tuning.CALLS
    sample = ["delay", "event", *["call"] * tuning.CALLS, "event", "wait"]
    assert queue == ["call", "call", "wait", *sample * tuning.SAMPLES]
    # The host takes a second for the calls of a sample.
    assert tuning._milliseconds(lambda: None, CPU, True) == (10.0 + tuning.HOST * 1000.0) / tuning.CALLS


class Operation:
    """Takes the time that the algorithm says."""

    def __init__(self, M: int = 100, host_known: bool = True, **milliseconds: float) -> None:
        self.rows, self.milliseconds, self.listed = torch.zeros(M, 1), milliseconds, 0
        self.key = ("forward", 8, 8, 1, 1, 4, torch.float16, False, host_known)

    def algorithms(self) -> list[triton.Algorithm]:
        self.listed += 1
        return [triton.Algorithm(name) for name in self.milliseconds]

    def compute(self, algorithm: triton.Algorithm) -> tuple[str, float]:
        return algorithm.name, self.milliseconds[algorithm.name]


@pytest.fixture
def _forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton, "_chosen", {})


@pytest.mark.usefixtures("_forgotten")
def test_an_operation_runs_the_algorithm_that_was_measured_and_is_not_looked_at_again(clock: Clock) -> None:
    operation = Operation(fused=2.0, split=1.0)
    assert [triton._run(operation, False) for _ in range(3)] == [("split", 1.0)] * 3
    assert (operation.listed, clock.measured) == (1, ["fused", "split"])
    # Eager mode and a graph are measured apart, and so are other numbers of rows.
    assert triton._run(Operation(host_known=False, fused=1.0, split=2.0), False)[0] == "fused"
    assert triton._run(Operation(M=1000, fused=1.0, split=2.0), False)[0] == "fused"


@pytest.mark.usefixtures("_forgotten")
def test_a_pinned_backend_takes_its_first_kernel(clock: Clock) -> None:
    assert triton._run(Operation(fused=2.0, split=1.0), True)[0] == "fused"
    assert clock.measured == []


@pytest.mark.usefixtures("_forgotten")
def test_a_default_during_capture_is_not_remembered(clock: Clock, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tuning, "_capturing", lambda device: True)
    assert triton._run(Operation(fused=2.0, split=1.0), False)[0] == "fused"
    monkeypatch.setattr(tuning, "_capturing", lambda device: False)
    assert triton._run(Operation(fused=2.0, split=1.0), False)[0] == "split"


@pytest.mark.gpu
def test_a_gpu_is_timed_by_its_own_events(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    small, large = torch.randn(64, 64, device="cuda"), torch.randn(8192, 8192, device="cuda")
    fast = tuning._milliseconds(lambda: small @ small, torch.device("cuda"), False)
    slow = tuning._milliseconds(lambda: large @ large, torch.device("cuda"), False)
    assert 0 < fast < slow
