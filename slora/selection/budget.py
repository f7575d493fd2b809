"""`Budget`: a given number of blocks, or a given share of the blocks, their parameters or their FLOPs."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import nn

from slora.config import BUDGET_PHASES, Unit
from slora.errors import ConfigError, StateError
from slora.selection.allocation import block_costs, cost_limit
from slora.selection.budgeted import Budgeted
from slora.selection.ranking import Ranking, block_scores, update_norm
from slora.selection.strategy import require_value

WARMUP, SETTLING = BUDGET_PHASES


class Budget(Budgeted):
    """Ends with exactly `budget` blocks: all train at first, then the lowest ranked are switched off one by one.

        selection = slora.selection.Budget(model, 4, steps=300)
        for x, y in loader:
            ...
            optimizer.step()
            selection.step()

    Of `n` blocks and with a budget of `K`, `K + round((n - K) * (1 - t)^3)` are active after a share `t` of the
    selection phase (the cubic schedule of Zhu and Gupta, arXiv 1710.01878). A block that is off stays off. `Budget`
    alone writes the gates: no optimizer moves them, a penalty on them has no effect, and inactive blocks cost nothing.
    Gates decrease with the rank of their block and cross the threshold after the last active one.

    In several processes scores are averaged over all, so that each makes the same choice.

    Args:
        model: adapted by `slora.inject`.
        budget: an int counts blocks; a float from 0 to 1 is a share of the `unit` of all blocks (1 is one block,
            1.0 is all). A share of blocks is rounded to the nearest number; a share of parameters or FLOPs is an upper
            bound, filled by rank.
        steps: optimizer steps of the run.
        unit: what a share refers to: "blocks", "parameters" (of A and B), or "flops" (of a forward pass, with the
            input rows that each layer had in the first step).
        ranking: scores blocks; by default `update_norm`, which is free. `SoloGain` is better and needs a loss.
        warmup: share of the steps in which all blocks train; 0.3.
        settling: share of the steps at the end in which the choice is final, 0.6; at least a third. Do not decay the
            learning rate before: the remaining blocks need it.

    Raises:
        ConfigError: the budget is not from 0 to all blocks, a share is below the smallest block, or a value is out of
            range.
        StateError: the model has no adapted layer, has another active strategy, or matrices were freed; or a rank-wise
            strategy has left blocks without ranks.
    """

    name: ClassVar[str] = "budget"
    progress: ClassVar[frozenset[str]] = Budgeted.progress | {"scores"}
    hold: ClassVar[bool] = True

    def __init__(
        self,
        model: nn.Module,
        budget: int | float,
        steps: int,
        *,
        unit: Unit = "blocks",
        ranking: Ranking | None = None,
        warmup: float = WARMUP,
        settling: float = SETTLING,
    ) -> None:
        self.unit = unit
        self.ranking: Ranking = update_norm if ranking is None else ranking
        if not callable(self.ranking):
            raise ConfigError(f"ranking={ranking!r} is not callable; use slora.selection.SoloGain(loss), or None")
        self.check_arguments(model, budget, unit)
        self.scores: list[float] | None = None
        super().__init__(model, steps, warmup, settling)

    def start(self) -> None:
        """Switch every block on and stop training the gates."""
        super().start()
        if self.unit == "flops":
            self.count_rows()

    def _choose(self) -> None:
        self.check_rows()
        if self.taken < self.first:
            return
        if self.taken >= self.last:
            self.note_budget()
        costs, target = self.costs(), self.limit()
        total = sum(costs)
        t = 1.0 if self.taken >= self.last else (self.taken - self.first) / (self.last - self.first)
        above = (total - target) * (1 - t) ** 3
        allowed = target + (round(above) if self.unit == "blocks" else above)
        active = self.ranks[: self.left]
        once = bool(getattr(self.ranking, "once", False))
        # With no block or all blocks to keep there is nothing to choose.
        if (self.scores is None and once and 0 < target < total) or (
            not once and sum(costs[i] for i in active) > allowed
        ):
            self.scores = block_scores(self.ranking, self.model, self.n)
        if sum(costs[i] for i in active) > allowed:
            scores = self.scores or [0.0] * self.n
            self.keep(sorted(active, key=lambda i: -scores[i]), allowed)

    def check_rows(self) -> None:
        """Check a share of the FLOPs with the input rows of the layers so far, and stop counting rows.

        The first `step` calls it. Call it after a forward pass of your own to find out before the first optimizer step
        whether the share is too small.

        Raises:
            ConfigError: the share is below the smallest block.
            StateError: no layer has run.
        """
        if not self._hooks:
            return
        self.remove_hooks()
        if not any(self.rows):
            raise StateError(
                "unit='flops' needs the input rows of each layer, but no layer ran before the first step() (in a model "
                "that was compiled before, hooks do not run); use unit='parameters'"
            )
        self.limit()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON values."""
        return super().state_dict() | {"scores": self.scores}

    def check_state(self, state: dict[str, Any]) -> None:
        """See `Strategy.check_state`."""
        super().check_state(state)
        scores: Any = state.get("scores")
        numbers = isinstance(scores, list) and len(scores) == self.n
        numbers = numbers and all(type(score) in (int, float) and math.isfinite(score) for score in scores)
        require_value(state, "scores", "scores" in state and (scores is None or numbers))
        if state["taken"] >= self.phase_ends(state["steps"])[0] and getattr(self.ranking, "once", False):
            costs = block_costs(self.layers, self.unit, state["rows"])
            # Without them the blocks would be ranked again, after training on.
            ranked = 0 < cost_limit(self.budget, costs, self.unit) < sum(costs)
            require_value(state, "scores", scores is not None or not ranked)

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self.scores = state["scores"]
        if self.left < self.n:
            # Also where the resumed run is longer: what is off stays off.
            self.first = min(self.first, self.taken)
        if self.taken >= self.last:
            self._choose()
