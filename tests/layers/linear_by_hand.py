"""A `SelectiveLoRALinear` for tests, and its output with the weight built by hand."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

from slora.layers import SelectiveLoRALinear


def layer_of(K: int = 10, N: int = 12, trained: bool = True, **settings: Any) -> SelectiveLoRALinear:
    layer = SelectiveLoRALinear(K, N, **{"r": 2, "lora_alpha": 3, "blocks": 3, **settings})
    if trained:
        nn.init.normal_(layer.lora_B)
    return layer


def by_hand(layer: SelectiveLoRALinear, x: Tensor) -> Tensor:
    """`x (W + c B A).T + b` in fp64, with the weight built block by block."""
    weight = layer.weight.double().clone()
    n = weight.shape[0] // layer.blocks
    for i, gate in enumerate(layer.gate.tolist()):
        if gate >= layer.threshold:
            update = layer.lora_B[i].double() @ layer.lora_A[i].double()
            weight[i * n : (i + 1) * n] += layer.lora_alpha / layer.r * update
    return F.linear(x.double(), weight, None if layer.bias is None else layer.bias.double())
