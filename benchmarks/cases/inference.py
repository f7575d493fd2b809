"""A forward without gradients: the base model, merged and unmerged, by slora and by PEFT.

`flops` are counted over a real forward; `compulsory_bytes` are weights, input and output, each once
(`counting.Compulsory`), no measured traffic.

Before any is timed, each output is compared with that of the base model with `W + c B A` in place of `W`, computed in a
wider dtype (`contenders/exact.py`), on the batches of `train_step.mistake_in`. The updates are so large that one that
is left out is refused in bf16, too.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

import slora
from benchmarks import counting
from benchmarks.cases import train_step
from benchmarks.contenders.exact import Truth, output_mistake
from benchmarks.contenders.model import RANK, with_peft, with_slora
from benchmarks.models import Inputs, Model, find, randomise_updates
from benchmarks.results import Settings, reason_in, spread
from benchmarks.roofline import DTYPES
from benchmarks.timing import Call, first_line, interleaved, release, rotation


def _merged(net: nn.Module) -> nn.Module:
    return slora.merge_and_unload(net)


def _peft_merged(net: nn.Module) -> nn.Module:
    merged: nn.Module = net.merge_and_unload()  # type: ignore[operator]
    return merged


def _as_it_is(net: nn.Module) -> nn.Module:
    return net


def _base(model: Model, net: nn.Module, precision: str) -> nn.Module:
    return net


CONTENDERS: dict[str, tuple[Callable[..., nn.Module], Callable[[nn.Module], nn.Module]]] = {
    "base": (_base, _as_it_is),
    "slora, merged": (with_slora("all", "frozen"), _merged),
    "slora, all active": (with_slora("all", "frozen"), _as_it_is),
    "slora, few active": (with_slora("few", "frozen"), _as_it_is),
    "slora, none active": (with_slora("none", "frozen"), _as_it_is),
    "PEFT, merged": (with_peft(few=False), _peft_merged),
    "PEFT, unmerged": (with_peft(few=False), _as_it_is),
}


def grid(settings: Settings) -> list[tuple[str, int, str]]:
    """`(model, batch, dtype)`."""
    if settings.grid == "tiny":
        return [("tiny", 2, "fp32"), ("tiny", 2, "bf16")]
    if not settings.on_gpu:
        return [("vit-s", 2, "fp32")] if settings.grid == "quick" else [("vit-s", 16, "fp32"), ("vit-s", 16, "bf16")]
    points = [("vit-b", 256, "bf16")]
    return points if settings.grid == "quick" else [*points, ("vit-l", 256, "bf16"), ("vit-b", 1, "bf16")]


def run(settings: Settings, ceilings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of every point; stops between two points when the time is up."""
    for name, batch, dtype in grid(settings):
        if settings.stop():
            return
        yield from measure(settings, ceilings, find(name), batch, dtype)


def measure(settings: Settings, ceilings: dict[str, Any], model: Model, batch: int, dtype: str) -> list[dict[str, Any]]:
    """Check every output, then time the forwards of those that are right in turns."""
    point = {"model": model.name, "batch": batch, "r": RANK, "dtype": dtype}
    rows: dict[str, dict[str, Any]] = {n: {"point": point, "contender": n} for n in CONTENDERS if settings.wanted(n)}
    if not rows:
        return []
    with reason_in(*rows.values()):
        contest(settings, ceilings, model, batch, dtype, rows)
    release(settings.device)
    print(f"  {model.name} batch {batch} {dtype}", file=sys.stderr, flush=True)
    return list(rows.values())


def contest(
    settings: Settings, ceilings: dict[str, Any], model: Model, batch: int, dtype: str, rows: dict[str, dict[str, Any]]
) -> None:
    """Fill `rows`, which name the contenders."""
    train_step.refuse_slora(rows, train_step.injection_mistake(model, settings.device))
    inputs = model.inputs(batch, settings.device, DTYPES[dtype])
    nets = {name: net for name, row in rows.items() if (net := ready(row, model, dtype, inputs)) is not None}
    besides = [size for name, net in nets.items() for size in count(rows[name], model, net, inputs)]
    turns = rotation(sum(t.nbytes for t in inputs), settings.device, min(besides, default=0), settings.most_inputs)
    sets = [inputs] + [model.inputs(batch, settings.device, DTYPES[dtype]) for _ in range(turns.sets - 1)]
    calls = {name: [forward(model, net, given) for given in sets] for name, net in nets.items()}
    # From here on the calls alone hold a model, so that one that fails is let go.
    nets.clear()
    failed: dict[str, str] = {}
    rounds = settings.repetitions(15)
    taken = interleaved(calls, settings.device, rounds, seconds=settings.at_most(60.0), failed=failed)
    for name, (seconds, contestant) in taken.items():
        kind, each = model.items
        row = rows[name]
        row.update(seconds=spread(seconds), clock=contestant.clock, **turns.row)
        row.update(counting.beside_time_of(row, ceilings, dtype))
        row[f"{kind}_per_second"] = batch * each / row["seconds"]["median"]
        if contestant.reason:
            row["not_captured"] = contestant.reason
    for name, reason in failed.items():
        rows[name] = {"point": rows[name]["point"], "contender": name, "failed": reason}


def ready(row: dict[str, Any], model: Model, dtype: str, inputs: Inputs) -> nn.Module | None:
    """Build a contender and check its output; where there is nothing to be timed, its row says why."""
    if "refused" in row:
        return None
    prepare, finish = CONTENDERS[row["contender"]]
    device = inputs[0].device.type
    torch.manual_seed(0)
    with reason_in(row):
        net = prepare(model, model.build(device).to(DTYPES[dtype]), dtype).eval()
        randomise_updates(net)
        truth = Truth(model, net, dtype, device)
        net = finish(net).eval()
        wrong = train_step.mistake_in(row, model, inputs, DTYPES[dtype], partial(both_ways, truth, net))
        if wrong is None:
            return net
        row["refused"] = wrong
    return None


def both_ways(truth: Truth, net: nn.Module, inputs: Inputs) -> str | None:
    """What is wrong with the output as it is launched, or with the device's own gates, as a CUDA graph has it."""
    wrong = output_mistake(truth, net, inputs)
    with slora.gates_on_device():
        return wrong or output_mistake(truth, net, inputs)


def count(row: dict[str, Any], model: Model, net: nn.Module, inputs: Inputs) -> list[int]:
    """Put FLOPs and bytes into the row; return the memory that a call touches besides its inputs, or nothing."""
    call = forward(model, net, inputs)
    try:
        least = counting.of_forward(net, inputs, call())
        row.update(flops=counting.flops(call), compulsory_bytes=least.moved)
    except Exception as error:
        # Its time is worth having all the same.
        row["not_counted"] = first_line(error)
        return []
    return [least.beside_inputs]


def forward(model: Model, net: nn.Module, inputs: Inputs) -> Call:
    """A forward without gradients: a call to be timed."""

    def call() -> Any:
        with torch.no_grad():
            return model.forward(net, inputs)

    return call
