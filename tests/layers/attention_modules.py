"""Attention modules for tests, PyTorch's and open_clip's, and inputs of theirs."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slora
from slora.layers import adapted_layers

E, H, B, L, S = 24, 4, 3, 7, 5


def attention(**options: Any) -> nn.MultiheadAttention:
    base = nn.MultiheadAttention(E, H, **{"batch_first": True, **options})
    if base.in_proj_bias is not None:
        nn.init.normal_(base.in_proj_bias)
        nn.init.normal_(base.out_proj.bias)
    return base


def adapt(base: nn.Module, trained: bool = False, out_proj: bool = True, **config: Any) -> nn.Module:
    """An adapted copy of `base`, its output projection included."""
    holder = nn.Sequential()
    holder.add_module("attn", copy.deepcopy(base))
    targets = ["attn", "attn.out_proj"] if out_proj else ["attn"]
    slora.inject(holder, slora.SelectiveLoRAConfig(**{"r": 3, "target_modules": targets, **config}))
    if trained:
        for _, layer in adapted_layers(holder):
            nn.init.normal_(layer.lora_B, std=0.3)
    return holder.attn


def inputs(kind: str, batch_first: bool, batched: bool) -> tuple[Tensor, Tensor, Tensor]:
    def make(length: int) -> Tensor:
        if not batched:
            return torch.randn(length, E)
        return torch.randn(B, length, E) if batch_first else torch.randn(length, B, E)

    query = make(L)
    if kind == "self":
        return query, query, query
    key = make(S)
    return (query, key, key) if kind == "key is value" else (query, key, make(S))


def assert_same(one: tuple[Tensor, Tensor | None], two: tuple[Tensor, Tensor | None]) -> None:
    assert torch.equal(one[0], two[0])
    assert (one[1] is None) == (two[1] is None)
    assert one[1] is None or torch.equal(one[1], two[1])


def open_clip_attention(**options: Any) -> nn.Module:
    transformer = pytest.importorskip("open_clip.transformer")
    base = transformer.Attention(E, H, **options)
    nn.init.normal_(base.in_proj_bias)
    return base
