"""What the tests of strategies share: which blocks are on, and a short training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slora

Make = Callable[..., nn.Module]
Batch = tuple[Tensor, Tensor]
N = 6
NAMES = ["first", "qkv", "qkv", "qkv", "last", "tall"]


def count(model: nn.Module) -> int:
    return sum(int(on.sum()) for on in slora.active_blocks(model).values())


def flags(model: nn.Module) -> list[bool]:
    return torch.cat(list(slora.active_blocks(model).values())).tolist()


def run(model: nn.Module, selection: Any, batch: Batch, steps: int, lr: float = 0.01) -> list[int]:
    """Train and return the number of active blocks after each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    counts = []
    for _ in range(steps):
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        selection.step()
        counts.append(count(model))
    return counts
