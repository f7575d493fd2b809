"""Whole models: a training step (forward, loss, backward, optimizer), its memory on the CPU, or a forward.

    train_step    beside PEFT, full fine-tuning and frozen weights
    gates         the policies for inactive blocks
    train_memory  peak resident memory of a training step, of a process of its own
    inference     a forward without gradients: the base model, merged and unmerged

A `probe` implementation probes every tenth step: its measurements are whole cycles of ten steps, divided by ten. Modes
of a step: "eager", "compile" (the forward and loss under torch.compile) and on a GPU "graph" (the step as one CUDA
graph). There, `peak_memory_mib` is what the step has allocated at its peak, parameters included.

Before any is timed, the output, or the loss and all gradients, are compared with slora's reference in a wider dtype: on
a batch of two, and those of slora on a GPU, whose kernels depend on the number of rows, on up to 64 of the batch.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml

from benchmarks import memory
from benchmarks.cases.rounds import measuring, take_times
from benchmarks.counting import beside_roofline
from benchmarks.implementations.training import INFERENCE, RANK, TRAINING, Run
from benchmarks.models import MODELS, Inputs
from benchmarks.results import Row, Settings, reason_in
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
    grids = TABLES[case]["cuda" if settings.on_gpu else "cpu"] | {"tiny": TABLES[case]["tiny"]}
    points = grids["default"] + grids.get("full", []) if settings.grid == "full" else grids[settings.grid]
    return [Point(model, batch, precision, mode, NAMES[names]) for model, batch, precision, mode, names in points]


def measure(point: Point, settings: Settings, roofline: dict[str, Any], case: str) -> list[Row]:
    """The rows of a point."""
    about = {"model": MODELS[point.model]().name, "batch": point.batch, "r": RANK}
    about["dtype" if case == "inference" else "precision"] = point.precision
    if case in ("train_step", "gates"):
        about["mode"] = point.mode
    with measuring(about, point.names, settings) as rows:
        reason = without_bf16(settings, roofline) if point.precision != "fp32" and case != "inference" else None
        for name, row in rows.items():
            if reason:
                row["skipped"] = reason
            elif case == "train_memory":
                with reason_in(row):
                    checked(name, point, "cpu")
                    row["peak_memory_mib"] = memory.in_a_process(step_peak, name, point)
        if not reason and case != "train_memory":
            fill(rows, settings, roofline, point)
    return list(rows.values())


def without_bf16(settings: Settings, roofline: dict[str, Any]) -> str | None:
    """Why steps in bf16 are left out: on a processor that only imitates it they take minutes and tell nothing."""
    rates = roofline["gemm_flops_per_s"]
    if settings.on_gpu or settings.grid != "default" or rates["bf16"] >= rates["fp32"] / 2:
        return None
    return (
        f"this processor has no arithmetic in bf16: a product runs at {rates['bf16'] / 1e9:.0f} GFLOP/s, "
        f"in fp32 at {rates['fp32'] / 1e9:.0f} (--full measures it all the same)"
    )


def fill(rows: dict[str, Row], settings: Settings, roofline: dict[str, Any], point: Point) -> None:
    """Check the implementations, then time those that are right in turns."""
    model, device, on_gpu = MODELS[point.model](), settings.device, settings.on_gpu
    dtype = torch.bfloat16 if point.precision == "bf16" else torch.float32
    sets = [model.inputs(point.batch, device, dtype)]
    count = 2 if settings.grid == "tiny" else input_sets(sum(t.nbytes for t in sets[0]))
    sets += [model.inputs(point.batch, device, dtype) for _ in range(count - 1)]
    runs: dict[str, Run] = {}
    for name, row in rows.items():
        with reason_in(row):
            release(device)
            before = torch.cuda.memory_allocated() if on_gpu else 0
            run = checked(name, point, device)
            # The counter does not see what a compiler has put together.
            eager = Run(TRAINING[name], model, point.precision, device, "eager") if point.mode == "compile" else run
            row.update(flops=round(count_flops(eager, sets[0]) / run.steps), input_sets=count)
            if on_gpu and point.mode != "forward":
                torch.cuda.reset_peak_memory_stats()
                run(sets[0])
                row["peak_memory_mib"] = (torch.cuda.max_memory_allocated() - before) / 2**20
            runs[name] = run
    calls: dict[str, list[Call]] = {name: [OnInputs(run, inputs) for inputs in sets] for name, run in runs.items()}
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
        seconds, (kind, each) = row["seconds"]["median"], model.items
        row[f"{kind}_per_second"] = point.batch * each / seconds
        product = "bf16" if point.precision == "amp" else point.precision
        row.update(beside_roofline(roofline, product, seconds, row["flops"], None))


@dataclass(frozen=True)
class OnInputs:
    """A measurement on one set of inputs: a call to be timed."""

    run: Run
    inputs: Inputs

    def __call__(self) -> None:
        self.run(self.inputs)

    def settle(self) -> None:
        """As `Run.settle`."""
        self.run.settle()


def checked(name: str, point: Point, device: str) -> Run:
    """An implementation that computes what it has to; raises `Wrong` where it does not."""
    way = (INFERENCE if point.mode == "forward" else TRAINING)[name]
    run = Run(way, MODELS[point.model](), point.precision, device, point.mode)
    # Compiled code is for one batch; a probe of a large one reads some of its rows; 64 fit into a GPU in a wider dtype.
    batches = [point.batch if point.mode == "compile" else 2]
    if device == "cuda" and name.startswith("slora") and "probe" not in name:
        batches.append(min(point.batch, 64))
    run.check(*(run.model.inputs(batch, device, run.dtype) for batch in dict.fromkeys(batches)))
    return run


def step_peak(name: str, point: Point) -> float:
    """Peak resident memory of three steps, or of a whole cycle, in MiB; to be measured in a process of its own."""
    run = Run(TRAINING[name], MODELS[point.model](), point.precision, "cpu", point.mode)
    inputs = run.model.inputs(point.batch, "cpu", run.dtype)
    memory.peak_begins()
    for _ in range(3 if run.steps == 1 else 1):
        run(inputs)
    return memory.peak()
