"""`Importance`: smoothed sensitivities, by which AdaLoRA and IncreLoRA rank what they allocate ranks to."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

BETA = 0.85


class Importance:
    """Running scores of named tensors (AdaLoRA, arXiv 2303.10512, equations 9 and 10; `BETA` is the value of both).

    With `s` the sensitivity of one step, such as `|w * dL/dw|`:

        mean <- BETA * mean + (1 - BETA) * s
        spread <- BETA * spread + (1 - BETA) * |s - mean|
        score = mean * spread

    Where a sensitivity is not finite, as in a step that an optimizer skips on the device, both stay as they are.

    Args:
        like: tensors of the shapes, dtypes and devices of the sensitivities, by name.
    """

    def __init__(self, like: Mapping[str, Tensor]) -> None:
        self.mean = {name: torch.zeros_like(value) for name, value in like.items()}
        self.spread = {name: torch.zeros_like(value) for name, value in like.items()}

    def add(self, name: str, sensitivity: Tensor) -> None:
        """Add the sensitivities of one step."""
        for values in (self.mean, self.spread):
            # The model may have been moved since.
            values[name] = values[name].to(sensitivity)
        mean, spread, finite = self.mean[name], self.spread[name], sensitivity.isfinite()
        mean.lerp_(torch.where(finite, sensitivity, mean), 1 - BETA)
        spread.lerp_(torch.where(finite, (sensitivity - mean).abs(), spread), 1 - BETA)

    def score(self, name: str) -> Tensor:
        """Return `mean * spread`."""
        return self.mean[name] * self.spread[name]

    def tensors(self) -> dict[str, Tensor]:
        """Return what a resumed run needs, by name; written in place."""
        return {
            f"{kind}.{name}": value
            for kind, values in (("mean", self.mean), ("spread", self.spread))
            for name, value in values.items()
        }
