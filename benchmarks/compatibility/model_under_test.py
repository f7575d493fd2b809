"""A model with random weights: what it is called with, what it returns, and what of it can be adapted."""

from __future__ import annotations

from collections import Counter
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves, tree_map_only

from slora.layers import LoRABlocks
from slora.models.targets import head_names


class Skip(Exception):
    """Why an architecture cannot be checked, through no fault of slora's."""

    verdict = "skipped"


class NothingToAdapt(Skip):
    """There is no linear layer below the head."""

    verdict = "nothing"


class ModelUnderTest(NamedTuple):
    """A model with random weights, and what it is called with."""

    name: str
    model: nn.Module
    inputs: tuple[Tensor, ...] = ()
    named_inputs: dict[str, Tensor] = {}  # noqa: RUF012

    def outputs(self, model: nn.Module, grad: bool = False) -> list[Tensor]:
        """All floating-point tensors that `model` returns. What is random in it has the same seed in every call."""
        torch.manual_seed(0)
        dtype = next(p.dtype for p in model.parameters() if p.is_floating_point())
        inputs, named = tree_map_only(
            Tensor, lambda t: t.to(dtype) if t.is_floating_point() else t, (self.inputs, self.named_inputs)
        )
        with torch.set_grad_enabled(grad):
            found = tree_leaves(model(*inputs, **named))
        return [t for t in found if isinstance(t, Tensor) and t.is_floating_point() and t.numel()]


def parameter_count(model: nn.Module) -> int:
    """The number of parameters."""
    return sum(p.numel() for p in model.parameters())


def linear_layers(model: nn.Module) -> dict[str, nn.Module]:
    """What "all-linear" should find: linear layers and attention with a common projection, below the head."""
    heads = head_names(model)
    return {
        name: module
        for name, module in model.named_modules()
        if (isinstance(module, nn.Linear) or "in_proj_weight" in module._parameters)
        and not any(f"{name}.".startswith(f"{head}.") for head in heads)
    }


def randomize_constants(model: nn.Module) -> None:
    """Give random values to weights that are constant or NaN, such as LayerScale, which would hide a layer's output.

    Batch norms take the statistics of the one batch that there is.
    """
    torch.manual_seed(1)
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.momentum = 1.0
    for p in model.parameters():
        if p.is_floating_point() and p.numel() > 1 and not p.min() < p.max():
            p.data.nan_to_num_(0.0).add_(torch.randn_like(p), alpha=0.1 if p.dim() == 1 else 0.02)


def not_adapted(model: nn.Module) -> dict[str, float]:
    """Which classes of modules hold parameters that are not adapted: the shares of 5 % or more, largest first."""
    count: Counter[str] = Counter()
    for module in model.modules():
        own = module.named_parameters(recurse=False)
        base = sum(p.numel() for name, p in own if name not in ("lora_A", "lora_B", "gate"))
        count["" if isinstance(module, LoRABlocks) else type(module).__name__] += base
    total = count.total()
    return {name: round(n / total, 4) for name, n in count.most_common() if name and n >= 0.05 * total}
