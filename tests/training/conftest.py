"""A model of three linear layers and a head, and data that it can learn, small enough for hundreds of runs."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from slora.training import TrainSettings


class TinyNet(nn.Module):
    """Images [n, 1, 4, 4] to logits [n, 4]."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(16, 24)
        self.norm = nn.BatchNorm1d(24)
        self.second = nn.Linear(24, 24)
        self.third = nn.Linear(24, 16)
        self.head = nn.Linear(16, 4)

    def forward(self, images: Tensor) -> Tensor:
        hidden = self.norm(self.first(images.flatten(1))).relu()
        return self.head(self.third(self.second(hidden).relu()).relu())


@pytest.fixture
def make_model() -> Callable[[], TinyNet]:
    """A factory of equal models."""

    def make() -> TinyNet:
        with torch.random.fork_rng():
            torch.manual_seed(7)
            return TinyNet()

    return make


@pytest.fixture
def data() -> tuple[Tensor, Tensor]:
    """64 images whose labels follow from their first pixels."""
    generator = torch.Generator().manual_seed(3)
    images = torch.rand(64, 1, 4, 4, generator=generator)
    return images, (images[:, 0, 0, 0] > 0.5).long() * 2 + (images[:, 0, 0, 1] > 0.5).long()


@pytest.fixture
def settings() -> TrainSettings:
    """A short run on the CPU that writes nothing it is not asked for."""
    return TrainSettings(
        r=2,
        lora_alpha=4,
        max_steps=12,
        batch_size=8,
        num_workers=0,
        device="cpu",
        precision="fp32",
        log_every=2,
        tensorboard=False,
        count_flops=False,
        probe_every=2,
        probe_rows=4,
    )
