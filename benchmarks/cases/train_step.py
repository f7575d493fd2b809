"""One training step of a whole model: forward, loss, backward and the optimizer's step.

A `probe` contender probes every tenth step: its measurements are whole cycles of ten steps, divided by ten. Modes on a
GPU: "eager", "graph" (the step as one CUDA graph) and "compile" (the forward and loss under torch.compile). There,
`peak_memory_mib` is what the step has allocated at its peak, parameters included. `flops` are counted over real steps,
`compulsory_bytes` are what `counting.Compulsory` says, no measured traffic; both are means over a whole cycle.
"""

from __future__ import annotations

import gc
import statistics
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch

import slora
from benchmarks import counting
from benchmarks.contenders.model import CONTENDERS, RANK, Step, dtype_of
from benchmarks.contenders.peers import Missing
from benchmarks.models import Model, find, randomise_updates
from benchmarks.record import BenchmarkError, spread
from benchmarks.settings import Settings
from benchmarks.timing import first_line, interleaved, rotation

LEFT_TO_GATES = "slora, few active, exact"
USUAL = [name for name in CONTENDERS if name != LEFT_TO_GATES]
# Where the point is the model and not the contender.
MAIN = ["frozen, dx everywhere", "full", "PEFT, all", "slora, all active", "slora, few active, frozen"]
COMPILED = ["frozen, dx everywhere", "PEFT, all", "slora, all active"]
# A captured step is the same at every replay, so a probe every tenth step is not in it.
CAPTURED = [name for name in USUAL if "probe" not in name]

Point = tuple[str, int, str, str, list[str]]


def grid(settings: Settings) -> list[Point]:
    """`(model, batch, precision, mode, contenders)` in the order in which they matter."""
    if settings.grid == "tiny":
        return [("tiny", 2, precision, "eager", USUAL) for precision in ("fp32", "bf16", "amp")] + [
            ("tiny-llama", 2, "fp32", "eager", MAIN),
            ("tiny", 2, "fp32", "compile", COMPILED[:1]),
        ]
    if not settings.on_gpu:
        if settings.grid == "quick":
            return [("vit-s", 2, "fp32", "eager", USUAL)]
        points: list[Point] = [("vit-s", 16, precision, "eager", USUAL) for precision in ("fp32", "bf16", "amp")]
        return points + ([("vit-s", 16, "fp32", "compile", COMPILED)] if settings.grid == "full" else [])
    points = [("vit-b", 256, "bf16", "eager", USUAL), ("vit-b", 256, "bf16", "graph", CAPTURED)]
    if settings.grid == "quick":
        return points[:1]
    points += [
        ("vit-l", 128, "bf16", "graph", MAIN),
        ("clip", 256, "bf16", "eager", MAIN),
        ("llama-1b", 8, "bf16", "eager", MAIN),
        ("vit-b", 256, "amp", "eager", MAIN),
        ("vit-b", 256, "bf16", "compile", COMPILED),
    ]
    if settings.grid == "full":
        points += [("vit-b", 32, "bf16", mode, MAIN) for mode in ("eager", "graph")]
        points += [("vit-l", 128, precision, "eager", USUAL) for precision in ("bf16", "amp", "fp32")]
        points += [("llama-1b", 8, "bf16", mode, COMPILED) for mode in ("graph", "compile")]
        points += [("clip", 256, "bf16", mode, COMPILED) for mode in ("graph", "compile")]
    return points


def run(settings: Settings, ceilings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of every point; stops between two points when the time is up."""
    for name, batch, precision, mode, contenders in grid(settings):
        if settings.stop():
            return
        yield from measure(settings, ceilings, name, batch, precision, mode, contenders)


def measure(
    settings: Settings, ceilings: dict[str, Any], name: str, batch: int, precision: str, mode: str,
    contenders: Sequence[str],
) -> list[dict[str, Any]]:  # fmt: skip
    """Check the model, then time its contenders in turns."""
    model = find(name)
    wanted = [contender for contender in contenders if settings.wanted(contender)]
    if not wanted:
        return []
    point = {"model": model.name, "batch": batch, "r": RANK, "precision": precision, "mode": mode}
    rows: dict[str, dict[str, Any]] = {c: {"point": point, "contender": c} for c in wanted}
    try:
        check_outputs(model, settings.device)
    except Missing as reason:
        return [{**row, "skipped": str(reason)} for row in rows.values()]
    inputs = [model.inputs(batch, settings.device, dtype_of(precision))]
    steps: dict[str, Step] = {}
    besides: dict[str, int] = {}
    for contender in wanted:
        try:
            step = Step(
                CONTENDERS[contender], model, inputs[0], precision, settings.device, mode == "compile", mode == "graph"
            )
            step()
            steps[contender] = step
        except Missing as reason:
            rows[contender]["skipped"] = str(reason)
            continue
        except Exception as error:
            rows[contender]["failed"] = first_line(error)
            continue
        try:
            flops, moved = step.counted()
            rows[contender].update(
                flops=round(flops / step.count),
                compulsory_bytes=round(statistics.fmean(one.moved for one in moved)),
            )
            besides[contender] = min(one.beside_inputs for one in moved)
        except Exception as error:
            # Its time is worth having all the same.
            rows[contender]["not_counted"] = first_line(error)
    if settings.on_gpu:
        for contender, step in steps.items():
            rows[contender]["peak_memory_mib"] = peak_memory(step, [s for s in steps.values() if s is not step])
    turns = rotation(sum(t.nbytes for t in inputs[0]), settings.device, min(besides.values(), default=0),
                     settings.most_inputs)  # fmt: skip
    inputs += [model.inputs(batch, settings.device, dtype_of(precision)) for _ in range(turns.sets - 1)]
    rounds = settings.repetitions(11 if settings.on_gpu else 15)
    taken = interleaved(
        {c: step.calls(inputs) for c, step in steps.items()},
        settings.device,
        rounds,
        mode == "graph",
        seconds=settings.at_most(150.0),
    )
    for contender, (seconds, contestant) in taken.items():
        per_step = [value / steps[contender].count for value in seconds]
        row = rows[contender]
        row.update(seconds=spread(per_step), clock=contestant.clock, **turns.row)
        row.update(counting.beside_time_of(row, ceilings, "bf16" if precision == "amp" else precision))
        kind, each = model.items
        row[f"{kind}_per_second"] = batch * each / row["seconds"]["median"]
        if contestant.reason:
            row["not_captured"] = contestant.reason
    del steps, taken, inputs
    gc.collect()
    if settings.on_gpu:
        torch._dynamo.reset()
        torch.cuda.empty_cache()
    print(f"  {model.name} {precision} {mode}", file=sys.stderr, flush=True)
    return list(rows.values())


def peak_memory(step: Step, others: Sequence[Step]) -> float:
    """MiB that this contender has allocated at its peak: all there is, less what only the others hold."""
    torch.cuda.synchronize()
    own = step.storages()
    held = sum(size for other in others for address, size in other.storages().items() if address not in own)
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / 2**20


def check_outputs(model: Model, device: str) -> None:
    """Refuse to time a model whose adapted output is wrong, in fp32.

    At first it has to be the base model's (on the CPU bit for bit), and after random updates that of the base with
    `W + c B A` in place of `W`.

    Raises:
        BenchmarkError: it is not; nothing was timed.
    """
    torch.manual_seed(0)
    net = model.build(device).eval()
    inputs = model.inputs(2, device, torch.float32)
    with torch.no_grad():
        expected = model.forward(net, inputs)
        slora.inject(net, slora.SelectiveLoRAConfig(r=min(RANK, 4)))
        first = model.forward(net, inputs)
        randomise_updates(net)
        found = model.forward(net, inputs)
        weights = {layer: layer.merged_weight() for _, layer in slora.gate.adapted_layers(net)}
        with slora.disabled(net):
            for layer, weight in weights.items():
                layer.replace_base_weight(weight)
            exact = model.forward(net, inputs)
    error, moved = float((found - exact).norm()), float((exact - expected).norm())
    same = torch.equal(expected, first) if device == "cpu" else float((expected - first).norm()) <= 1e-3 * moved
    if not same:
        raise BenchmarkError(f"{model.name}: the adapted model does not compute what its base does; nothing was timed")
    # Both sum in fp32, in another order: their difference is far below what the updates change.
    if not error <= 1e-3 * moved:
        raise BenchmarkError(
            f"{model.name}: with updates the output is off by {error:.2g}, where they change it by {moved:.2g}; "
            f"nothing was timed"
        )
