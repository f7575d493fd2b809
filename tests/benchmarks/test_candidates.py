"""Every candidate of the kernels is checked: what is wrong is seen, and what fails costs the others nothing."""

from __future__ import annotations

import os
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import candidates
from benchmarks.contenders import forms
from benchmarks.contenders.layer import CONTENDERS, Problem, Shape, mistake
from benchmarks.proof.workers import NO_TIME, Workers
from benchmarks.results import Missing
from slora.ops.backends import triton

# Processes that are started: once is enough.
pytestmark = pytest.mark.slow

interpreted = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET", "0") != "1" or torch.cuda.is_available(), reason="runs the kernels interpreted"
)


class Here:
    """In place of `Workers`: works in this process, where a test can break the kernels."""

    def __init__(self, work: Any) -> None:
        self.work = work

    def __enter__(self) -> Here:
        return self

    def __exit__(self, *_: object) -> None:
        candidates._case.cache_clear()

    def run(self, tasks: list[Any], count: int, until: float, each: float) -> Any:
        for task in tasks:
            try:
                yield task, self.work(task)
            except ValueError as error:
                yield task, {"state": "failed", "reason": str(error)}


@pytest.fixture
def entries(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function that examines the candidates of one point and returns what is found, by operation and form."""
    monkeypatch.setattr(candidates, "Workers", Here)
    everywhere = candidates.points("cpu")

    def examine(point: int) -> dict[tuple[str, str], dict[str, Any]]:
        monkeypatch.setattr(candidates, "points", lambda device: [everywhere[point]])
        found = candidates.examine(tmp_path, "cpu", time.monotonic() + 600)
        return {(entry["operation"], entry["form"].split()[0]): entry for entry in found}

    return examine


@interpreted
def test_a_wrong_result_is_seen_and_a_candidate_that_raises_costs_the_others_nothing(
    entries: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = triton.Forward.compute

    def broken(self: triton.Forward, form: triton.Form) -> Any:
        if form.name == "precomputed":
            raise ValueError("of all things")
        y, S = compute(self, form)
        if form.name == "fused":
            y[-1, -1] *= 1.01
        if form.name == "cublas_after":
            y[0] = torch.empty_like(y[0])
        return y, S

    monkeypatch.setattr(triton.Forward, "compute", broken)
    found = entries(0)
    states = {name: entry["state"] for (operation, name), entry in found.items() if operation == "forward"}
    assert states == {"fused": "wrong", "precomputed": "failed", "cublas_after": "wrong", "cublas_before": "right"}
    assert found["forward", "precomputed"]["reason"] == "of all things"
    assert "y is off by" in found["forward", "fused"]["reason"]
    assert found["forward", "cublas_after"]["error"] is None
    assert all(entry["state"] == "right" for (operation, _), entry in found.items() if operation != "forward")
    assert all("milliseconds" in entry for entry in found.values() if entry["state"] == "right")


@interpreted
@pytest.mark.parametrize("operation", [triton.InputGradient, triton.WeightGradients])
def test_a_row_at_the_end_of_a_large_result_and_a_wrong_sum_over_the_rows_are_seen(
    operation: Any, entries: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    compute = operation.compute

    def broken(self: Any, form: triton.Form) -> Any:
        first, *rest = compute(self, form)
        first.view(-1)[-1] += 1
        return first, *rest

    monkeypatch.setattr(operation, "compute", broken)
    found = entries(-1)
    assert ("input gradient", "split") in found
    for (name, form), entry in found.items():
        assert entry["state"] == ("wrong" if name == operation.key.fget(_any(operation))[0] else "right"), form


def _any(operation: Any) -> Any:
    case = candidates.Case(candidates.points("cpu")[0], "cpu")
    return next(found for found in case.operations.values() if isinstance(found, operation))


def work(task: str) -> dict[str, Any]:
    """What a process of the test below does."""
    if task == "ends":
        os._exit(7)
    if task == "hangs":
        time.sleep(60)
    if task == "raises":
        raise ValueError("of all things\nand more")
    return {"state": "right"}


def test_a_process_that_ends_or_hangs_costs_its_own_task_alone() -> None:
    with Workers(work) as workers:
        tasks = ["ends", "hangs", "raises", "right"]
        found = dict(workers.run(tasks, 1, time.monotonic() + 300, 20.0))
        assert found == {
            "ends": {"state": "failed", "reason": "its process ended with exit code 7"},
            "hangs": {"state": "failed", "reason": "it did not end within 20 s"},
            "raises": {"state": "failed", "reason": "ValueError: of all things"},
            "right": {"state": "right"},
        }
        found = dict(workers.run(["hangs", "right"], 1, time.monotonic() + 1, 20.0))
        assert found == {"hangs": {"state": NO_TIME}, "right": {"state": NO_TIME}}


@interpreted
@pytest.mark.parametrize("name", forms.NAMES)
def test_a_pinned_form_is_the_one_that_computes_and_is_right(name: str) -> None:
    shape = Shape(136, 264, 12, 4, 1, 1, "fp32")
    problem = Problem(shape, "cpu", sets=1)
    layer = CONTENDERS[f"slora, {name}"](problem)
    found = layer.trained(problem.xs[0], problem.dys[0])
    assert mistake(found, problem.exact(updates=True), layer.wanted(shape)) is None
    seen: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        for operation in (triton.Forward, triton.InputGradient):
            compute = operation.compute
            patch.setattr(
                operation,
                "compute",
                lambda self, form, compute=compute: (seen.append(form.name), compute(self, form))[1],
            )
        layer.trained(problem.xs[0], problem.dys[0])
    assert seen == [name, name]


@interpreted
def test_a_form_that_is_no_candidate_is_skipped_with_the_reason() -> None:
    problem = Problem(Shape(32, 48, 12, 4, 2, 3, "fp32"), "cpu", sets=1)
    layer = CONTENDERS["slora, split"](problem)
    with pytest.raises(Missing, match="the forward has no form 'split' here"):
        layer.trained(problem.xs[0], problem.dys[0])
