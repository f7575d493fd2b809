"""One training step of a whole model: forward, loss, backward and the optimizer's step.

A `probe` contender probes every tenth step: its measurements are whole cycles of ten steps, divided by ten. Modes on a
GPU: "eager", "graph" (the step as one CUDA graph) and "compile" (the forward and loss under torch.compile). There,
`peak_memory_mib` is what the step has allocated at its peak, parameters included. `flops` are counted over real steps,
`compulsory_bytes` are what `counting.Compulsory` says, no measured traffic; both are means over a whole cycle.

Before any is timed, the loss and all gradients of each contender are compared with `contenders/exact.py`, on a batch of
two (compiled code: on the batch that is timed), and those of slora on a GPU, whose kernels depend on the number of
rows, on the batch that is timed as well. A loss that is not finite at any step is refused afterwards.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch

import slora
from benchmarks import counting
from benchmarks.contenders.exact import Truth, output_mistake, step_mistake
from benchmarks.contenders.model import CONTENDERS, RANK
from benchmarks.contenders.step import Step, dtype_of
from benchmarks.models import Inputs, Model, find, randomise_updates
from benchmarks.results import Settings, reason_in, spread
from benchmarks.timing import Call, first_line, interleaved, release, rotation

LEFT_TO_GATES = "slora, few active, exact"
USUAL = [name for name in CONTENDERS if name != LEFT_TO_GATES]
# Where the point is the model and not the contender.
MAIN = ["frozen, dx everywhere", "full", "PEFT, all", "slora, all active", "slora, few active, frozen"]
COMPILED = ["frozen, dx everywhere", "PEFT, all", "slora, all active"]
# Those of the bars on a GPU.
BARS = ["frozen, dx everywhere", "full", "PEFT, all", "slora, all active", "slora, few active, frozen",
        "slora, none active, frozen"]  # fmt: skip
# A captured step is the same at every replay, so a probe every tenth step is not in it.
CAPTURED = [name for name in USUAL if "probe" not in name]
# The batch on which a result is checked; contrastive losses need two.
CHECKED = 2

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
        compiled = ("fp32", "bf16", "amp") if settings.grid == "full" else ("fp32",)
        return points + [("vit-s", 16, precision, "compile", COMPILED) for precision in compiled]
    bars: list[Point] = [("vit-b", batch, "bf16", mode, BARS) for batch in (64, 256) for mode in ("eager", "graph")]
    if settings.grid == "quick":
        return bars
    points = [
        *bars[:2],
        ("vit-b", 256, "bf16", "eager", USUAL),
        ("vit-b", 256, "bf16", "graph", CAPTURED),
        ("vit-l", 128, "bf16", "graph", MAIN),
        ("clip", 256, "bf16", "eager", MAIN),
        ("llama-1b", 8, "bf16", "eager", MAIN),
        ("vit-b", 256, "amp", "eager", MAIN),
        ("vit-b", 256, "bf16", "compile", COMPILED),
    ]
    if settings.grid == "full":
        points += [("vit-b", 32, "bf16", mode, MAIN) for mode in ("eager", "graph")]
        points += [("vit-l", 128, precision, "eager", USUAL) for precision in ("bf16", "amp", "fp32")]
        points += [("vit-l", 128, "bf16", "compile", COMPILED)]
        points += [("llama-1b", 8, "bf16", mode, COMPILED) for mode in ("graph", "compile")]
        points += [("clip", 256, "bf16", mode, COMPILED) for mode in ("graph", "compile")]
    return points


def run(settings: Settings, ceilings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of every point; stops between two points when the time is up."""
    for name, batch, precision, mode, contenders in grid(settings):
        if settings.stop():
            return
        reason = without_bf16(settings, ceilings) if precision != "fp32" else None
        if reason:
            point = {"model": find(name).name, "batch": batch, "r": RANK, "precision": precision, "mode": mode}
            yield from ({"point": point, "contender": c, "skipped": reason} for c in contenders if settings.wanted(c))
        else:
            yield from measure(settings, ceilings, name, batch, precision, mode, contenders)


def without_bf16(settings: Settings, ceilings: dict[str, Any]) -> str | None:
    """Why steps in bf16 are left out: on a processor that only imitates it they take minutes and tell nothing."""
    rates = ceilings["gemm_flops_per_s"]
    if settings.on_gpu or settings.grid != "default" or rates["bf16"] >= rates["fp32"] / 2:
        return None
    return (
        f"this processor has no arithmetic in bf16: a product runs at {rates['bf16'] / 1e9:.0f} GFLOP/s, "
        f"in fp32 at {rates['fp32'] / 1e9:.0f} (--full measures it all the same)"
    )


def measure(
    settings: Settings, ceilings: dict[str, Any], name: str, batch: int, precision: str, mode: str,
    contenders: Sequence[str],
) -> list[dict[str, Any]]:  # fmt: skip
    """Check every contender, then time those that are right in turns."""
    model = find(name)
    point = {"model": model.name, "batch": batch, "r": RANK, "precision": precision, "mode": mode}
    rows: dict[str, dict[str, Any]] = {c: {"point": point, "contender": c} for c in contenders if settings.wanted(c)}
    if not rows:
        return []
    with reason_in(*rows.values()):
        contest(settings, ceilings, model, batch, precision, mode, rows)
    torch._dynamo.reset()
    release(settings.device)
    print(f"  {model.name} {precision} {mode}", file=sys.stderr, flush=True)
    return list(rows.values())


def contest(
    settings: Settings, ceilings: dict[str, Any], model: Model, batch: int, precision: str, mode: str,
    rows: dict[str, dict[str, Any]],
) -> None:  # fmt: skip
    """Fill `rows`, which name the contenders."""
    refuse_slora(rows, injection_mistake(model, settings.device))
    inputs = model.inputs(batch, settings.device, dtype_of(precision))
    steps = {
        c: step for c, row in rows.items() if (step := ready(row, model, inputs, precision, mode, settings.device))
    }
    besides = [size for c, step in steps.items() for size in count(rows[c], step)]
    if settings.on_gpu:
        weigh(rows, steps)
    turns = rotation(sum(t.nbytes for t in inputs), settings.device, min(besides, default=0), settings.most_inputs)
    sets = [inputs] + [model.inputs(batch, settings.device, dtype_of(precision)) for _ in range(turns.sets - 1)]
    take(steps, sets, settings, rows, mode)
    for row in rows.values():
        if "seconds" in row:
            row.update(turns.row)
            row.update(counting.beside_time_of(row, ceilings, "bf16" if precision == "amp" else precision))
            kind, each = model.items
            row[f"{kind}_per_second"] = batch * each / row["seconds"]["median"]


def ready(row: dict[str, Any], model: Model, inputs: Inputs, precision: str, mode: str, device: str) -> Step | None:
    """Build and check a contender's step and take it once; where there is nothing to be timed, its row says why."""
    if "refused" in row:
        return None
    with reason_in(row):
        step = Step(CONTENDERS[row["contender"]], model, inputs, precision, device, mode == "compile", mode == "graph")
        check = partial(step_mistake, step)
        # Compiled code is for one batch.
        compiled = mode == "compile"
        wrong = check(inputs) if compiled else mistake_in(row, model, inputs, dtype_of(precision), check)
        if step.not_replayed:
            row["checked_as_launched"] = step.not_replayed
        if wrong is None:
            step()
            return step
        row["refused"] = wrong
    return None


def mistake_in(
    row: dict[str, Any], model: Model, inputs: Inputs, dtype: torch.dtype, check: Callable[[Inputs], str | None]
) -> str | None:
    """What `check` says of a batch of two and, where slora's kernels depend on the rows, of `inputs`, which are timed.

    Where the truth of a whole batch does not fit into the GPU, the row says so.
    """
    device = inputs[0].device.type
    wrong = check(model.inputs(CHECKED, device, dtype))
    if wrong or device == "cpu" or not row["contender"].startswith("slora"):
        return wrong
    try:
        wrong = check(inputs)
        return wrong and f"on the batch that is timed {wrong}"
    except torch.cuda.OutOfMemoryError as error:
        row["checked_on_two"] = first_line(error)
    release(device)
    return None


def count(row: dict[str, Any], step: Step) -> list[int]:
    """Put FLOPs and bytes into the row; return the memory that a step touches besides its inputs, or nothing."""
    try:
        flops, moved = step.counted()
    except Exception as error:
        # Its time is worth having all the same.
        row["not_counted"] = first_line(error)
        return []
    row["flops"] = round(flops / step.count)
    row["compulsory_bytes"] = round(statistics.fmean(one.moved for one in moved))
    return [min(one.beside_inputs for one in moved)]


def take(
    steps: dict[str, Step], sets: Sequence[Inputs], settings: Settings, rows: dict[str, dict[str, Any]], mode: str
) -> None:
    """Put the times of `steps` into their rows, and into those of the others why there are none; empties `steps`."""
    rounds = settings.repetitions(11 if settings.on_gpu else 15)
    calls: dict[str, list[Call]] = {contender: [*step.calls(sets)] for contender, step in steps.items()}
    # From here on the calls alone hold a step, so that one that fails is let go.
    counts = {contender: step.count for contender, step in steps.items()}
    steps.clear()
    failed: dict[str, str] = {}
    # Compiling for a CPU takes about as long as this.
    most = settings.at_most(30.0 if mode == "compile" and not settings.on_gpu else 150.0)
    taken = interleaved(calls, settings.device, rounds, mode == "graph", most, failed)
    for contender, (seconds, contestant) in taken.items():
        row = rows[contender]
        diverged = calls[contender][0].step.diverged()  # type: ignore[attr-defined]
        if diverged:
            rows[contender] = {"point": row["point"], "contender": contender, "refused": diverged}
            continue
        row.update(seconds=spread([value / counts[contender] for value in seconds]), clock=contestant.clock)
        if contestant.reason:
            row["not_captured"] = contestant.reason
    for contender, reason in failed.items():
        rows[contender] = {"point": rows[contender]["point"], "contender": contender, "failed": reason}


def weigh(rows: dict[str, dict[str, Any]], steps: dict[str, Step]) -> None:
    """Put the peak memory of every step into its row."""
    for contender, step in steps.items():
        rows[contender]["peak_memory_mib"] = peak_memory(step, [s for s in steps.values() if s is not step])


def peak_memory(step: Step, others: Sequence[Step]) -> float:
    """MiB that this contender has allocated at its peak: all there is, less what only the others hold."""
    torch.cuda.synchronize()
    own = step.storages()
    held = sum(size for other in others for address, size in other.storages().items() if address not in own)
    torch.cuda.reset_peak_memory_stats()
    step()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / 2**20


def refuse_slora(rows: dict[str, dict[str, Any]], wrong: str | None) -> None:
    """Where `wrong` says something, put it into the rows of slora's contenders."""
    for contender, row in rows.items():
        if wrong is not None and contender.startswith("slora"):
            row["refused"] = wrong


def injection_mistake(model: Model, device: str) -> str | None:
    """What is wrong with the output of a model that slora has adapted, in fp32; None where nothing is.

    At first it has to be the base model's (on the CPU bit for bit), and after random updates that of the base with
    `W + c B A` in place of `W`.
    """
    torch.manual_seed(0)
    net = model.build(device).eval()
    inputs = model.inputs(CHECKED, device, torch.float32)
    # With gradients: without them PyTorch's fused attention would add in another order.
    expected = model.forward(net, inputs).detach()
    slora.inject(net, slora.SelectiveLoRAConfig(r=min(RANK, 4)))
    first = model.forward(net, inputs).detach()
    randomise_updates(net)
    wrong = output_mistake(Truth(model, net, "fp32", device), net, inputs)
    moved = float((model.forward(net, inputs).detach() - expected).norm())
    same = torch.equal(expected, first) if device == "cpu" else float((expected - first).norm()) <= 1e-3 * moved
    if not same:
        return "the adapted model does not compute what its base does"
    return wrong and f"with updates in fp32 {wrong}"
