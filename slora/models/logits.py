"""`logits_of`: the logits in what a classifier returns."""

from __future__ import annotations

from typing import Any

from torch import Tensor


def logits_of(output: Any) -> Tensor:
    """Return the logits `[n, classes]` in what a model returned: a tensor, or an object with `logits`."""
    logits: Tensor = output if isinstance(output, Tensor) else output.logits
    return logits
