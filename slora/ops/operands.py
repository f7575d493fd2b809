"""`LoRAOperands`: the blocks of one adapted layer in one record, from the layer to the kernel."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from slora.ops.dropout import rescaling


class LoRAOperands(NamedTuple):
    """The blocks of a layer in one call. The schema of the torch.library operator ends with the same fields."""

    lora_A: Tensor
    """`[blocks, r, K]`, in the dtype of x or fp32; r from 1 to 256."""
    lora_B: Tensor
    """`[blocks, n, r]` with n = N / blocks, in the dtype of `lora_A`."""
    gate: Tensor
    """`[blocks]`, floating."""
    threshold: float
    """Block i is active while `gate[i] >= threshold`."""
    scaling: float
    """The factor in front of every update."""
    active: Sequence[int] | None = None
    """The active blocks in rising order where the host knows them, so that nothing has to be read from the device; must
    agree with `gate`, which is checked on the CPU only. None means "read the gates on the device"; `torch.compile` sees
    that, so that a change of a gate never recompiles."""
    dropout: float = 0.0
    """Probability of dropping an element of x on the LoRA path."""
    seed: Tensor | None = None
    """Int64 scalar on the device of x, None without dropout. Forward and backward draw the same mask from it, so none
    is stored, and every backend draws the same one (`slora.ops.dropout`); a CUDA graph can draw a new seed per replay.
    """

    @property
    def blocks(self) -> int:
        """Number of blocks."""
        return self.lora_A.shape[0]

    @property
    def r(self) -> int:
        """Rank of each block."""
        return self.lora_A.shape[1]

    @property
    def n(self) -> int:
        """Outputs of each block."""
        return self.lora_B.shape[1]

    @property
    def packed(self) -> int:
        """Blocks that S and T have columns for: the active ones, or all where only the device knows those."""
        return self.lora_A.shape[0] if self.active is None else len(self.active)

    @property
    def factor(self) -> float:
        """The scaling, times the rescaling of dropout."""
        return self.scaling * rescaling(self.dropout) if self.dropout else self.scaling

    def cast(self, dtype: torch.dtype) -> LoRAOperands:
        """Return the operands with A and B in `dtype`, which is what products with x and dy take."""
        if self.lora_A.dtype == dtype:
            return self
        return self._replace(lora_A=self.lora_A.to(dtype), lora_B=self.lora_B.to(dtype))
