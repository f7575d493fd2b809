"""An adapted model for the tests of what one asks of a whole model."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import slora


@pytest.fixture
def model(vit: nn.Module, randomise: Any) -> nn.Module:
    """The ViT with random B, all blocks active."""
    return randomise(slora.inject(vit, slora.SelectiveLoRAConfig(r=2, modules_to_save=["head"])))
