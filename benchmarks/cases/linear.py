"""One linear layer: forward, and forward with backward, in every way that there is, per shape.

`forward` is that of inference, without a graph. `forward_backward` asks for dx and the gradients of everything the
contender trains. On a GPU both are replays of a CUDA graph; `eager` is forward and backward launched from Python.
`peak_over_outputs` is the memory that one forward and backward adds at its peak, over y, S, T and the gradients.

`floor_seconds` is the frozen layer's time with what any update costs beyond it at the ceilings of this run
(`counting.predicted_seconds`). Of the floor's overhead over frozen `over_floor` is the multiple that a contender takes,
`of_floor` the part of the floor's speed-up over whatever it is compared with: the floor's time over its own.
"""

from __future__ import annotations

import itertools
import sys
from collections.abc import Iterator
from contextlib import nullcontext
from typing import Any

import torch

import slora
from benchmarks import counting
from benchmarks.contenders import forms
from benchmarks.contenders.layer import CONTENDERS, FROZEN, PINNED, Layer, Problem, Shape, mistake
from benchmarks.results import Settings, reason_in, spread
from benchmarks.timing import interleaved, release, rotation

SHAPES = [(768, 768), (768, 2304), (768, 3072), (3072, 768), (1024, 4096), (4096, 1024), (1280, 5120), (4096, 4096)]
TOKENS = (3152, 12608, 50432)
RANKS = (4, 16, 64, 128)
# Blocks of the layer, and how many of them are active: 0, 1/16, 1/4 and all.
ACTIVE = {"0": (0, 1), "1/16": (1, 16), "1/4": (4, 16), "1": (1, 1)}
ALL, NONE = ACTIVE["1"], ACTIVE["0"]
# Those of the quick grid on a GPU, which are the bars and every form; nothing waits there for a compiler of a peer.
QUICK = {FROZEN, "slora, auto", *PINNED, "PEFT", "addmm function"}
BAR_SHAPES = [(768, 768), (768, 3072), (3072, 768), (1024, 4096), (4096, 1024), (1280, 5120)]


def shape(K: int, N: int, M: int, r: int = 16, active: tuple[int, int] = ALL, dtype: str = "bf16") -> Shape:
    """A shape by what differs from the usual."""
    return Shape(K, N, M, r, *active, dtype)


def grid(settings: Settings) -> list[Shape]:
    """The points in the order in which they matter: a run that is cut short has the bars."""
    if settings.grid == "tiny":
        return [shape(32, 48, 24, 4, active, dtype) for active in ACTIVE.values() for dtype in ("fp32", "bf16")]
    if settings.grid == "full":
        return [
            shape(K, N, M, r, active, dtype)
            for (K, N), M, r, active, dtype in itertools.product(
                SHAPES, TOKENS, RANKS, ACTIVE.values(), ("bf16", "fp32")
            )
        ]
    if settings.on_gpu:
        bars = [shape(K, N, 50432, active=active) for active in (ALL, NONE) for K, N in BAR_SHAPES]
        if settings.grid == "quick":
            return bars
        rest = [shape(768, 3072, 50432, active=ACTIVE[share]) for share in ("1/16", "1/4")]
        rest += [shape(K, N, 50432) for K, N in SHAPES if (K, N) not in BAR_SHAPES]
        rest += [shape(768, 3072, M) for M in TOKENS[:2]]
        rest += [shape(768, 3072, 50432, r) for r in RANKS if r != 16]
        return bars + rest + [shape(768, 3072, 12608, dtype="fp32")]
    if settings.grid == "quick":
        return [shape(768, 768, 788, active=active, dtype="fp32") for active in (ALL, NONE)]
    shapes = SHAPES[:1] + SHAPES[2:4]
    points = [shape(K, N, 3152, dtype="fp32") for K, N in shapes] + [shape(768, 3072, 3152)]
    points += [shape(768, 3072, 3152, active=ACTIVE[share], dtype="fp32") for share in ("0", "1/16", "1/4")]
    return [*points, shape(768, 3072, 3152, 64, dtype="fp32")]


def run(settings: Settings, ceilings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of every point; stops between two points when the time is up."""
    for point in grid(settings):
        if settings.stop():
            return
        yield from measure(point, settings, ceilings, contenders(settings))
        torch._dynamo.reset()
        release(settings.device)


def contenders(settings: Settings) -> set[str]:
    """Who takes part: on a GPU a compiled PEFT takes longer than all the rest of a point, on a CPU forms are shown."""
    if settings.on_gpu and settings.grid == "quick":
        return QUICK
    left_out = {"PEFT, compiled"} if settings.on_gpu else set(PINNED)
    return set(CONTENDERS) - (left_out if settings.grid not in ("full", "tiny") else set())


def measure(
    point: Shape, settings: Settings, ceilings: dict[str, Any], names: set[str], inference: bool = True
) -> list[dict[str, Any]]:
    """Check the contenders called `names`, then time those that are right; the forward alone if `inference`."""
    wanted = [name for name in CONTENDERS if settings.wanted(name) and name in names]
    if not wanted:
        return []
    rows: dict[str, dict[str, Any]] = {name: {"point": point.point, "contender": name} for name in wanted}
    with reason_in(*rows.values()):
        contest(point, settings, ceilings, rows, inference)
    print(f"  linear {' '.join(f'{k}={v}' for k, v in point.point.items())}", file=sys.stderr, flush=True)
    return list(rows.values())


def contest(
    point: Shape, settings: Settings, ceilings: dict[str, Any], rows: dict[str, dict[str, Any]], inference: bool
) -> None:
    """Fill `rows`, which name the contenders."""
    element = 4 if point.dtype == "fp32" else 2
    turns = rotation(point.M * (point.K + point.N) * element, settings.device, most=settings.most_inputs or 16)
    problem = Problem(point, settings.device, turns.sets)
    layers: dict[str, Layer] = {}
    for name in rows:
        with reason_in(rows[name]):
            layer = CONTENDERS[name](problem)
            rows[name].update(checked(layer, problem))
            if "refused" not in rows[name]:
                layers[name] = layer
    take(layers, problem, settings, rows, inference)
    for name, layer in layers.items():
        row, moved = rows[name], None
        if layer.form is not None:
            share = point.share if layer.updates else 1.0
            moved = counting.bytes_moved(layer.form, point.M, point.N, point.K, element, share)
            row.update(form=layer.form, bytes=moved)
        seconds = row["forward_backward"]["median"]
        row.update(**turns.row, **counting.beside_time(ceilings, point.dtype, seconds, row["flops"], moved))
        if FROZEN in layers and layer.updates and point.active:
            row.update(beside_floor(point, seconds, rows[FROZEN]["forward_backward"]["median"], element, ceilings))


def beside_floor(
    point: Shape, seconds: float, frozen: float, element: int, ceilings: dict[str, Any]
) -> dict[str, float]:
    """The floor at this point, and a time beside it."""
    floor = counting.predicted_seconds(
        frozen, "fused", point.M, point.N, point.K, point.r, point.active, point.share, point.dtype, element, ceilings
    )
    return {
        "floor_seconds": floor, "over_floor": (seconds - frozen) / (floor - frozen), "of_floor": floor / seconds
    }  # fmt: skip


def take(
    layers: dict[str, Layer], problem: Problem, settings: Settings, rows: dict[str, dict[str, Any]], inference: bool
) -> None:
    """Put the times of `layers` into their rows; one that fails leaves `layers`, and its row has the reason alone."""
    rounds = settings.repetitions(31 if settings.on_gpu else 9)
    kinds = [("forward", False, True)] * inference + [("forward_backward", True, True)]
    kinds += [("eager", True, False)] * settings.on_gpu
    for kind, backward, graphs in kinds:
        calls = {name: layer.calls(problem, backward) for name, layer in layers.items()}
        failed: dict[str, str] = {}
        taken = interleaved(calls, settings.device, rounds, graphs, settings.at_most(10.0), failed)
        for name, (seconds, contestant) in taken.items():
            rows[name][kind] = spread(seconds)
            if kind != "eager":
                before = "forward_" * (kind == "forward")
                rows[name][f"{before}clock"] = contestant.clock
                if contestant.reason:
                    rows[name][f"{before}not_captured"] = contestant.reason
        for name, reason in failed.items():
            del layers[name]
            rows[name] = {"point": problem.shape.point, "contender": name, "failed": reason}


def checked(layer: Layer, problem: Problem) -> dict[str, Any]:
    """What one forward and backward says before any is timed: whether it is right, its FLOPs and its memory."""
    exact, wanted, same, outputs = problem.exact(layer.updates), layer.wanted(problem.shape), True, 0
    for how, call in layer.ways(problem).items():
        found = call()
        wrong = mistake(found, exact, wanted)
        if wrong:
            return {"refused": f"{how}{wrong}"}
        again = call()
        same &= all(torch.equal(found[name], again[name]) for name in found)
        outputs = sum(t.nbytes for t in found.values())
    del found, again, call
    x, dy = problem.xs[0], problem.dys[0]
    for context in (nullcontext, slora.gates_on_device):
        # Inference takes paths of its own.
        with context():
            wrong = mistake({"y": layer.inferred(x)}, exact, {"y"})
        if wrong:
            return {"refused": f"without gradients {wrong}"}
    result: dict[str, Any] = {"deterministic": int(same)}
    layer.form = forms.taken_by(lambda: layer.trained(x, dy), problem.device) or layer.form
    compiled = hasattr(layer.forward, "_orig_mod")
    result["flops"] = counting.flops(lambda: layer.counted(x, dy)) if not compiled else plain_flops(problem)
    if problem.device == "cuda":
        kept = 2 * problem.shape.M * problem.shape.active * problem.shape.r * problem.dtype.itemsize
        result["peak_over_outputs"] = added_peak(layer, problem) / (outputs + kept * layer.updates)
    return result


def plain_flops(problem: Problem) -> int:
    """FLOPs of the eager PEFT layer, for the compiled one, whose products the counter does not see."""
    layer = CONTENDERS["PEFT"](problem)
    return counting.flops(lambda: layer.counted(problem.xs[0], problem.dys[0]))


def added_peak(layer: Layer, problem: Problem) -> int:
    """Bytes that one forward and backward adds to what is allocated, at the peak, launched or as a graph has it."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    for context in (nullcontext, slora.gates_on_device):
        with context():
            layer.trained(problem.xs[0], problem.dys[0])
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before
