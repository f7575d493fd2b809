"""Whole models: a training step (forward, loss, backward, optimizer), or a forward.

    train_step    beside PEFT, full fine-tuning and frozen weights
    gates         the policies for inactive blocks
    inference     a forward without gradients: the base model, merged and unmerged

A `probe` implementation probes every tenth step: its measurements are whole cycles of ten steps, divided by ten. Modes
of a step: "eager", "compile" (the forward and loss under torch.compile) and on a GPU "graph" (the step as one CUDA
graph). `peak_memory_mib` is the most in use during a step beyond what was before the model, parameters included.

Before any is timed, the output, or the loss and all gradients, are compared with slora's reference in a wider dtype: on
a batch of two, and those of slora on a GPU, whose kernels depend on the number of rows, on up to 64 of the batch.
"""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from benchmarks import memory
from benchmarks.cases.rounds import measuring, take_times
from benchmarks.implementations.training import INFERENCE, RANK, TRAINING, Run
from benchmarks.models import MODELS
from benchmarks.results import Row, Settings, reason_in
from benchmarks.roofline import percent_of_gemm
from benchmarks.timing import Call, input_sets, release
from slora.ops.flops import count_flops

# The grids, and the implementations at their points.
TABLES = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
USUAL = tuple(name for name in TRAINING if name != "slora, few active, exact")
NAMES: dict[str, tuple[str, ...]] = {
    **{name: tuple(words) for name, words in TABLES["implementations"].items()},
    "usual": USUAL,
    # A captured step is the same at every replay, so a probe every tenth step is not in it.
    "captured": tuple(name for name in USUAL if "probe" not in name),
    "inference": tuple(INFERENCE),
}


class Point(NamedTuple):
    """A point of a grid."""

    model: str
    batch: int
    precision: str
    mode: str = "eager"
    names: tuple[str, ...] = USUAL


def grid(settings: Settings, case: str = "train_step") -> list[Point]:
    """The points in the order in which they matter."""
    points = (TABLES[case]["cuda" if settings.on_gpu else "cpu"] | TABLES[case])[settings.grid]
    return [Point(model, batch, precision, mode, NAMES[names]) for model, batch, precision, mode, names in points]


def measure(point: Point, settings: Settings, roofline: dict[str, Any], case: str) -> list[Row]:
    """The rows of a point."""
    about = {"model": MODELS[point.model].name, "batch": point.batch, "r": RANK}
    about |= {"dtype": point.precision} if case == "inference" else {"precision": point.precision, "mode": point.mode}
    with measuring(about, point.names, settings) as rows:
        fill(rows, settings, roofline, point)
    return list(rows.values())


def fill(rows: dict[str, Row], settings: Settings, roofline: dict[str, Any], point: Point) -> None:
    """Check the implementations, then time those that are right in turns."""
    model, device, on_gpu = MODELS[point.model], settings.device, settings.on_gpu
    dtype = torch.bfloat16 if point.precision == "bf16" else torch.float32
    sets = [model.inputs(point.batch, device, dtype)]
    count = 2 if settings.grid == "tiny" else input_sets(sum(t.nbytes for t in sets[0]))
    sets += [model.inputs(point.batch, device, dtype) for _ in range(count - 1)]
    runs: dict[str, Run] = {}
    if point.mode != "forward":
        # What libraries allocate in their first step and keep belongs to no implementation.
        Run(TRAINING["full"], model, point.precision, device, "eager")(sets[0])
    for name, row in rows.items():
        with reason_in(row):
            release(device)
            before = memory.begin(device)
            run = checked(name, point, device)
            # The counter does not see what a compiler has put together.
            eager = Run(TRAINING[name], model, point.precision, device, "eager") if point.mode == "compile" else run
            row.update(flops=round(count_flops(eager, sets[0]) / run.steps), input_sets=count)
            del eager
            if point.mode != "forward":
                memory.begin(device)
                run(sets[0])
                row["peak_memory_mib"] = memory.peak(device) - before
            runs[name] = run
    calls: dict[str, list[Call]] = {name: [partial(run, inputs) for inputs in sets] for name, run in runs.items()}
    # Compiling for a CPU takes about as long as this.
    most = 60.0 if point.mode == "forward" else 30.0 if point.mode == "compile" and not on_gpu else 150.0
    graphs, steps = point.mode in ("graph", "forward"), {name: run.steps for name, run in runs.items()}
    take_times(rows, calls, settings, 11 if on_gpu else 15, most, graphs=graphs, steps=steps)
    for name in calls:
        row = rows[name]
        if not all(bool(loss.isfinite()) for loss in runs[name].losses):
            del row["seconds"]
            row["refused"] = "the loss of a step is not finite"
            continue
        seconds, product = row["seconds"]["median"], "bf16" if point.precision == "amp" else point.precision
        row["images_per_second"] = point.batch / seconds
        row["percent_of_gemm"] = percent_of_gemm(roofline, product, seconds, row["flops"])


def checked(name: str, point: Point, device: str) -> Run:
    """An implementation that computes what it has to; raises `Wrong` where it does not."""
    way = (INFERENCE if point.mode == "forward" else TRAINING)[name]
    run = Run(way, MODELS[point.model], point.precision, device, point.mode)
    # Compiled code is for one batch; a probe of a large one reads some of its rows; 64 fit into a GPU in a wider dtype.
    batches = [point.batch if point.mode == "compile" else 2]
    if device == "cuda" and name.startswith("slora") and "probe" not in name:
        batches.append(min(point.batch, 64))
    run.check(*(run.model.inputs(batch, device, run.dtype) for batch in dict.fromkeys(batches)))
    return run
