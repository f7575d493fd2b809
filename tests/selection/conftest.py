"""A small adapted model whose blocks have updates of known sizes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import slora


class Net(nn.Module):
    """Rows of 16 numbers to 5 logits; `qkv` gets three blocks, so the model has six."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 16)
        self.qkv = nn.Linear(16, 48)
        self.last = nn.Linear(48, 16)
        self.tall = nn.Linear(16, 64)
        self.head = nn.Linear(64, 5)

    def forward(self, x: Tensor) -> Tensor:
        logits: Tensor = self.head(self.tall(self.last(self.qkv(self.first(x).relu()).relu()).relu()).relu())
        return logits


N = 6


@pytest.fixture
def make() -> Callable[..., nn.Module]:
    """A factory of equal adapted models; with `trained` their blocks have updates."""

    def make(trained: bool = False, **config: object) -> nn.Module:
        torch.manual_seed(3)
        settings = slora.SelectiveLoRAConfig(**{"r": 2, "modules_to_save": ["head"], **config})  # type: ignore[arg-type]
        model = slora.inject(Net(), settings)
        if trained:
            with torch.no_grad():
                for name, parameter in model.named_parameters():
                    if name.endswith("lora_B"):
                        parameter.normal_(std=0.2)
        return model

    return make


@pytest.fixture
def batch() -> tuple[Tensor, Tensor]:
    """Rows and labels."""
    generator = torch.Generator().manual_seed(1)
    return torch.randn(32, 16, generator=generator), torch.randint(5, (32,), generator=generator)
