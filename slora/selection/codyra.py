"""`CoDyRA`: dense training, then a soft threshold on rank gates that rises (Lu et al. 2024, arXiv 2412.01004)."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import nn

from slora.config import CODYRA_PHASES
from slora.io.plain import nonnegative
from slora.selection.ranks import RankStrategy, soft_threshold

WARMUP, SETTLING = CODYRA_PHASES
THRESHOLD, LEVELS = 0.005, 50


class CoDyRA(RankStrategy):
    """After a dense phase, a soft threshold on the rank gates after each step, rising from 0 to `threshold`.

    The method of arXiv 2412.01004: rank gates drawn from N(0, 1) train with A and B; in the first half of the run
    nothing is removed, then the threshold takes 50 values, evenly spaced from 0 to its highest, for equally many steps
    each, and after each step `g <- sign(g) * max(|g| - t, 0)`. (The published code, which changes values in place,
    also removes those between t and 2 t; this is the soft threshold of the paper.) The published method thresholds up
    to the last step; here a third of the steps trains what remains, and the dense phase is half of those before it.
    The published scaling is 1: `lora_alpha = r`.

    With a budget a step removes no more than the budget allows, and at the end of the selection phase the largest
    gates are kept.

    Args:
        budget: ranks to keep, or their share; None keeps what the threshold leaves.
        threshold: the highest one; 0.005 is published.
        model, steps, warmup, settling: see `RankStrategy`; `warmup` is the dense phase.
    """

    name: ClassVar[str] = "codyra"

    def __init__(
        self,
        model: nn.Module,
        budget: int | float | None,
        steps: int,
        *,
        threshold: float = THRESHOLD,
        warmup: float = WARMUP,
        settling: float = SETTLING,
    ) -> None:
        self.threshold = nonnegative("threshold", threshold)
        super().__init__(model, budget, steps, warmup=warmup, settling=settling)

    def initialise(self) -> None:
        """Draw the rank gates from N(0, 1)."""
        for gate in self.gates:
            gate.normal_()

    def level(self) -> float:
        """Return the threshold after step number `taken`."""
        if self.taken <= self.first:
            return 0.0
        number = min(LEVELS - 1, (self.taken - self.first) * LEVELS // (self.last - self.first))
        return self.threshold * number / (LEVELS - 1)

    def update(self) -> None:
        """Threshold all rank gates."""
        if level := self.level():
            self.write(soft_threshold(self.values(), level, self.target))

    def state_dict(self) -> dict[str, Any]:
        """See `RankStrategy.state_dict`."""
        return {**super().state_dict(), "threshold": self.threshold}
