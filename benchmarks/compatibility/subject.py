"""What is examined: a model with random weights, what it is called with, and what it gives back."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slora.layers import LoRABlocks
from slora.models.targets import head_names

BATCH, LARGEST = 2, 150_000_000


class Skip(Exception):
    """Why an architecture cannot be examined, for no fault of slora's."""


class Nothing(Skip):
    """There is no layer to adapt."""


class Subject(NamedTuple):
    """A model with random weights, and what it is called with."""

    name: str
    model: nn.Module
    inputs: tuple[Tensor | None, ...] = ()
    named: dict[str, Tensor] = {}  # noqa: RUF012

    def outputs(self, model: nn.Module) -> list[Tensor]:
        """All floating tensors that `model` returns, without gradients."""
        with torch.no_grad():
            return self.graph(model)

    def graph(self, model: nn.Module) -> list[Tensor]:
        """The same with gradients; a seed makes what is random in it the same each time."""
        torch.manual_seed(0)
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        given = [t.to(dtype) if t is not None and t.is_floating_point() else t for t in self.inputs]
        named = {key: t.to(dtype) if t.is_floating_point() else t for key, t in self.named.items()}
        return list(_floating(model(*given, **named)))


def parameter_count(model: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in model.parameters())


def require_small(name: str, model: nn.Module) -> None:
    """Refuse a model, or its shapes on meta, that this machine would take too long for.

    Raises:
        Skip: it has more than `LARGEST` parameters.
    """
    if parameter_count(model) > LARGEST:
        millions = f"{parameter_count(model) / 1e6:,.0f} M"
        raise Skip(f"{name} has {millions} parameters; at most {LARGEST / 1e6:.0f} M are tried")


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """What "all-linear" should find: linear layers and attention with a common projection, below the head."""
    heads = head_names(model)
    below = {
        n: m for n, m in model.named_modules() if n not in heads and not n.startswith(tuple(f"{h}." for h in heads))
    }
    return {n: m for n, m in below.items() if isinstance(m, nn.Linear) or "in_proj_weight" in m._parameters}


def enliven(model: nn.Module) -> None:
    """Let nothing hide a layer: weights that start constant (zero branches, LayerScale, biases), or that nobody has
    given a value, get values of their own, and batch norms take the statistics of the one batch that there is."""
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    for p in model.parameters():
        if p.is_floating_point() and p.numel() > 1 and not p.min() < p.max():
            p.data.nan_to_num_(0.0).add_(torch.randn_like(p), alpha=0.1 if p.dim() == 1 else 0.02)


def _floating(output: Any) -> Iterable[Tensor]:
    if isinstance(output, Tensor):
        if output.is_floating_point() and output.numel():
            yield output
    elif isinstance(output, dict | list | tuple):
        for part in output.values() if isinstance(output, dict) else output:
            yield from _floating(part)


def elsewhere(model: nn.Module) -> dict[str, float]:
    """What holds the parameters that are not adapted: their share by the class of the module, largest first."""
    count: Counter[str] = Counter()
    for module in model.modules():
        own = module.named_parameters(recurse=False)
        base = sum(p.numel() for name, p in own if name not in ("lora_A", "lora_B", "gate"))
        count["" if isinstance(module, LoRABlocks) else type(module).__name__] += base
    total = count.total()
    return {name: round(n / total, 4) for name, n in count.most_common() if name and n >= 0.05 * total}
