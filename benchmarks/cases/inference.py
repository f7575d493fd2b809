"""A forward without gradients: the base model, merged and unmerged, by slora and by PEFT.

`flops` are counted over a real forward; `compulsory_bytes` are weights, input and output, each once
(`counting.Compulsory`), no measured traffic.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

import slora
from benchmarks import counting
from benchmarks.cases import train_step
from benchmarks.contenders.model import RANK, with_peft, with_slora
from benchmarks.contenders.peers import Missing
from benchmarks.models import Model, find, randomise_updates
from benchmarks.record import spread
from benchmarks.settings import DTYPES, Settings
from benchmarks.timing import first_line, interleaved, rotation


def _merged(net: nn.Module) -> nn.Module:
    return slora.merge_and_unload(net)


def _peft_merged(net: nn.Module) -> nn.Module:
    merged: nn.Module = net.merge_and_unload()  # type: ignore[operator]
    return merged


def _as_it_is(net: nn.Module) -> nn.Module:
    return net


def _base(model: Model, net: nn.Module, pure: bool) -> nn.Module:
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
    """Check the outputs against each other, then time the forwards in turns."""
    wanted = {name: how for name, how in CONTENDERS.items() if settings.wanted(name)}
    if not wanted:
        return []
    point = {"model": model.name, "batch": batch, "r": RANK, "dtype": dtype}
    rows: dict[str, dict[str, Any]] = {name: {"point": point, "contender": name} for name in wanted}
    train_step.check_outputs(model, settings.device)
    nets: dict[str, nn.Module] = {}
    for name, (prepare, finish) in wanted.items():
        torch.manual_seed(0)
        try:
            net = prepare(model, model.build(settings.device).to(DTYPES[dtype]), dtype != "fp32")
            randomise_updates(net)
            nets[name] = finish(net).eval()
        except Missing as reason:
            rows[name]["skipped"] = str(reason)
        except Exception as error:
            rows[name]["failed"] = first_line(error)
    inputs = [model.inputs(batch, settings.device, DTYPES[dtype])]
    for name in disagreeing(model, nets, inputs[0], dtype):
        rows[name]["refused"] = f"its output is not that of {TWINS[name]!r}"
        del nets[name]

    def forward(net: nn.Module, given: Any) -> Callable[[], Any]:
        def call() -> Any:
            with torch.no_grad():
                return model.forward(net, given)

        return call

    besides = {}
    for name, net in nets.items():
        call = forward(net, inputs[0])
        try:
            least = counting.of_forward(net, inputs[0], call())
            rows[name].update(flops=counting.flops(call), compulsory_bytes=least.moved)
            besides[name] = least.beside_inputs
        except Exception as error:
            # Its time is worth having all the same.
            rows[name]["not_counted"] = first_line(error)
    turns = rotation(sum(t.nbytes for t in inputs[0]), settings.device, min(besides.values(), default=0),
                     settings.most_inputs)  # fmt: skip
    inputs += [model.inputs(batch, settings.device, DTYPES[dtype]) for _ in range(turns.sets - 1)]
    calls = {name: [forward(net, given) for given in inputs] for name, net in nets.items()}
    taken = interleaved(calls, settings.device, settings.repetitions(15), seconds=settings.at_most(60.0))
    for name, (seconds, contestant) in taken.items():
        kind, each = model.items
        row = rows[name]
        row.update(seconds=spread(seconds), clock=contestant.clock, **turns.row)
        row.update(counting.beside_time_of(row, ceilings, dtype))
        row[f"{kind}_per_second"] = batch * each / row["seconds"]["median"]
        if contestant.reason:
            row["not_captured"] = contestant.reason
    del nets, calls, taken, inputs
    gc.collect()
    if settings.on_gpu:
        torch.cuda.empty_cache()
    print(f"  {model.name} batch {batch} {dtype}", file=sys.stderr, flush=True)
    return list(rows.values())


# Who has to agree with whom: the same updates, merged and not; no update, and the base.
TWINS = {"slora, merged": "slora, all active", "PEFT, merged": "PEFT, unmerged", "slora, none active": "base"}


def disagreeing(model: Model, nets: dict[str, nn.Module], inputs: Any, dtype: str) -> list[str]:
    """Contenders whose output is not that of their twin, by the rounding of the dtype over the model's layers."""
    wrong = []
    unit = torch.finfo(DTYPES[dtype]).eps
    for name, twin in TWINS.items():
        if name in nets and twin in nets:
            with torch.no_grad():
                a, b = (model.forward(nets[n], inputs).double() for n in (name, twin))
            layers = sum(isinstance(module, nn.Linear) for module in nets[name].modules())
            # Each layer rounds its weights and its output once; the errors of layers add like noise.
            if not float((a - b).norm()) <= 4 * unit * layers**0.5 * float(b.norm()):
                wrong.append(name)
    return wrong
