"""Every candidate of the kernels, checked at production sizes: `python -m benchmarks.candidates FOLDER`.

    --device cuda|cpu   on the CPU tiny shapes, interpreted
    --seconds S         all the time there is

Every algorithm of every operation (`slora.ops.backends.algorithms`) runs with all its tile sizes, with one block and
with two of three active, which the host knows or only the device, and once with results of more than 2^31 elements. A
result is compared with the fp32 reference; unwritten elements are NaN. (Times of candidates are what `autotune` chooses
by: see "choices" in `gpu-<stage>.json`.)

Processes on all cores compile and check side by side; they share Triton's cache on disk. One process does the large
point. A candidate that fails, hangs or breaks its CUDA context costs only itself. The end writes `candidates.json`:

    {"complete": ..., "candidates": [{"point", "operation", "algorithm", "state", "error", "reason"}, ...]}

"state" is "right", "wrong", "failed" or "no time"; "error" the largest of the results, where 1 is what is allowed.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import math
import os
import sys
import time
import warnings
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from benchmarks import workers
from benchmarks.correctness import errors, expected
from benchmarks.implementations.layer import SCALING, THRESHOLD, Problem, Shape
from benchmarks.results import environment, folder_name, process_began, write_result
from benchmarks.timing import ieee_fp32
from slora.ops.backends import Needs
from slora.ops.backends.algorithms import Forward, InputGradient, Operation, WeightGradients
from slora.ops.operands import LoRAOperands

# Of all the time, what the small points may take; the longest for one candidate in seconds.
SMALL, EACH = 0.75, 60.0
# What each operation returns.
RESULTS = {"forward": ("y", "S"), "input gradient": ("dx", "T"), "weight gradients": ("lora_A", "lora_B", "gate")}


class Point(NamedTuple):
    """A shape, whether the host knows the active blocks, and how many rows at both ends are not zero (0: all)."""

    shape: Shape
    host_known: bool
    ends: int = 0


class Task(NamedTuple):
    """A candidate: indices into `points(device)` and into the algorithms of the operation."""

    device: str
    point: int
    operation: str
    algorithm: int


def points(device: str) -> list[Point]:
    """One block, and two active ones of three; last the large one."""
    if device == "cpu":
        # Wide enough for the algorithms of several column tiles.
        return [Point(Shape(32, 48, 24, 8, 2, 3, "fp32"), False), Point(Shape(264, 264, 40, 8, 1, 1, "fp32"), True, 8)]
    one, three = Shape(768, 3072, 1000, 16, 1, 1, "bf16"), Shape(768, 2304, 1000, 16, 2, 3, "bf16")
    small = [Point(shape, host_known) for shape in (one, three) for host_known in (True, False)]
    # 700 000 x 3072 is more than 2^31: the last 949 rows of y and dy are past it.
    return [*small, Point(replace(one, M=700_000), True, 512)]


class PreparedPoint:
    """The operations at a point with their inputs, and what their results are compared with."""

    def __init__(self, point: Point, device: str) -> None:
        shape, ends = point.shape, point.ends
        problem = Problem(replace(shape, M=2 * ends or shape.M), device, sets=1)
        self.rows = torch.arange(-ends, ends or shape.M, device=device) % shape.M
        x, dy = problem.xs[0].detach(), problem.dys[0]
        blocks = shape.chosen if point.host_known else range(shape.blocks)
        S, T = low_rank(problem, blocks, problem.dtype)
        self.expected = dict(problem.exact(updates=True))
        wide = self.expected["y"][0].dtype
        for name, exact, own in zip("ST", low_rank(problem, blocks, wide), (S, T), strict=True):
            self.expected.update(expected({name: exact}, {name: own}, problem.dtype))
        active = tuple(shape.chosen) if point.host_known else None
        operands = LoRAOperands(problem.A, problem.B, problem.gate, THRESHOLD, SCALING, active)
        x, dy, S, T = (t.new_zeros(shape.M, t.shape[1]).index_copy_(0, self.rows, t) for t in (x, dy, S, T))
        self.operations: dict[str, Operation] = {
            "forward": Forward(x, problem.W, problem.b, operands),
            "input gradient": InputGradient(dy, problem.W, None, operands),
            "weight gradients": WeightGradients(x, dy, S, T, operands, Needs(True, True, True, True)),
        }

    def errors(self, operation: str, algorithm: int) -> dict[str, float]:
        """The error of each result, as a part of what is allowed."""
        of = self.operations[operation]
        with warnings.catch_warnings():
            # cuBLAS, whose own determinism is of no interest here.
            warnings.simplefilter("ignore")
            # Fills what is allocated with NaN: a result could lie where the one before has left the right numbers.
            torch.use_deterministic_algorithms(True, warn_only=True)
            try:
                results: Any = of.compute(of.algorithms()[algorithm])
            finally:
                torch.use_deterministic_algorithms(False)
        found = dict(zip(RESULTS[operation], results, strict=True))
        if operation != "weight gradients":
            found = {name: t[self.rows] for name, t in found.items()}
        return {name: error / allowed for name, (error, allowed) in errors(found, self.expected).items()}


def low_rank(problem: Problem, blocks: Iterable[int], dtype: torch.dtype) -> list[Tensor]:
    """S and T of `blocks`, side by side; zeros for the inactive ones."""
    x, dy, A, B, gate = (
        t.detach().to(dtype) for t in (problem.xs[0], problem.dys[0], problem.A, problem.B, problem.gate)
    )
    on, dy = (gate >= THRESHOLD).to(dtype), dy.unflatten(1, (problem.shape.blocks, -1))
    pairs = [(x @ A[i].T * on[i], dy[:, i] @ B[i] * on[i]) for i in blocks]
    return [torch.cat(parts, 1) for parts in zip(*pairs, strict=True)]


@functools.lru_cache(1)
def prepared(device: str, point: int) -> PreparedPoint:
    """The operations at a point with their inputs; a process keeps those of the last one."""
    return PreparedPoint(points(device)[point], device)


def check(task: Task) -> workers.Outcome:
    """Compare the results of a candidate with the reference."""
    ieee_fp32()
    found = prepared(task.device, task.point).errors(task.operation, task.algorithm)
    # NaN is the worst.
    name, worst = max(found.items(), key=lambda item: (math.isnan(item[1]), item[1]))
    if worst <= 1:
        return {"state": "right", "error": round(worst, 4)}
    error = round(worst, 4) if math.isfinite(worst) else None
    return {"state": "wrong", "error": error, "reason": f"{name} is off by {worst:.3g} of what is allowed"}


def listed(device: str) -> dict[Task, dict[str, Any]]:
    """Every candidate and the beginning of its entry. No candidate depends on the number of rows."""
    entries = {}
    for i, (shape, host_known, _) in enumerate(points(device)):
        spelled = {**shape.point, "blocks": shape.blocks, "activity": "host" if host_known else "device"}
        for name, operation in PreparedPoint(Point(replace(shape, M=8), host_known), device).operations.items():
            for j, algorithm in enumerate(operation.algorithms()):
                entry = {"point": spelled, "operation": name, "algorithm": str(algorithm), "state": workers.NO_TIME}
                entries[Task(device, i, name, j)] = entry
    return entries


def examine(folder: Path, device: str, until: float) -> list[dict[str, Any]]:
    """Check every candidate, write `candidates.json`, and return the entries."""
    entries, about = listed(device), environment(device)
    large = [task for task in entries if points(device)[task.point].ends]
    small = [task for task in entries if task not in large]
    cores = 1 if device == "cpu" else min(16, len(os.sched_getaffinity(0)))
    most = time.monotonic() + SMALL * (until - time.monotonic())
    at_once = workers.run(check, small, cores, most, EACH)
    for task, outcome in itertools.chain(at_once, workers.run(check, large, 1, until, EACH)):
        entries[task].update(outcome)
    complete = all(entry["state"] != workers.NO_TIME for entry in entries.values())
    content = {"environment": about, "complete": complete, "candidates": list(entries.values())}
    write_result("candidates", folder_name(device), content, folder)
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
        if entry["state"] in ("wrong", "failed"):
            print(*entry.values(), flush=True)
    counts = Counter(entry["state"] for entry in entries)
    print(", ".join(f"{number} {state}" for state, number in counts.items()))
    return int(bool(counts["wrong"] or counts["failed"]))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
