"""`Gates`: the paper's way. Scores learn, a penalty pulls them down, a threshold decides; how many stay is not set."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import Tensor, nn

from slora.config import GATES_PHASES
from slora.errors import ConfigError
from slora.gates.penalty import gate_penalty
from slora.io.plain import plain
from slora.selection.strategy import Strategy, hold

WARMUP, SETTLING = GATES_PHASES


class Gates(Strategy):
    """Blocks stay while their learnable score is at least the threshold; after the selection phase gates stand still.

        selection = slora.selection.Gates(model, steps=300, penalty=1.0)
        for x, y in loader:
            loss = criterion(model(x), y) + selection.penalty()
            ...
            optimizer.step()
            selection.step()

    Gates learn from the first step, without a penalty during the warm-up. They need a rule of their own: the
    optimizer's group from `slora.parameter_groups`, or `slora.ProximalGates` with `selection.weight` as its penalty
    in place of the term in the loss. How many blocks are left follows from penalty, rate and length of the run; for a
    number of blocks use `Budget`.

    Args:
        model: adapted by `slora.inject`.
        steps: optimizer steps of the run.
        penalty: weight of the mean of |gate| during the selection phase.
        warmup: share of the steps without penalty.
        settling: share of the steps at the end in which gates stand still; at least a third.

    Raises:
        ConfigError: a value is out of range.
        StateError: the model has no adapted layer, or another strategy is at work on it.
    """

    name: ClassVar[str] = "gates"

    def __init__(
        self,
        model: nn.Module,
        steps: int,
        *,
        penalty: float = 1.0,
        warmup: float = WARMUP,
        settling: float = SETTLING,
    ) -> None:
        penalty = plain(penalty)
        if not isinstance(penalty, (int, float)) or not (math.isfinite(penalty) and penalty >= 0):
            raise ConfigError(f"penalty={penalty!r} is negative or not a finite number; use 0 or more")
        self.highest = penalty
        super().__init__(model, steps, warmup, settling)

    @property
    def weight(self) -> float:
        """The weight of the penalty at this step."""
        return self.highest if self.phase == "selection" else 0.0

    def penalty(self) -> Tensor | float:
        """Return the term to add to the loss of this step."""
        return self.weight * gate_penalty(self.model) if self.weight else 0.0

    def start(self) -> None:
        """Let the gates learn, from the values that they have."""
        for layer in self.layers.values():
            layer.gate.requires_grad_(not layer.released)

    def _choose(self) -> None:
        if self.taken == self.last:
            hold(self.layers)

    def _settle(self) -> None:
        hold(self.layers)

    def _restore(self, state: dict[str, Any]) -> None:
        if self.taken >= self.last:
            hold(self.layers)
