"""`Budgeted`: what strategies with a budget have in common."""

from __future__ import annotations

import math
from typing import Any, ClassVar

from torch import nn

from slora.config import Unit
from slora.errors import StateError
from slora.gates.values import set_gates
from slora.io.bounded import all_are, is_count
from slora.selection.allocation import (
    active_count,
    block_costs,
    checked_budget,
    cost_limit,
    fill,
    gates_of,
    refuse_empty,
    refuse_ranks,
)
from slora.selection.strategy import Strategy, refuse_unfinished, require_layers, require_value, stop_training_gates


class Budgeted(Strategy):
    """Ends with as many blocks as a budget allows, and alone writes the gates.

    Every block is on at first. Gates decrease with the rank of their block and cross the threshold after the last
    active one.

    Attributes:
        ranks: numbers of all blocks, best first.
        left: how many of them are active.
        rows: input rows of each layer, for the unit "flops"; 0 for a layer that does not run, and so costs nothing.
    """

    progress: ClassVar[frozenset[str]] = Strategy.progress | {"rows", "ranks", "left"}

    unit: Unit
    budget: int | float
    rows: list[int]
    ranks: list[int]
    left: int
    _hooks: list[Any]

    def check_arguments(self, model: nn.Module, budget: int | float, unit: Unit) -> None:
        """Check and keep the budget, before anything of the model changes.

        Raises:
            ConfigError: the budget is not from 0 to all blocks, or a share is below the smallest block.
            StateError: the model has no adapted layer, or another active strategy; matrices were freed, or blocks have
                no rank left.
        """
        layers = require_layers(model)
        refuse_unfinished(layers)
        freed = [name for name, layer in layers.items() if layer.released]
        if freed:
            raise StateError(
                f"the LoRA matrices of {len(freed)} layers, the first {freed[0]!r}, were freed by inactive='frozen', "
                f"so they cannot be switched on for a new choice; use slora.keep_blocks, or inject again"
            )
        refuse_empty(layers)
        refuse_ranks(unit)
        self.unit, self._hooks = unit, []
        self.budget = checked_budget(budget, unit, layers)
        self.layers, self.rows = layers, [0 if unit == "flops" else 1] * len(layers)

    def start(self) -> None:
        """Switch every block on and stop training the gates."""
        stop_training_gates(self.layers)
        self.ranks = list(range(self.n))
        self.write(self.n)

    def costs(self) -> list[float]:
        """Return the cost of each block in the unit of the budget."""
        return block_costs(self.layers, self.unit, self.rows)

    def limit(self) -> float:
        """Return the budget as a sum of costs.

        Raises:
            ConfigError: a share is below the cost of the smallest block.
        """
        return cost_limit(self.budget, self.costs(), self.unit)

    def keep(self, ordered: list[int], allowed: float) -> None:
        """Switch off what does not fit of the blocks in `ordered`, best first; blocks that are off stay last."""
        chosen, left_out = fill(ordered, self.costs(), allowed)
        self.ranks = [*chosen, *left_out, *self.ranks[self.left :]]
        self.write(len(chosen))

    def write(self, left: int) -> None:
        """Switch the `left` highest ranked blocks on and the others off.

        Raises:
            StateError: the dtype of the gates has too few digits for so many ranks.
        """
        self.left = left
        set_gates(gates_of(self.ranks, left, self.layers))
        active = active_count(self.layers)
        if active != left:
            dtype = next(iter(self.layers.values())).gate.dtype
            raise StateError(
                f"{left} of {self.n} blocks should be active, but {active} are: {dtype} has too few digits for the "
                f"gates of so many ranks; keep the gates in fp32"
            )

    def note_budget(self) -> None:
        """Let the model say what its blocks were chosen by."""
        for layer in self.layers.values():
            layer.gate_cache.asked = f"budget={self.budget}"

    def count_rows(self) -> None:
        """Count the input rows of each layer from now on, until `leave` or `remove_hooks`."""
        for number, layer in enumerate(self.layers.values()):
            self._hooks.append(layer.register_forward_pre_hook(self._counter(number)))

    def _counter(self, number: int) -> Any:
        def count(layer: nn.Module, args: tuple[Any, ...]) -> None:
            self.rows[number] = self.rows[number] or math.prod(args[0].shape[:-1])

        return count

    def remove_hooks(self) -> None:
        """Stop counting rows."""
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def leave(self) -> None:
        """Stop counting rows."""
        self.remove_hooks()

    def _settle(self) -> None:
        stop_training_gates(self.layers)
        self.write(self.left)

    def unfinished(self) -> str:
        """Say whether the choice is still to be made, or whether something else has changed the gates since."""
        active = active_count(self.layers)
        if self.taken < self.last or active == self.left:
            return super().unfinished()
        return (
            f"the gates were changed since {type(self).__name__} made its choice: {active} blocks are active, "
            f"{self.left} were chosen; finish() of the strategy restores the choice"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON values."""
        own = {"budget": self.budget, "unit": self.unit, "rows": self.rows, "ranks": self.ranks, "left": self.left}
        return super().state_dict() | own

    def check_state(self, state: dict[str, Any]) -> None:
        """See `Strategy.check_state`."""
        super().check_state(state)
        rows: Any = state.get("rows")
        ranks: Any = state.get("ranks")
        left = state.get("left")
        require_value(state, "rows", all_are(is_count, rows) and len(rows) == len(self.layers))
        require_value(state, "ranks", all_are(is_count, ranks) and sorted(ranks) == list(range(self.n)))
        require_value(state, "left", type(left) is int and 0 <= left <= self.n)
        if self.unit == "flops" and state["taken"]:
            require_value(state, "rows", any(rows))
        costs = block_costs(self.layers, self.unit, rows)
        if self.unit != "flops" or any(rows):
            limit = cost_limit(self.budget, costs, self.unit)
            if state["taken"] >= state["last"]:
                require_value(state, "left", sum(costs[i] for i in ranks[:left]) <= limit * (1 + 1e-12))

    def _restore(self, state: dict[str, Any]) -> None:
        self.rows, self.ranks = list(state["rows"]), list(state["ranks"])
        if self.taken:
            self.remove_hooks()
        self.write(state["left"])
