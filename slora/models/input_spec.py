"""`InputSpec`: the images that a model takes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class InputSpec:
    """The input format of a model: `[channels, size, size]` fp32, `(value in [0, 1] - mean) / std`."""

    channels: int = 3
    size: int = 224
    mean: tuple[float, ...] = (0.485, 0.456, 0.406)
    std: tuple[float, ...] = (0.229, 0.224, 0.225)
    interpolation: str = "bicubic"
    crop: float = 1.0
    """Centre crop of evaluation images, as a share of the shorter side."""
