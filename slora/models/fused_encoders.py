"""PyTorch's fused encoder path, which reads weights without calling the layers: off wherever it would skip blocks."""

from __future__ import annotations

from typing import Any

from torch import nn

from slora.layers import adapted_layers


def set_fused_encoders(model: nn.Module) -> None:
    """Turn the fused path off in the encoders that hold adapted layers, and on again in those that hold none."""
    for module in model.modules():
        if isinstance(module, nn.TransformerEncoderLayer):
            _override(module, "activation_relu_or_gelu", 0)
        elif isinstance(module, nn.TransformerEncoder):
            _override(module, "use_nested_tensor", False)


def _override(module: nn.Module, attribute: str, value: Any) -> None:
    """Set an attribute of `module` while it holds adapted layers; the original value is kept beside it."""
    original = "_slora_" + attribute
    adapted = any(True for _ in adapted_layers(module))
    if adapted and original not in module.__dict__:
        setattr(module, original, getattr(module, attribute))
        setattr(module, attribute, value)
    elif not adapted and original in module.__dict__:
        setattr(module, attribute, module.__dict__.pop(original))
