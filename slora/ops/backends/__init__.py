"""What computes the operator: PyTorch calls (`eager`) or kernels (`triton`), behind one interface.

A backend gets operands that were checked, with A and B in the dtype of x (`Backend.cast`). S is `[M, packed * r]`
for both, so that one can compute the backward of the other's forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import torch
from torch import Tensor

from slora.ops.operands import LoRAOperands


class Gradients(NamedTuple):
    """The gradients of one call; None where not needed. Those of A, B and gates have the dtype of x or a wider one."""

    x: Tensor | None
    """`[M, K]`."""
    lora_A: Tensor | None
    """`[blocks, r, K]`, 0 for inactive blocks, as are the other two."""
    lora_B: Tensor | None
    """`[blocks, n, r]`."""
    gate: Tensor | None
    """`[blocks]`, straight-through."""


class Needs(NamedTuple):
    """Which gradients are needed."""

    x: bool
    lora_A: bool
    lora_B: bool
    gate: bool


class Backend(Protocol):
    """Computes the operator; see `slora.reference` for what that is."""

    name: str

    def supports(self, x: Tensor, operands: LoRAOperands | None) -> bool:
        """Return whether the backend can compute rows of `x` (or of dy) with these blocks; `eager` can compute all."""
        ...

    def cast(self, operands: LoRAOperands, dtype: torch.dtype) -> LoRAOperands:
        """Return `operands.cast(dtype)`."""
        ...

    def forward(self, x: Tensor, weight: Tensor, bias: Tensor | None, operands: LoRAOperands) -> tuple[Tensor, Tensor]:
        """Return `(y [..., N], S)` for `x [..., K]`."""
        ...

    def backward(
        self, dy: Tensor, x: Tensor | None, S: Tensor, weight: Tensor, operands: LoRAOperands, needs: Needs
    ) -> Gradients:
        """Return the gradients for `dy [M, N]`; `x [M, K]` may be None where that of A is not needed, S empty where
        those of B and the gates are not."""
        ...

    def sample_rows(self, x: Tensor, m: int, seed: int, seed_offset: Tensor | None) -> Tensor:
        """Return the `[m, K]` rows of `x [M, K]` that `slora.ops.gate_probe.sampled_rows` names."""
        ...

    def gate_probe(
        self, dy: Tensor, x: Tensor, operands: LoRAOperands, blocks: Sequence[int] | None, seed: int,
        seed_offset: Tensor | None,
    ) -> Tensor:  # fmt: skip
        """Return `dgate [blocks]` of the inactive blocks from the sampled rows `x [m, K]`, fp32 (fp64 of fp64).

        Args:
            dy: `[M, N]`, all rows.
            blocks: the blocks to probe where the host knows them; None for those that the gates switch off.
        """
        ...
