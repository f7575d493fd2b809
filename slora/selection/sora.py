"""`SoRA`: rank gates with a soft threshold after each step (Ding et al. 2023, arXiv 2311.11696)."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slora.config import SORA_PHASES
from slora.io.plain import nonnegative
from slora.selection.ranks import RankStrategy, soft_threshold

WARMUP, SETTLING = SORA_PHASES
THRESHOLD = PENALTY = 1e-3


class SoRA(RankStrategy):
    """A proximal step on the rank gates after each optimizer step: `g <- sign(g) * max(|g| - threshold, 0)`.

    The method of arXiv 2311.11696: rank gates drawn from N(0, 1) train with the same optimizer as A and B, the loss
    has a term `penalty * mean |g|`, and a soft threshold follows each step. Both constants are 1e-3, those of the
    published code, which multiplies neither by the learning rate. A rank whose gate is 0 gets a gradient, so that it
    may come back until the choice is final. The published method thresholds up to the last step and keeps what is not
    0 then; here a third of the steps at the end trains what remains.

    With a budget a step removes no more than the budget allows: it is cut at the value that leaves so many, and at the
    end of the selection phase the largest gates are kept. In a short run the threshold moves a gate by less than its
    first value (300 steps: 0.2), so that this last cut does most of the choosing: without a budget few ranks go.

    Args:
        budget: ranks to keep, or their share; None keeps what the threshold leaves.
        threshold: of each step.
        penalty: weight of the mean of |g| in the loss, until the choice is final.
        model, steps, warmup, settling: see `RankStrategy`.
    """

    name: ClassVar[str] = "sora"

    def __init__(
        self,
        model: nn.Module,
        budget: int | float | None,
        steps: int,
        *,
        threshold: float = THRESHOLD,
        penalty: float = PENALTY,
        warmup: float = WARMUP,
        settling: float = SETTLING,
    ) -> None:
        self.threshold = nonnegative("threshold", threshold)
        self.penalty_weight = nonnegative("penalty", penalty)
        super().__init__(model, budget, steps, warmup=warmup, settling=settling)

    def initialise(self) -> None:
        """Draw the rank gates from N(0, 1)."""
        for gate in self.gates:
            gate.normal_()

    def penalty(self) -> Tensor | float:
        """Return `penalty * mean |g|` over all ranks; 0 once the choice is final."""
        if self.kept is not None or not self.penalty_weight:
            return 0.0
        device = self.gates[0].device
        return (
            self.penalty_weight * torch.stack([gate.abs().sum().to(device) for gate in self.gates]).sum() / self.total
        )

    def update(self) -> None:
        """Threshold all rank gates."""
        if self.taken > self.first:
            self.write(soft_threshold(self.values(), self.threshold, self.target))

    def state_dict(self) -> dict[str, Any]:
        """See `RankStrategy.state_dict`."""
        return {**super().state_dict(), "threshold": self.threshold, "penalty": self.penalty_weight}
