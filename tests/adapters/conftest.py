"""Models and saved adapters for the tests of adapters."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slora
from tests.adapters import damaged_adapters
from tests.adapters.adapter_files import small


@pytest.fixture
def fresh(vit: nn.Module) -> Callable[[], nn.Module]:
    """Return a builder of the same plain ViT, time and again."""
    return lambda: copy.deepcopy(vit)


@pytest.fixture
def trained(fresh: Any, randomise: Any) -> Callable[..., nn.Module]:
    """Return a builder of that ViT adapted, with random B; in the first layer only k is inactive."""

    def build(**settings: Any) -> nn.Module:
        model = randomise(slora.inject(fresh().eval(), small(**settings)), 0.6)
        with torch.no_grad():
            model.get_submodule("blocks.0.attn.qkv").gate.copy_(torch.tensor([0.3, 0.05, 0.1]))
            model.get_submodule("blocks.1.mlp.fc1").gate.fill_(-0.2)
        return model

    return build


@pytest.fixture
def image() -> Tensor:
    """A batch of two images."""
    return torch.randn(2, 3, 16, 16)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of a small adapter."""
    slora.save_adapter(damaged_adapters.trained(), tmp_path / "adapter")
    return tmp_path / "adapter"
