"""What the tests of rank-wise strategies share: the strategies, and a short training as a user writes it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

import slora
from slora.layers import adapted_layers
from slora.selection import AdaLoRA, CoDyRA, IncreLoRA, RankStrategy, SoRA
from tests.selection.stepping import Batch

Kind = Callable[..., RankStrategy]
KINDS: list[Any] = [SoRA, CoDyRA, AdaLoRA, IncreLoRA]
# Ranks of the six blocks of the tests' net, with r = 4.
TOTAL = 24


def optimizer_of(model: nn.Module, lr: float = 0.01) -> torch.optim.Optimizer:
    return torch.optim.AdamW(slora.parameter_groups(model, lr=lr))


def train(model: nn.Module, selection: Any, optimizer: torch.optim.Optimizer, batch: Batch, steps: int) -> None:
    for _ in range(steps):
        loss = F.cross_entropy(model(batch[0]), batch[1]) + selection.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        selection.step()


def ranks(model: nn.Module) -> list[list[int]]:
    return [layer.block_ranks() for _, layer in adapted_layers(model)]


def count(model: nn.Module) -> int:
    return sum(map(sum, ranks(model)))
