"""`Gates`: the paper's method. Scores are trained under a penalty, and a threshold decides which blocks are active."""

from __future__ import annotations

from typing import Any, ClassVar

from torch import Tensor, nn

from slora.config import GATES_PHASES
from slora.gates.penalty import gate_penalty
from slora.io.plain import nonnegative
from slora.selection.strategy import Strategy, stop_training_gates

WARMUP, SETTLING = GATES_PHASES


class Gates(Strategy):
    """A block is active while its trained score is at least the threshold; after the selection phase gates are frozen.

        selection = slora.selection.Gates(model, steps=300, penalty=1.0)
        for x, y in loader:
            loss = criterion(model(x), y) + selection.penalty()
            ...
            optimizer.step()
            selection.step()

    Gates train from the first step, without a penalty during the warm-up. They need an optimizer group of their own,
    from `slora.parameter_groups`, or `slora.ProximalGates` with `selection.weight` as its penalty instead of the term
    in the loss. How many blocks remain follows from penalty, learning rate and run length; for an exact number use
    `Budget`.

    Args:
        model: adapted by `slora.inject`.
        steps: optimizer steps of the run.
        penalty: weight of the mean of |gate| during the selection phase.
        warmup: share of the steps without penalty.
        settling: share of the steps at the end in which gates are frozen; at least a third.

    Raises:
        ConfigError: a value is out of range.
        StateError: the model has no adapted layer, or has another active strategy.
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
        self.selection_weight = nonnegative("penalty", penalty)
        super().__init__(model, steps, warmup, settling)

    @property
    def weight(self) -> float:
        """The weight of the penalty at this step."""
        return self.selection_weight if self.phase == "selection" else 0.0

    @property
    def penalty_on_gates(self) -> float:
        """See `Strategy.penalty_on_gates`."""
        return self.weight

    def penalty(self) -> Tensor | float:
        """Return the term to add to the loss of this step."""
        return self.weight * gate_penalty(self.model) if self.weight else 0.0

    def start(self) -> None:
        """Train the gates, from the values that they have."""
        for layer in self.layers.values():
            layer.gate.requires_grad_(not layer.released)

    def _choose(self) -> None:
        if self.taken == self.last:
            stop_training_gates(self.layers)

    def _settle(self) -> None:
        stop_training_gates(self.layers)

    def _restore(self, state: dict[str, Any]) -> None:
        if self.taken >= self.last:
            stop_training_gates(self.layers)
