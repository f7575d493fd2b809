"""Every candidate of every form of the three operations, checked and timed: `python -m benchmarks.candidates FOLDER`.

    --device cuda|cpu   on the CPU tiny shapes, interpreted
    --seconds S         all the time there is

Each operation of the Triton backend lists its candidates (`slora.ops.backends.triton`). At a production size, with one
block and with two of three active, which the host knows or only the device, every one of them is compared with the
fp32 reference: it may be twice as far from it as PyTorch's bf16 is, plus one unit (`contenders.layer.errors`).
Unwritten elements of a result are NaN. One more point has results of more than 2^31 elements; of those the rows at both
ends are compared, and dy is zero between them, so that sums over the rows have a reference as well.

First processes on all cores compile and check the candidates of the small points side by side; they share Triton's
cache on disk. Then one process times those that are right, and checks and times those of the large point. A candidate
that fails, hangs or breaks its CUDA context costs that candidate alone. `candidates.json` is written as they end:

    {"complete": ..., "candidates": [{"point", "operation", "form", "state", "error", "milliseconds", "reason"}, ...]}

with the state "right", "wrong", "failed" or "no time"; `error` is a part of what is allowed, the largest of the
operation's results; `milliseconds` are the device's (`slora.ops.backends.autotune`).
"""

from __future__ import annotations

import argparse
import copy
import functools
import math
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks.contenders.layer import SCALING, THRESHOLD, Problem, Shape, errors
from benchmarks.proof.workers import NO_TIME, Outcome, Workers
from benchmarks.results import environment, folder_name, process_began, write_result
from benchmarks.timing import ieee_fp32
from slora.ops.backends import Needs, autotune
from slora.ops.backends.triton import Form, Forward, InputGradient, Operation, WeightGradients
from slora.ops.operands import LoRAOperands

# Of all the time, what compiling may take; the longest that one candidate may; how often the file is written.
COMPILING, EACH, EVERY = 0.75, 60.0, 2.0
# What each operation returns, by the names of `Problem.exact`.
RESULTS = {"forward": ("y", "S"), "input gradient": ("dx", "T"), "weight gradients": ("lora_A", "lora_B", "gate")}


@dataclass(frozen=True)
class Point:
    """A shape, whether the host knows the active blocks, and how many rows at both ends are compared (None: all)."""

    shape: Shape
    known: bool
    ends: int | None = None

    @property
    def spelled(self) -> dict[str, Any]:
        """As the result file spells it."""
        return {**self.shape.point, "blocks": self.shape.blocks, "activity": "host" if self.known else "device"}


def points(device: str) -> list[Point]:
    """One block, and two active ones of three; last the large one."""
    if device == "cpu":
        one, three = Shape(32, 48, 24, 4, 1, 1, "fp32"), Shape(32, 48, 24, 4, 2, 3, "fp32")
        # Wide enough for the forms of several column tiles.
        large = Point(replace(one, K=136, N=264, M=40), True, 8)
    else:
        one, three = Shape(768, 3072, 1000, 16, 1, 1, "bf16"), Shape(768, 2304, 1000, 16, 2, 3, "bf16")
        # 700 000 x 3072 is more than 2^31: the last 949 rows of y and dy are past it.
        large = Point(replace(one, M=700_000), True, 512)
    return [*(Point(shape, known) for shape in (one, three) for known in (True, False)), large]


class Case:
    """The operations of a point with their inputs, and what their results are compared with."""

    def __init__(self, point: Point, device: str) -> None:
        problem = Problem(point.shape, device, sets=1)
        x, dy = problem.xs[0].detach(), problem.dys[0]
        self.rows: Tensor | slice = slice(None)
        if point.ends is not None:
            dy[point.ends : -point.ends] = 0
            self.rows = torch.arange(-point.ends, point.ends, device=device)
        compared = copy.copy(problem)
        compared.xs, compared.dys, compared._exact = [x[self.rows]], [dy[self.rows]], {}
        active = tuple(point.shape.chosen) if point.known else None
        operands = LoRAOperands(problem.A, problem.B, problem.gate, THRESHOLD, SCALING, active)
        S, T = (_packed(problem, t, point.known) for t in (x, dy))
        self.operations: dict[str, Operation] = {
            "forward": Forward(x, problem.W, problem.b, operands),
            "input gradient": InputGradient(dy, problem.W, None, operands),
            "weight gradients": WeightGradients(x, dy, S, T, operands, Needs(True, True, True, True)),
        }
        self.exact = dict(compared.exact(updates=True))
        wide = self.exact["y"][0].dtype
        for name, own, t in (("S", S, x), ("T", T, dy)):
            exact = _packed(problem, t[self.rows].to(wide), point.known)
            self.exact[name] = exact, own[self.rows], float(exact.norm())

    def excess(self, operation: str, form: Form) -> dict[str, float]:
        """The error of each result, as a part of what is allowed."""
        with _uninitialised_is_nan():
            results: Any = self.operations[operation].compute(form)
        by_rows = operation != "weight gradients"
        found = {name: t[self.rows] if by_rows else t for name, t in zip(RESULTS[operation], results, strict=True)}
        return {name: error / allowed for name, (error, allowed) in errors(found, self.exact).items()}


def _packed(problem: Problem, t: Tensor, known: bool) -> Tensor:
    """S of x, or T of dy: of the active blocks, or of all with zeros for the others."""
    n, of_x = problem.shape.N // problem.shape.blocks, t.shape[1] == problem.shape.K
    on = (problem.gate >= THRESHOLD).to(t.dtype)
    blocks = problem.shape.chosen if known else range(problem.shape.blocks)
    factors = [(problem.A[i].T if of_x else problem.B[i]).to(t.dtype) * on[i] for i in blocks]
    inputs = [t if of_x else t[:, i * n : (i + 1) * n] for i in blocks]
    return torch.cat([a @ b for a, b in zip(inputs, factors, strict=True)], 1)


@contextmanager
def _uninitialised_is_nan() -> Iterator[None]:
    """Without it a result could lie where the one before has left the right numbers."""
    before = torch.are_deterministic_algorithms_enabled()
    with warnings.catch_warnings():
        # cuBLAS, whose own determinism is of no interest here.
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(True, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before)


class Task(NamedTuple):
    """A candidate by its place: the point's in `points`, the form's among those of the operation."""

    device: str
    point: int
    operation: str
    form: int
    check: bool
    time: bool


@functools.lru_cache(1)
def _case(device: str, point: int) -> Case:
    return Case(points(device)[point], device)


def examined(task: Task) -> Outcome:
    """Check or time a candidate, as the task asks."""
    ieee_fp32()
    case = _case(task.device, task.point)
    operation = case.operations[task.operation]
    form = operation.forms()[task.form]
    outcome: Outcome = {"state": "right"}
    if task.check:
        found = case.excess(task.operation, form)
        worst = max(found, key=lambda name: math.inf if math.isnan(found[name]) else found[name])
        outcome["error"] = round(found[worst], 4) if math.isfinite(found[worst]) else None
        if not found[worst] <= 1:
            return {**outcome, "state": "wrong", "reason": f"{worst} is off by {found[worst]:.3g} of what is allowed"}
    if task.time:
        outcome["milliseconds"] = round(milliseconds(operation, form), 5)
    return outcome


def milliseconds(operation: Operation, form: Form) -> float:
    """The device's time of one call."""
    if operation.rows.is_cuda:
        return autotune._milliseconds(functools.partial(operation.compute, form), operation.rows.device)
    start = time.perf_counter()
    operation.compute(form)
    return 1e3 * (time.perf_counter() - start)


def listed(device: str) -> list[tuple[Task, dict[str, Any]]]:
    """Every candidate as a task, and the beginning of its entry. No candidate depends on the number of rows."""
    found = []
    for i, point in enumerate(points(device)):
        case = Case(replace(point, shape=replace(point.shape, M=8), ends=None), device)
        for name, operation in case.operations.items():
            for j, form in enumerate(operation.forms()):
                entry = {"point": point.spelled, "operation": name, "form": str(form), "state": NO_TIME}
                found.append((Task(device, i, name, j, point.ends is not None, False), entry))
    return found


def examine(folder: Path, device: str, until: float) -> list[dict[str, Any]]:
    """Check and time every candidate, write `candidates.json` as they end, and return the entries."""
    entries = dict(listed(device))
    about, last = environment(device), 0.0

    def write(complete: bool) -> None:
        rows = {"environment": about, "complete": complete, "candidates": list(entries.values())}
        write_result("candidates", folder_name(device), rows, folder)

    def note(key: Task, outcome: Outcome) -> None:
        nonlocal last
        entries[key].update(outcome)
        if time.monotonic() - last > EVERY:
            write(False)
            last = time.monotonic()

    small = [task for task in entries if not task.check]
    cores = 1 if device == "cpu" else min(16, len(os.sched_getaffinity(0)))
    compiled = time.monotonic() + COMPILING * (until - time.monotonic())
    with Workers(examined) as workers:
        for task, outcome in workers.run([task._replace(check=True) for task in small], cores, compiled, EACH):
            note(task._replace(check=False), outcome)
        rest = [task._replace(time=True) for task in entries if task.check or entries[task]["state"] == "right"]
        for task, outcome in workers.run(rest, 1, until, EACH):
            key = task._replace(time=False)
            if task.check or outcome["state"] != NO_TIME:
                note(key, outcome)
    write(all(entry["state"] != NO_TIME for entry in entries.values()))
    return list(entries.values())


def main(arguments: Sequence[str]) -> int:
    """Examine all candidates; 1 where one of them is not right."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.candidates")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--seconds", type=float, default=300.0)
    args = parser.parse_args(arguments)
    entries = examine(args.folder, args.device, process_began() + args.seconds)
    for entry in entries:
        if entry["state"] not in ("right", NO_TIME):
            print(*entry.values(), flush=True)
    counts = Counter(entry["state"] for entry in entries)
    print(", ".join(f"{number} {state}" for state, number in counts.items()))
    return int(counts.keys() - {"right", NO_TIME} != set())


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
