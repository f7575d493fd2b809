"""Peak memory of a training step on the CPU: of a process of its own per contender, libraries included.

Every process imports the same libraries, whoever is measured in it, and the peak is that of the steps: what building
the model took is given back before.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

from benchmarks.cases import train_step
from benchmarks.contenders import memory
from benchmarks.contenders.model import CONTENDERS, RANK
from benchmarks.contenders.step import Step, dtype_of
from benchmarks.models import find
from benchmarks.results import BenchmarkError, Settings


def grid(settings: Settings) -> list[tuple[str, int, str]]:
    """`(model, batch, precision)`."""
    if settings.grid in ("tiny", "quick"):
        return [("tiny" if settings.grid == "tiny" else "vit-s", 2, "fp32")]
    return [("vit-s", 16, precision) for precision in (("fp32", "bf16") if settings.grid == "full" else ("fp32",))]


def run(settings: Settings, ceilings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield one row per contender."""
    for name, batch, precision in grid(settings):
        model = find(name)
        for contender in train_step.USUAL:
            if settings.stop():
                return
            if not settings.wanted(contender):
                continue
            point = {"model": model.name, "batch": batch, "r": RANK, "precision": precision}
            row: dict[str, Any] = {"point": point, "contender": contender}
            inputs = model.inputs(batch, "cpu", dtype_of(precision))
            # A step that computes something else is not worth weighing either.
            if train_step.ready(row, model, inputs, precision, "eager", "cpu") is not None:
                try:
                    row["peak_memory_mib"] = memory.in_a_process(step_peak, contender, name, batch, precision)
                except BenchmarkError as error:
                    row["failed"] = str(error)
            print(f"  {precision} {contender}", file=sys.stderr, flush=True)
            yield row


def step_peak(contender: str, model: str, batch: int, precision: str) -> float:
    """Peak resident memory of three steps, or of a whole cycle, in MiB; to be measured in a process of its own."""
    inputs = find(model).inputs(batch, "cpu", dtype_of(precision))
    step = Step(CONTENDERS[contender], find(model), inputs, precision, "cpu")
    memory.peak_begins()
    for _ in range(3 if step.count == 1 else 1):
        step()
    return memory.peak()
