"""`OneShot`: strategies that choose once, before the first step."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import nn

from slora.config import Unit
from slora.errors import ConfigError, StateError
from slora.gates.values import gate_values, set_gates
from slora.module_tree.modes import evaluating
from slora.selection.budgeted import Budgeted
from slora.selection.strategy import require_value


class OneShot(Budgeted):
    """Chooses before the first step: from then on only the chosen blocks train, and the others cost nothing.

        selection = slora.selection.Last(model, 4, steps=300)
        for x, y in loader:
            ...
            optimizer.step()
            selection.step()

    There is no warm-up and no selection phase; `step` only counts. The blocks are taken in the order of `order`, each
    that still fits the budget.

    Args:
        model: adapted by `slora.inject`.
        budget: as for `Budget`: a number of blocks, or a share of the `unit` of all blocks, an upper bound.
        steps: optimizer steps of the run.
        unit: what a share refers to: "blocks", "parameters" (of A and B), or "flops" (of a forward pass).
        forward: runs the model once on a sample, for the unit "flops", which depends on the input rows of each layer:
            `lambda: model(images)`.
        now: choose in the constructor; False: when `begin` is called, such as after the head was trained.

    Raises:
        ConfigError: the budget is not from 0 to all blocks, a share is below the smallest block, or `forward` is
            missing.
        StateError: the model has no adapted layer, has another active strategy, or matrices were freed; or a rank-wise
            strategy has left blocks without ranks.
    """

    progress: ClassVar[frozenset[str]] = Budgeted.progress | {"begun"}

    def __init__(
        self,
        model: nn.Module,
        budget: int | float,
        steps: int,
        *,
        unit: Unit = "blocks",
        forward: Callable[[], object] | None = None,
        now: bool = True,
    ) -> None:
        if forward is not None and not callable(forward):
            raise ConfigError(f"forward={forward!r} is not a function; write lambda: model(images)")
        self.model, self.begun = model, False
        self.check_arguments(model, budget, unit)
        if unit == "flops" and forward is not None:
            self._run(forward)
            self.limit()
        # Before anything of the model changes.
        order = self._order() if now else None
        super().__init__(model, steps, 0.0, 1.0)
        if order is not None:
            self._keep(order)

    def start(self) -> None:
        """Switch every block on and stop training the gates."""
        values = gate_values(self.model)
        self._before = {layer: (values[name], layer.gate.requires_grad) for name, layer in self.layers.items()}
        super().start()

    def leave(self) -> None:
        """Leave the gates as they were before, if there was no choice."""
        super().leave()
        if not self.begun:
            set_gates({layer: values for layer, (values, _) in self._before.items()})
            for layer, (_, trained) in self._before.items():
                layer.gate.requires_grad_(trained)

    @abstractmethod
    def order(self) -> list[int]:
        """Return the numbers of all blocks, best first."""

    def phase_ends(self, steps: int) -> tuple[int, int]:
        """See `Strategy.phase_ends`: the choice is made before the first step."""
        return 0, 0

    def begin(self) -> None:
        """Choose now, if the constructor has not."""
        self._require_active()
        if not self.begun:
            self._keep(self._order())

    def _order(self) -> list[int]:
        if self.unit != "flops" or any(self.rows):
            return self.order()
        # A strategy that runs the model anyway needs no other forward pass.
        self.count_rows()
        try:
            order = self.order()
        finally:
            self.remove_hooks()
        if not any(self.rows):
            raise ConfigError(
                "unit='flops' needs the input rows of each layer; pass forward=lambda: model(images), or use "
                "unit='parameters'"
            )
        self.limit()
        return order

    def _run(self, forward: Callable[[], object]) -> None:
        self.count_rows()
        try:
            with torch.no_grad(), evaluating(self.model):
                forward()
        finally:
            self.remove_hooks()
        if not any(self.rows):
            raise StateError(
                "forward() ran no adapted layer (in a model that was compiled before, hooks do not run); use "
                "unit='parameters'"
            )

    def _keep(self, order: list[int]) -> None:
        self.keep(order, self.limit())
        self.begun = True
        self.note_budget()

    def step(self) -> None:
        """Count an optimizer step; the choice stands.

        Raises:
            StateError: the choice is not made yet, the strategy has ended, or the model is merged.
        """
        if not self.begun:
            raise StateError(f"step() of a {type(self).__name__} that has not chosen yet; call begin() before training")
        super().step()

    def _choose(self) -> None:
        """Nothing: the choice is made before the first step."""

    def finish(self) -> None:
        """See `Strategy.finish`.

        Raises:
            StateError: `begin` has not made the choice yet.
        """
        if not self.begun:
            raise StateError(f"finish() of a {type(self).__name__} that has not chosen yet; call begin() first")
        super().finish()

    def unfinished(self) -> str:
        """Say whether the choice is still to be made, or whether something else has changed the gates since."""
        if not self.begun:
            return f"the choice of blocks is not made yet: begin() of {type(self).__name__} makes it"
        return super().unfinished()

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON values."""
        return super().state_dict() | {"begun": self.begun}

    def check_state(self, state: dict[str, Any]) -> None:
        """See `Strategy.check_state`."""
        begun = state.get("begun")
        if begun is True or self.name != state.get("strategy"):
            super().check_state(state)
        require_value(state, "begun", begun is True)

    def _restore(self, state: dict[str, Any]) -> None:
        super()._restore(state)
        self.begun = True
        self.note_budget()
