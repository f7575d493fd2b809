"""`Budget`: a given number of blocks, or a given share of the blocks, their parameters or their FLOPs."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import nn

from slora.config import BUDGET_PHASES, Unit, check_budget, phase_ends
from slora.errors import ConfigError, StateError
from slora.gates.values import set_gates
from slora.io.bounded import all_are, is_count
from slora.selection.allocation import active_count, block_costs, cost_limit, fill, gates_of
from slora.selection.ranking import Ranking, block_scores, update_norm
from slora.selection.strategy import Strategy, require_layers, require_value, stop_training_gates

WARMUP, SETTLING = BUDGET_PHASES


class Budget(Strategy):
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
        StateError: the model has no adapted layer, has another active strategy, or matrices were freed.
    """

    name: ClassVar[str] = "budget"
    progress: ClassVar[frozenset[str]] = Strategy.progress | {"rows", "ranks", "left", "scores"}

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
        layers = require_layers(model)
        freed = [name for name, layer in layers.items() if layer.released]
        if freed:
            raise StateError(
                f"the LoRA matrices of {len(freed)} layers, the first {freed[0]!r}, were freed by inactive='frozen', "
                f"so they cannot be switched on for a new choice; use slora.keep_blocks, or inject again"
            )
        self.budget = budget = check_budget(budget, unit, sum(layer.blocks for layer in layers.values()))
        self.rows = [1] * len(layers)
        if unit == "parameters":
            cost_limit(budget, block_costs(layers, unit, self.rows), unit)
        self.scores: list[float] | None = None
        self._hooks: list[Any] = []
        super().__init__(model, steps, warmup, settling)

    def start(self) -> None:
        """Switch every block on and stop training the gates."""
        stop_training_gates(self.layers)
        self.ranks = list(range(self.n))
        self._write(self.n)
        if self.unit == "flops":
            self.rows = [0] * len(self.layers)
            for number, layer in enumerate(self.layers.values()):
                self._hooks.append(layer.register_forward_pre_hook(self._count_rows(number)))

    def _count_rows(self, number: int) -> Any:
        def count(layer: nn.Module, args: tuple[Any, ...]) -> None:
            # 0 for a layer that does not run, and so costs nothing.
            self.rows[number] = self.rows[number] or math.prod(args[0].shape[:-1])

        return count

    def _choose(self) -> None:
        self.check_rows()
        if self.taken < self.first:
            return
        if self.taken >= self.last:
            for layer in self.layers.values():
                layer.gate_cache.asked = f"budget={self.budget}"
        costs = block_costs(self.layers, self.unit, self.rows)
        total, target = sum(costs), cost_limit(self.budget, costs, self.unit)
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
        if sum(costs[i] for i in active) <= allowed:
            return
        scores = self.scores or [0.0] * self.n
        ordered = sorted(active, key=lambda i: -scores[i])
        chosen, left_out = fill(ordered, costs, allowed)
        self.ranks = [*chosen, *left_out, *self.ranks[self.left :]]
        self._write(len(chosen))

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
        self._remove_hooks()
        if not any(self.rows):
            raise StateError(
                "unit='flops' needs the input rows of each layer, but no layer ran before the first step() (in a model "
                "that was compiled before, hooks do not run); use unit='parameters'"
            )
        cost_limit(self.budget, block_costs(self.layers, self.unit, self.rows), self.unit)

    def leave(self) -> None:
        """Stop counting rows."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _write(self, left: int) -> None:
        """Switch the `left` highest ranked blocks on and the others off."""
        self.left = left
        set_gates(gates_of(self.ranks, left, self.layers))
        active = active_count(self.layers)
        if active != left:
            dtype = next(iter(self.layers.values())).gate.dtype
            raise StateError(
                f"{left} of {self.n} blocks should be active, but {active} are: {dtype} has too few digits for the "
                f"gates of so many ranks; keep the gates in fp32"
            )

    def _settle(self) -> None:
        stop_training_gates(self.layers)
        self._write(self.left)

    def unfinished(self) -> str:
        """Say whether the choice is still to be made, or whether something else has changed the gates since."""
        active = active_count(self.layers)
        if self.taken < self.last or active == self.left:
            return super().unfinished()
        return (
            f"the gates were changed since Budget made its choice: {active} blocks are active, {self.left} were "
            f"chosen; finish() of the strategy restores the choice"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON values."""
        return {
            **super().state_dict(),
            "budget": self.budget,
            "unit": self.unit,
            "rows": self.rows,
            "ranks": self.ranks,
            "left": self.left,
            "scores": self.scores,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """See `Strategy.check_state`."""
        super().check_state(state)
        rows: Any = state.get("rows")
        ranks: Any = state.get("ranks")
        scores: Any = state.get("scores")
        left = state.get("left")
        require_value(state, "rows", all_are(is_count, rows) and len(rows) == len(self.layers))
        require_value(state, "ranks", all_are(is_count, ranks) and sorted(ranks) == list(range(self.n)))
        require_value(state, "left", type(left) is int and 0 <= left <= self.n)
        numbers = isinstance(scores, list) and len(scores) == self.n
        numbers = numbers and all(type(score) in (int, float) and math.isfinite(score) for score in scores)
        require_value(state, "scores", "scores" in state and (scores is None or numbers))
        if self.unit == "flops" and state["taken"]:
            require_value(state, "rows", any(rows))
            cost_limit(self.budget, block_costs(self.layers, self.unit, rows), self.unit)
        first = phase_ends(state["steps"], self.warmup, self.settling)[0]
        if state["taken"] >= first and getattr(self.ranking, "once", False):
            costs = block_costs(self.layers, self.unit, rows)
            # Without them the blocks would be ranked again, after training on.
            ranked = 0 < cost_limit(self.budget, costs, self.unit) < sum(costs)
            require_value(state, "scores", scores is not None or not ranked)
        if state["taken"] >= state["last"]:
            costs = block_costs(self.layers, self.unit, rows)
            spent = sum(costs[i] for i in ranks[:left])
            require_value(state, "left", spent <= cost_limit(self.budget, costs, self.unit) * (1 + 1e-12))

    def _restore(self, state: dict[str, Any]) -> None:
        self.rows, self.ranks, self.scores = list(state["rows"]), list(state["ranks"]), state["scores"]
        if self.taken:
            self._remove_hooks()
        self._write(state["left"])
        if self.left < self.n:
            # Also where the resumed run is longer: what is off stays off.
            self.first = min(self.first, self.taken)
        if self.taken >= self.last:
            self._choose()
