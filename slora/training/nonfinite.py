"""After a loss that is not finite: where the value comes from, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slora.errors import NonFiniteLossError
from slora.module_tree.wrappers import named_parameters
from slora.runs.checkpoint_folders import before

# Parameters of adapted layers: trained, though they may be frozen later.
_TRAINED = ("lora_A", "lora_B", "gate", "rank_gate")


class Origin(NamedTuple):
    """The first value that is not finite."""

    what: str
    """A clause that names it; empty if everything is finite."""
    remedy: str
    """What to change before the run is started again; empty if training itself produced the value."""


def origin(model: nn.Module, inputs: Tensor) -> Origin:
    """Run `model(inputs)` once more and return where a value is first not finite.

    That is in the inputs, in a parameter of the first layer whose output is not finite, or in that layer's output. The
    model runs in its present mode and with its present weights, which later steps may have changed.
    """
    if not _is_finite(inputs):
        rows = [i for i, entry in enumerate(inputs) if not _is_finite(entry)]
        others = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        what = f"the batch itself holds a value that is not finite, in item {rows[0]}{others} of {len(inputs)}"
        return Origin(what, "correct the data, or remove such items")
    found: list[Origin] = []

    def watch(name: str, module: nn.Module) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not found and not all(map(_is_finite, _tensors(output))):
                found.append(_described(name, module, all(map(_is_finite, _tensors(args)))))

        # Inner modules return before outer ones, so the first one found is the innermost.
        return module.register_forward_hook(note)

    hooks = [watch(name, module) for name, module in model.named_modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[inputs.device] if inputs.is_cuda else []):
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else Origin("", "")


def ruined_gates(gates: Mapping[str, Sequence[float]]) -> str:
    """Return the names of layers with a gate that is not finite, up to three of them; empty if there is none."""
    ruined = [name for name, values in gates.items() if not all(map(math.isfinite, values))]
    others = f" and {len(ruined) - 3} more layers" if len(ruined) > 3 else ""
    return ", ".join(map(repr, ruined[:3])) + others


def ruined_parameter(model: nn.Module) -> str:
    """Return the name of the first trainable parameter that is not finite; empty if there is none."""
    ruined = (name for name, p in named_parameters(model) if p.requires_grad and not _is_finite(p))
    return next(ruined, "")


def run_error(what: str, remedy: str, last: Path | None, start: Path | None, lr: float) -> NonFiniteLossError:
    """Return the error that ends a run: what is not finite, and what to do.

    Args:
        remedy: what to change; empty where a lower learning rate than `lr` may help.
        last: the newest checkpoint of the run, or `start`.
        start: the checkpoint that the run resumed from.
    """
    if remedy:
        then = f"resume from {last}" if last else "start again: no checkpoint was written before it"
        return NonFiniteLossError(f"{what}; {remedy}, then {then}. Nothing was overwritten.", diverged=False)
    return NonFiniteLossError(f"{what} (learning rate {lr:.3g}); {_advice(last, start)}. Nothing was overwritten.")


def _advice(last: Path | None, start: Path | None) -> str:
    if last is None:
        return "no checkpoint was written before it; start again with a lower lr, or a longer warmup"
    if last != start:
        return f"the last good checkpoint is {last}; resume from it with a lower lr"
    # Diverging weights are finite for a while, and saved as such.
    earlier = before(last)
    back = f"go back to the one before it, {earlier}" if earlier else "start again"
    return (
        f"no checkpoint was written since {last}; resume from it with a lower lr. If that does not help, this "
        f"checkpoint itself may be from a diverging run: {back}"
    )


def _described(name: str, module: nn.Module, from_finite: bool) -> Origin:
    label = f"{name!r} ({type(module).__name__})" if name else f"the {type(module).__name__} itself"
    parameters = dict(module.named_parameters(recurse=not name))
    ruined = [key for key, parameter in parameters.items() if not _is_finite(parameter)]
    text = f"the first layer whose output is not finite is {label}"
    if ruined:
        frozen = not parameters[ruined[0]].requires_grad and ruined[0].rpartition(".")[2] not in _TRAINED
        if frozen:
            remedy = "it is frozen, so training did not change it: load a base model with finite weights"
            return Origin(f"{text}, whose parameter {ruined[0]!r} is not finite", remedy)
        return Origin(f"{text}, whose parameter {ruined[0]!r} is not finite now", "")
    return Origin(text if from_finite else f"{text}, whose input is already not finite", "")


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (list, tuple)):
        for entry in value:
            yield from _tensors(entry)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))


def _is_finite(value: Tensor) -> bool:
    return bool(torch.isfinite(value.detach()).all())
