"""Small adapters, changes that damage their files, and the check that loading them is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slora
from slora.layers import adapted_layers
from tests.adapters.adapter_files import edit_tensors
from tests.mutations.adapters import CONFIG, differences, plain, snapshot
from tests.mutations.limits import limited


def trained(seed: int = 1, model: nn.Module | None = None, **settings: Any) -> nn.Module:
    """An adapted model in which the second block of qkv is off."""
    fields = {**CONFIG.to_dict(), **settings}
    model = slora.inject(plain() if model is None else model, slora.SelectiveLoRAConfig(**fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator))
        model.qkv.gate.copy_(torch.tensor([0.3, 0.05, 0.2]))
    return model


def edit_tensor(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Change one tensor."""
    edit_tensors(folder, lambda tensors: tensors.update({name: change(tensors[name]).contiguous()}))


def refused(folder: Path, *texts: str, model: nn.Module | None = None) -> None:
    """Loading raises an error that says `texts` within seconds, and plain and adapted models are what they were."""
    for target in [plain(), slora.inject(plain(), CONFIG)] if model is None else [model]:
        before = snapshot(target)
        with pytest.raises(slora.SLoRAError) as raised, limited(5):
            slora.load_adapter(target, folder)
        assert not differences(before, snapshot(target))
        for text in texts:
            assert text in str(raised.value)
