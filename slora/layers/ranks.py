"""`RankGated`: rank gates, a factor for each rank of each block, and the removal of ranks.

While a rank-wise strategy (`slora.selection`) is at work, a layer has one more parameter, `rank_gate [blocks, r]`, and
its update is `c * B diag(rank_gate) A`. Rank gates are a parameter of the layer that the makers of operands multiply
into B (`effective_B`), rather than a parametrization: that would make the layer's class another one, rename `lora_B` in
state dicts, hide it from optimizers and from DDP, and keep it from being pickled. Kernels and operators see a B like
any other, autograd gives the gradients of both factors, and a layer without rank gates does no more than before: the
operands of its last call are used again.

B rather than A, because a fresh B is 0: rank gates that are given up before the first step leave the layer as it was.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slora.config import scaling as scaling_of
from slora.layers.state import BlockState
from slora.module_tree.sharded import full


class RankGated(BlockState):
    """Ranks of the blocks of a layer: their number, their factors and the scaling that follows from it."""

    r: int
    lora_alpha: float
    use_rslora: bool

    @property
    def scaling(self) -> float:
        """The factor `c` in front of every update."""
        return scaling_of(self.lora_alpha, self.r, self.use_rslora)

    @property
    def effective_B(self) -> Tensor:
        """`B diag(rank_gate)`, `[blocks, N / blocks, r]`: the parameter itself where there are no rank gates."""
        lora_B: Tensor = self.lora_B
        return lora_B if self.rank_gate is None else lora_B * self.rank_gate[:, None, :]

    @property
    def remaining_A(self) -> Tensor:
        """A with 0 in the ranks whose rank gate is 0, `[blocks, r, K]`: the parameter itself without rank gates."""
        lora_A: Tensor = self.lora_A
        return lora_A if self.rank_gate is None else torch.where(self.rank_gate[:, :, None] != 0, lora_A, 0.0)

    def add_rank_gate(self) -> nn.Parameter:
        """Give the layer rank gates, all 1, and return them, `[blocks, r]`, fp32; those that it has are kept."""
        if self.rank_gate is None:
            self.rank_gate = nn.Parameter(self.lora_B.new_ones(self.blocks, self.lora_B.shape[-1]))
        return self.rank_gate

    @torch.no_grad()
    def fold_rank_gate(self, remove: bool = False) -> None:
        """Multiply the rank gates into B and remove them; the update stays the same, bit for bit.

        Args:
            remove: set ranks whose gate is 0 to 0 in A, too, so that they never train again.
        """
        if self.rank_gate is not None:
            if remove:
                self.lora_A.copy_(self.remaining_A)
            self.lora_B.copy_(self.effective_B)
            self.rank_gate = None

    @torch.no_grad()
    def keep_ranks(self, kept: Sequence[Sequence[int]]) -> None:
        """Remove all ranks of each block but those in `kept`; `lora_alpha` follows, so that the scaling stays.

        The rank of the layer becomes that of its largest block, at least 1; what other blocks lack is 0 in A and B, so
        that it never trains. A and B are new parameters: optimizers have to be made again.
        """
        r = max(1, *map(len, kept))
        alpha = self.lora_alpha * (math.sqrt(r / self.r) if self.use_rslora else r / self.r)
        A = self.lora_A.new_zeros(self.blocks, r, self.lora_A.shape[-1])
        B = self.lora_B.new_zeros(*self.lora_B.shape[:2], r)
        for i, ranks in enumerate(kept):
            A[i, : len(ranks)] = self.lora_A[i, list(ranks)]
            B[i, :, : len(ranks)] = self.lora_B[i][:, list(ranks)]
        self.lora_A = nn.Parameter(A, requires_grad=self.lora_A.requires_grad)
        self.lora_B = nn.Parameter(B, requires_grad=self.lora_B.requires_grad)
        self.r, self.lora_alpha = r, alpha

    @torch.no_grad()
    def empty_blocks(self) -> list[int]:
        """Return the numbers of the blocks without a rank left: with 0 in all of A and B, so that they never train."""
        left = full(self.remaining_A).flatten(1).any(1) | full(self.effective_B).flatten(1).any(1)
        return torch.nonzero(~left).flatten().tolist()

    @torch.no_grad()
    def block_ranks(self) -> list[int]:
        """Return how many ranks each block has: with a rank gate that is not 0, or left by `keep_ranks`; 0 if inactive.

        Every other block has `r`.
        """
        found = full(self.lora_A).any(2) if self.rank_gate is None else self.rank_gate != 0
        counts, active = found.sum(1).tolist(), self.activity().active
        return [int(counts[i]) if i in active else 0 for i in range(self.blocks)]
