"""One linear layer: forward, and forward with backward, in every way that there is, per shape.

`forward` is that of inference, without a graph. `forward_backward` asks for dx and the gradients of everything the
implementation trains. On a GPU both are replays of a CUDA graph; `eager` is forward and backward launched from Python.
`peak_over_outputs` is the memory that one forward and backward adds at its peak, over y, S, T and the gradients.
`deterministic` is whether two calls give the same bits. The floor is the frozen layer's time with what every low-rank
update costs beyond it: its FLOPs at the rate of a large product, and x and dy once more, for dA and dB, at the rate of
a large copy. `over_floor` is the multiple of the floor's overhead over the frozen layer, `of_floor` the floor's time
over one's own.
"""

from __future__ import annotations

from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

import slora
from benchmarks import memory
from benchmarks.cases.rounds import measuring, take_times
from benchmarks.correctness import mismatch
from benchmarks.implementations.layer import FROZEN, IMPLEMENTATIONS, Layer, Problem, Shape
from benchmarks.results import Row, Settings, Wrong, reason_in
from benchmarks.roofline import percent_of_gemm
from benchmarks.timing import Call, input_sets
from slora.ops.flops import count_flops

TARGET_SHAPES = [(768, 768), (768, 3072), (3072, 768), (1024, 4096), (4096, 1024), (1280, 5120)]
# Blocks that are active, and of how many.
ALL, NONE, SOME = (1, 1), (0, 1), ((1, 16), (4, 16))


def grid(settings: Settings, case: str = "linear") -> list[Shape]:
    """The points in the order in which they matter: a run that is cut short has the targets."""
    if settings.grid == "tiny":
        return [Shape(32, 48, 24, 4, *active) for active in (ALL, NONE, SOME[1])] + [Shape(32, 48, 24, 4, dtype="bf16")]
    if settings.on_gpu:
        targets = [Shape(K, N, 50432, 16, *active, "bf16") for active in (ALL, NONE) for K, N in TARGET_SHAPES]
        if settings.grid == "quick":
            return targets
        rest = [Shape(768, 3072, 50432, 16, *active, "bf16") for active in SOME]
        rest += [Shape(K, N, 50432, 16, dtype="bf16") for K, N in ((768, 2304), (4096, 4096))]
        rest += [Shape(768, 3072, M, 16, dtype="bf16") for M in (3152, 12608)]
        rest += [Shape(768, 3072, 50432, r, dtype="bf16") for r in (4, 64, 128)]
        return [*targets, *rest, Shape(768, 3072, 12608, 16)]
    if settings.grid == "quick":
        return [Shape(768, 768, 788, 16, *active) for active in (ALL, NONE)]
    points = [Shape(K, N, 3152, 16) for K, N in TARGET_SHAPES[:3]] + [Shape(768, 3072, 3152, 16, dtype="bf16")]
    return [*points, *(Shape(768, 3072, 3152, 16, *active) for active in (NONE, *SOME)), Shape(768, 3072, 3152, 64)]


def measure(shape: Shape, settings: Settings, roofline: dict[str, Any], case: str) -> list[Row]:
    """The rows of a point."""
    names = list(IMPLEMENTATIONS)
    if settings.on_gpu or settings.grid == "tiny":
        # Its compiler takes longer than all the rest of a point.
        names.remove("PEFT, compiled")
    with measuring(shape.point, names, settings) as rows:
        fill(rows, shape, settings, roofline)
    return list(rows.values())


def fill(rows: dict[str, Row], shape: Shape, settings: Settings, roofline: dict[str, Any]) -> None:
    """Check the implementations, time those that are right, and set the times beside the roofline and the floor."""
    element = 4 if shape.dtype == "fp32" else 2
    sets = 2 if settings.grid == "tiny" else input_sets(shape.M * (shape.K + shape.N) * element)
    problem, layers = Problem(shape, settings.device, sets), dict[str, Layer]()
    for name, row in rows.items():
        with reason_in(row):
            layer = IMPLEMENTATIONS[name](problem)
            row.update(checked(layer, problem), input_sets=sets)
            layers[name] = layer
    for measure in ("forward", "forward_backward", *["eager"] * settings.on_gpu):
        calls: dict[str, list[Call]] = {
            name: [partial(layer.inferred, x) for x in problem.xs]
            if measure == "forward"
            else [partial(layer.trained, *pair) for pair in zip(problem.xs, problem.dys, strict=True)]
            for name, layer in layers.items()
        }
        take_times(rows, calls, settings, 31 if settings.on_gpu else 9, 10.0, measure, graphs=measure != "eager")
        layers = {name: layers[name] for name in calls}
    frozen = rows.get(FROZEN, {}).get("forward_backward")
    for name, layer in layers.items():
        row, seconds = rows[name], rows[name]["forward_backward"]["median"]
        if "flops" in row:
            row["percent_of_gemm"] = percent_of_gemm(roofline, shape.dtype, seconds, row["flops"])
        if frozen and layer.updates and shape.active:
            moved = element * shape.M * (shape.K + shape.share * shape.N) / roofline["copy_bytes_per_s"]
            floor = frozen["median"] + moved + lora_flops(shape) / roofline["gemm_flops_per_s"][shape.dtype]
            over = (seconds - frozen["median"]) / (floor - frozen["median"])
            row.update(floor_seconds=floor, over_floor=over, of_floor=floor / seconds)


def lora_flops(shape: Shape) -> int:
    """FLOPs of the update, six products: S and its update, T, dx, dA and dB; three with K, three with N of a block."""
    return 6 * shape.M * shape.r * shape.active * (shape.K + shape.N // shape.blocks)


def checked(layer: Layer, problem: Problem) -> Row:
    """What calls on the first inputs say before any is timed: whether the bits repeat, FLOPs and memory.

    Raises:
        Wrong: a result is.
    """
    x, dy = problem.xs[0], problem.dys[0]
    exact, same, outputs = problem.exact(layer.updates), True, 0
    for context in (nullcontext, slora.gates_on_device):
        # As launched, and with the device's own gates, as a CUDA graph has them; inference takes paths of its own.
        with context():
            found, again, inferred = layer.trained(x, dy), layer.trained(x, dy), layer.inferred(x)
        for results, wanted in ((found, layer.wanted(problem.shape)), ({"y": inferred}, {"y"})):
            if wrong := mismatch(results, exact, wanted):
                raise Wrong(f"{wrong} ({'training' if results is found else 'inference'}, {context.__name__})")
        same &= all(torch.equal(found[name], again[name]) for name in found)
        outputs = sum(t.nbytes for t in found.values())
    del found, again, inferred, results
    result: Row = {"deterministic": int(same)}
    # The counter does not see what a compiler has put together.
    if not hasattr(layer.forward, "_orig_mod"):
        result["flops"] = count_flops(lambda: layer.counted(x, dy))
    if problem.device == "cuda":
        low_rank = 2 * problem.shape.M * problem.shape.active * problem.shape.r * problem.dtype.itemsize
        before = memory.begin("cuda")
        for context in (nullcontext, slora.gates_on_device):
            with context():
                layer.trained(x, dy)
        added = (memory.peak("cuda") - before) * 2**20
        result["peak_over_outputs"] = added / (outputs + low_rank * layer.updates)
    return result
