"""One linear layer: forward, and forward with backward, in every way that there is, per shape.

`forward` is that of inference, without a graph. `forward_backward` asks for dx and the gradients of everything the
implementation trains. On a GPU both are replays of a CUDA graph; `eager` is forward and backward launched from Python.
`peak_over_outputs` is the memory that one forward and backward adds at its peak, over y, S, T and the gradients.

`floor_seconds` is the frozen layer's time with what any update costs beyond it at the rates of this run
(`counting.predicted_seconds`); `over_floor` is the multiple of the floor's overhead over frozen, `of_floor` the floor's
time over one's own. On the grid of `scaling`, whose points lie on curves against rank, active share and tokens,
`predicted` is the same for the algorithm that was taken, `deviation` the time over it, less 1; `update_seconds` is what
each round took beyond the frozen layer in the same round, `update_deviation` its median over the prediction, less 1.
"""

from __future__ import annotations

import itertools
from contextlib import nullcontext
from functools import partial
from typing import Any

import torch

import slora
from benchmarks import counting
from benchmarks.cases.rounds import measuring, take_times
from benchmarks.correctness import mismatch
from benchmarks.implementations.layer import FROZEN, IMPLEMENTATIONS, Layer, Problem, Shape, taken_algorithm
from benchmarks.results import Row, Settings, Wrong, reason_in, spread
from benchmarks.timing import Call, input_sets
from slora.ops.flops import count_flops

SHAPES = [(768, 768), (768, 2304), (768, 3072), (3072, 768), (1024, 4096), (4096, 1024), (1280, 5120), (4096, 4096)]
TARGET_SHAPES = [shape for shape in SHAPES if shape not in ((768, 2304), (4096, 4096))]
TOKENS = (3152, 12608, 50432)
RANKS = (4, 16, 64, 128)
# Blocks that are active, and of how many.
ALL, NONE, SOME = (1, 1), (0, 1), ((1, 16), (4, 16))
CURVES = (FROZEN, "slora, torch", "slora, triton", "slora, auto")


def grid(settings: Settings, case: str = "linear") -> list[tuple[str, Shape]]:
    """`(curve, shape)` in the order in which they matter; `linear` has no curves."""
    return curves(settings) if case == "scaling" else [("", shape) for shape in shapes(settings)]


def shapes(settings: Settings) -> list[Shape]:
    """The points of `linear`: a run that is cut short has the targets."""
    if settings.grid == "tiny":
        return [Shape(32, 48, 24, 4, *active) for active in (ALL, NONE, SOME[1])] + [Shape(32, 48, 24, 4, dtype="bf16")]
    if settings.grid == "full":
        whole = itertools.product(SHAPES, TOKENS, RANKS, (ALL, NONE, *SOME), ("bf16", "fp32"))
        return [Shape(K, N, M, r, *active, dtype) for (K, N), M, r, active, dtype in whole]
    if settings.on_gpu:
        targets = [Shape(K, N, 50432, 16, *active, "bf16") for active in (ALL, NONE) for K, N in TARGET_SHAPES]
        if settings.grid == "quick":
            return targets
        rest = [Shape(768, 3072, 50432, 16, *active, "bf16") for active in SOME]
        rest += [Shape(K, N, 50432, 16, dtype="bf16") for K, N in SHAPES if (K, N) not in TARGET_SHAPES]
        rest += [Shape(768, 3072, M, 16, dtype="bf16") for M in TOKENS[:2]]
        rest += [Shape(768, 3072, 50432, r, dtype="bf16") for r in RANKS if r != 16]
        return [*targets, *rest, Shape(768, 3072, 12608, 16)]
    if settings.grid == "quick":
        return [Shape(768, 768, 788, 16, *active) for active in (ALL, NONE)]
    points = [Shape(K, N, 3152, 16) for K, N in (SHAPES[0], *SHAPES[2:4])]
    points += [Shape(768, 3072, 3152, 16, dtype="bf16")]
    return [*points, *(Shape(768, 3072, 3152, 16, *active) for active in (NONE, *SOME)), Shape(768, 3072, 3152, 64)]


def curves(settings: Settings) -> list[tuple[str, Shape]]:
    """`(curve, point)` of `scaling`; every curve has the middle as a point of its own, so that it is one run."""
    ranks: tuple[int, ...]
    shares: tuple[int, ...]
    tokens: tuple[int, ...]
    K, N, r, ranks, shares = 768, 3072, 16, RANKS, (0, 1, 2, 4, 8, 16)
    M, dtype, tokens = 3152, "fp32", (788, 1576, 3152, 6304)
    if settings.on_gpu:
        M, dtype, tokens = 50432, "bf16", (3152, 12608, 25216, 50432)
    if settings.grid == "full":
        ranks, shares = (4, 16, 32, 64, 128, 256), (0, 1, 2, 4, 6, 8, 12, 16)
    if settings.grid == "quick":
        ranks, shares, tokens = (16,), (0, 4, 16), tokens[:1]
    if settings.grid == "tiny":
        K, N, M, dtype, r, ranks, shares, tokens = 32, 48, 24, "fp32", 4, (2, 4), (0, 4), (8, 24)
    points = [("active", Shape(K, N, M, r, active, 16, dtype)) for active in shares]
    points += [("rank", Shape(K, N, M, rank, dtype=dtype)) for rank in ranks]
    return points + [("tokens", Shape(K, N, tokens_, r, dtype=dtype)) for tokens_ in tokens]


def measure(point: tuple[str, Shape], settings: Settings, roofline: dict[str, Any], case: str) -> list[Row]:
    """The rows of a point."""
    curve, shape = point
    names = list(IMPLEMENTATIONS)
    if case == "scaling":
        # "auto" is "torch" on a CPU.
        names = [name for name in CURVES if settings.on_gpu or name in (FROZEN, "slora, torch")]
    elif settings.grid == "tiny" or (settings.on_gpu and settings.grid != "full"):
        # Its compiler takes longer than all the rest of a point.
        names.remove("PEFT, compiled")
    with measuring({**({"curve": curve} if curve else {}), **shape.point}, names, settings) as rows:
        fill(rows, shape, settings, roofline, case == "scaling")
    return list(rows.values())


def fill(rows: dict[str, Row], shape: Shape, settings: Settings, roofline: dict[str, Any], scaling: bool) -> None:
    """Check the implementations, time those that are right, and set the times beside the roofline and the floor."""
    element = 4 if shape.dtype == "fp32" else 2
    sets = 2 if settings.grid == "tiny" else input_sets(shape.M * (shape.K + shape.N) * element)
    problem, layers = Problem(shape, settings.device, sets), dict[str, Layer]()
    for name, row in rows.items():
        with reason_in(row):
            layer = IMPLEMENTATIONS[name](problem)
            row.update(checked(layer, problem), input_sets=sets)
            layers[name] = layer
    for measure in ["forward"] * (not scaling) + ["forward_backward"] + ["eager"] * settings.on_gpu:
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
        row = rows[name]
        seconds, moved = row["forward_backward"]["median"], None
        if layer.algorithm is not None:
            share = shape.share if layer.updates else 1.0
            moved = counting.bytes_moved(layer.algorithm, shape.M, shape.N, shape.K, element, share)
            row.update(form=layer.algorithm, bytes=moved)
        if "flops" in row:
            row.update(counting.beside_roofline(roofline, shape.dtype, seconds, row["flops"], moved))
        if frozen and layer.updates:
            beside_frozen(row, frozen, roofline, scaling)


def beside_frozen(row: Row, frozen: Row, roofline: dict[str, Any], scaling: bool) -> None:
    """Set the time of a row beside the floor, and on a curve beside what the cost model predicts."""
    measured, active = row["forward_backward"], not row["point"]["active"].startswith("0")
    if scaling and "form" in row:
        predicted = counting.predicted_seconds(frozen["median"], row["form"], row["point"], roofline)
        row.update(predicted=predicted, deviation=measured["median"] / predicted - 1)
        if active:
            # Round by round: both were taken within moments of each other.
            beyond = [own - limit for own, limit in zip(measured["values"], frozen["values"], strict=True)]
            row["update_seconds"] = spread(beyond)
            row["update_deviation"] = row["update_seconds"]["median"] / (predicted - frozen["median"]) - 1
    if active:
        floor = counting.predicted_seconds(frozen["median"], "fused", row["point"], roofline)
        over = (measured["median"] - frozen["median"]) / (floor - frozen["median"])
        row.update(floor_seconds=floor, over_floor=over, of_floor=floor / measured["median"])


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
    layer.algorithm = taken_algorithm(lambda: layer.trained(x, dy)) or layer.algorithm
    # The counter does not see what a compiler has put together.
    if not hasattr(layer.forward, "_orig_mod"):
        result["flops"] = count_flops(lambda: layer.counted(x, dy))
    if problem.device == "cuda":
        low_rank = 2 * problem.shape.M * problem.shape.active * problem.shape.r * problem.dtype.itemsize
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        for context in (nullcontext, slora.gates_on_device):
            with context():
                layer.trained(x, dy)
        torch.cuda.synchronize()
        added = torch.cuda.max_memory_allocated() - before
        result["peak_over_outputs"] = added / (outputs + low_rank * layer.updates)
    return result
