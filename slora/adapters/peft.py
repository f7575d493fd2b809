"""PEFT's view of an adapted model: one LoRA pair for each layer with active blocks, and `adapter_config.json`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from slora.config import SelectiveLoRAConfig
from slora.layers import LoRABlocks
from slora.module_tree.sharded import full


@torch.no_grad()
def stacked_pair(layer: LoRABlocks) -> tuple[Tensor, Tensor]:
    """Return the active blocks of `layer` as one pair on the CPU: `A [n * r, in]`, block-diagonal `B [out, n * r]`.

    Ranks whose rank gate is 0 are 0 in both, as `finish` of a rank-wise strategy leaves them.
    """
    active = list(layer.activity().active)
    lora_A, lora_B = full(layer.remaining_A), full(layer.effective_B)
    A = lora_A[active].reshape(-1, lora_A.shape[-1])
    n, r = lora_B.shape[1:]
    B = lora_B.new_zeros(layer.blocks * n, len(active) * r)
    for j, i in enumerate(active):
        B[i * n : (i + 1) * n, j * r : (j + 1) * r] = lora_B[i]
    return A.cpu().contiguous(), B.cpu().contiguous()


def peft_config(
    config: SelectiveLoRAConfig, layers: Mapping[str, LoRABlocks], modules_to_save: tuple[str, ...]
) -> dict[str, Any]:
    """Return `adapter_config.json`: the layers with active blocks as a PEFT LoRA, with summed ranks and alphas."""
    ranks, alphas = {}, {}
    for name, layer in layers.items():
        count = len(layer.activity().active)
        if not count:
            continue
        # PEFT divides alpha by the stacked rank (or its root), so alpha grows with it to keep the scaling.
        r, alpha = count * layer.r, layer.lora_alpha * (count**0.5 if config.use_rslora else count)
        if r != config.r:
            ranks[name] = r
        if alpha != config.lora_alpha:
            alphas[name] = alpha
    return {
        "peft_type": "LORA",
        "r": config.r,
        "lora_alpha": config.lora_alpha,
        "lora_dropout": config.lora_dropout,
        "target_modules": [name for name, layer in layers.items() if layer.activity().active],
        "modules_to_save": list(modules_to_save) or None,
        "rank_pattern": {f"^{name}$": rank for name, rank in ranks.items()},
        "alpha_pattern": {f"^{name}$": alpha for name, alpha in alphas.items()},
        "use_rslora": config.use_rslora,
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "task_type": None,
        "base_model_name_or_path": None,
    }
