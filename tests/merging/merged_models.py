"""A ViT with some blocks active, and what of it must come back after a merge."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

import slora
from slora.layers import adapted_layers


def some_active(model: nn.Module, randomise: Any) -> nn.Module:
    randomise(model)
    with torch.no_grad():
        model.get_submodule("blocks.0.attn.qkv").gate.copy_(torch.tensor([0.2, 0.0, 0.1]))
        model.get_submodule("blocks.0.mlp.fc1").gate.fill_(0.0)
        for name, layer in adapted_layers(model):
            if name.startswith("blocks.1") and not name.endswith("proj"):
                layer.gate.fill_(0.05)
    return model


def adapted(vit: nn.Module, randomise: Any, dtype: torch.dtype | None = None, **config: Any) -> nn.Module:
    settings = {"r": 3, "lora_alpha": 4, "base_dtype": dtype, **config}
    return some_active(slora.inject(vit, slora.SelectiveLoRAConfig(**settings)), randomise)


def snapshot(model: nn.Module) -> dict[str, tuple[int, Tensor]]:
    return {name: (p.data_ptr(), p.detach().clone()) for name, p in model.named_parameters()}


def assert_restored(model: nn.Module, before: dict[str, tuple[int, Tensor]]) -> None:
    for name, p in model.named_parameters():
        assert torch.equal(p, before[name][1]), name
    assert not any(
        layer.merged or layer.weight_backup is not None or layer.unmerge_updates for _, layer in adapted_layers(model)
    )
