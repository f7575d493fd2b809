"""Where in a model a value that is not finite comes from: asked once, when a run has broken off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

# Of an adapted layer, which are frozen once training has decided on them.
_TRAINED = ("lora_A", "lora_B", "gate")


class Origin(NamedTuple):
    """What is not finite first."""

    what: str
    """A clause; empty where all is finite."""
    remedy: str
    """What has to change before the run can start again; empty where training itself made the value."""


def origin(model: nn.Module, inputs: Tensor) -> Origin:
    """Run `model(inputs)` once more and return what is not finite first.

    That is the inputs, a parameter of the first layer whose output is not finite, or that layer itself. The model is
    run in its present mode and with its present weights, which later steps may have changed.
    """
    if not _is_finite(inputs):
        rows = [i for i, entry in enumerate(inputs) if not _is_finite(entry)]
        others = f" and {len(rows) - 1} more" if len(rows) > 1 else ""
        what = f"the batch itself holds a value that is not finite, in its item {rows[0]}{others} of {len(inputs)}"
        return Origin(what, "correct the data, or leave such items out")
    found: list[Origin] = []

    def watch(name: str, module: nn.Module) -> Any:
        def note(module: nn.Module, args: tuple[Any, ...], output: Any) -> None:
            if not found and not all(map(_is_finite, _tensors(output))):
                found.append(_described(name, module, all(map(_is_finite, _tensors(args)))))

        # Inner modules end before the outer ones, so that the first to tell is the innermost.
        return module.register_forward_hook(note)

    hooks = [watch(name, module) for name, module in model.named_modules()]
    try:
        with torch.no_grad(), torch.random.fork_rng(devices=[inputs.device] if inputs.is_cuda else []):
            model(inputs)
    finally:
        for hook in hooks:
            hook.remove()
    return found[0] if found else Origin("", "")


def _described(name: str, module: nn.Module, from_finite: bool) -> Origin:
    label = f"{name!r} ({type(module).__name__})" if name else f"the {type(module).__name__} itself"
    parameters = dict(module.named_parameters(recurse=not name))
    ruined = [key for key, parameter in parameters.items() if not _is_finite(parameter)]
    text = f"the first layer whose output is not finite is {label}"
    if ruined:
        frozen = not parameters[ruined[0]].requires_grad and ruined[0].rpartition(".")[2] not in _TRAINED
        if frozen:
            remedy = "it is frozen, so training did not do that: load a base model whose weights are finite"
            return Origin(f"{text}, whose parameter {ruined[0]!r} is not finite", remedy)
        return Origin(f"{text}, whose parameter {ruined[0]!r} is not finite by now", "")
    return Origin(text if from_finite else f"{text}, whose input is not finite already", "")


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
