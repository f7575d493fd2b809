"""Head first: a new head is trained alone, on features computed once, before any block is trained.

The gradients of a random head would disturb the features; after linear probing they disturb them less (linear probing
then fine-tuning, arXiv 2202.10054).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

import torch
from torch import Tensor, nn
from torch.optim import AdamW

from slora.errors import ConfigError
from slora.layers import LoRABlocks
from slora.models.disabled import disabled
from slora.models.features import input_of
from slora.models.logits import logits_of
from slora.models.targets import head_names
from slora.module_tree.modes import evaluating
from slora.module_tree.wrappers import module_at, named_modules

HEAD_LR = 1e-2

# Default number of steps for a new head.
STEPS = 100


def train_head(
    model: nn.Module,
    batches: Iterable[tuple[Tensor, Tensor]],
    steps: int,
    criterion: Callable[[Tensor, Tensor], Tensor],
    seed: int = 0,
    lr: float = HEAD_LR,
    gather: Callable[[Tensor], Tensor] = lambda value: value,
) -> None:
    """Train the head of `model` for `steps` steps of AdamW with a cosine schedule, in place.

    Costs one forward pass over the first `steps` batches, or over all if there are fewer.

    Args:
        model: prepared for training; its blocks do not change.
        batches: `(inputs, labels)` of one pass over the training data, such as a `DataLoader`; on the model's device.
        criterion: `(logits, labels) -> scalar`.
        gather: concatenates a tensor over all processes, such as `accelerate.Accelerator().gather`.

    Raises:
        ConfigError: the model has no single trained head whose output is the model's, or `batches` is empty.
    """
    name = _head_of(model)
    head = module_at(model, name)
    features: list[Tensor] = []
    labels: list[Tensor] = []
    with torch.no_grad(), evaluating(model), disabled(model):
        for images, targets in batches:
            seen, output = input_of(model, name, images)
            if not features and not torch.equal(head(seen), logits_of(output)):
                raise ConfigError(
                    f"training the head first needs a head whose output is the model's, but {type(model).__name__} "
                    f"computes more after {name!r}; switch it off (head_first=0)"
                )
            features.append(gather(seen))
            labels.append(gather(targets))
            if len(features) == steps:
                break
    if not features:
        raise ConfigError("batches is empty, so there is nothing to train the head on; pass a DataLoader or a list")
    size = len(features[0])
    x, y = torch.cat(features), torch.cat(labels)
    optimizer = AdamW([parameter for parameter in head.parameters() if parameter.requires_grad], weight_decay=0.0)
    generator = torch.Generator().manual_seed(seed)
    rows: list[Tensor] = []
    for step in range(steps):
        if not rows:
            rows = list(torch.randperm(len(x), generator=generator).split(size))[: len(x) // size]
        chosen = rows.pop().to(x.device)
        optimizer.param_groups[0]["lr"] = lr * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = criterion(head(x[chosen]), y[chosen])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    optimizer.zero_grad()


def trained_heads(model: nn.Module) -> list[str]:
    """Return the names of the output heads of a prepared model that are trained."""
    return [
        name
        for name in dict.fromkeys(head_names(model))
        if any(parameter.requires_grad for parameter in module_at(model, name).parameters())
    ]


def _head_of(model: nn.Module) -> str:
    # A head of an unusual name is the only module that is trained in full.
    trained = trained_heads(model) or [
        name
        for name, module in named_modules(model)
        if not isinstance(module, LoRABlocks) and any(p.requires_grad for p in module.parameters(recurse=False))
    ]
    if len(trained) != 1:
        raise ConfigError(
            f"training the head first needs one output head that is trained, but {type(model).__name__} has "
            f"{trained or 'none'}; name it in modules_to_save, or switch it off (head_first=0)"
        )
    return trained[0]
