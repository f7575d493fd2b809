"""Adapted layers. Read `base.py` (LoRA blocks and their gates), then `linear.py`, then `attention.py`."""

from slora.layers.attention import ProjectionAttention, SelectiveLoRAAttention
from slora.layers.base import LoRABlocks, adapted_layers, gates_on_device
from slora.layers.linear import SelectiveLoRALinear

__all__ = [
    "LoRABlocks",
    "ProjectionAttention",
    "SelectiveLoRAAttention",
    "SelectiveLoRALinear",
    "adapted_layers",
    "gates_on_device",
]
