"""An adapted model for the tests of rules of gates."""

from __future__ import annotations

from typing import Any

import pytest
from torch import nn

import slora


@pytest.fixture
def model(make_mlp: Any) -> nn.Module:
    """Two adapted layers of width 6."""
    return slora.inject(make_mlp(6, 6, 6), slora.SelectiveLoRAConfig(r=2, target_modules=r"fc\d+"))
