"""Where in a model a value that is not finite comes from: asked once, when a run has broken off."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn


def origin(model: nn.Module, inputs: Tensor) -> str:
    """Run `model(inputs)` once more and return what is not finite first, as a clause; empty where all is finite.

    That is the inputs, a parameter of the first layer whose output is not finite, or that layer itself. The model is
    run in its present mode and with its present weights, which later steps may have changed.
    """
    if not _is_finite(inputs):
        return "the batch itself holds a value that is not finite"
    found: list[str] = []

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
    return found[0] if found else ""


def _described(name: str, module: nn.Module, from_finite: bool) -> str:
    label = f"{name!r} ({type(module).__name__})" if name else f"the {type(module).__name__} itself"
    ruined = [key for key, parameter in module.named_parameters(recurse=not name) if not _is_finite(parameter)]
    text = f"the first layer whose output is not finite is {label}"
    if ruined:
        return f"{text}, whose parameter {ruined[0]!r} is not finite by now"
    return text if from_finite else f"{text}, whose input is not finite already"


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
