"""`Strategy`, the interface of all strategies, and `freeze_gates`. A model has at most one active strategy."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from slora.config import LEAST_SETTLING, phase_ends
from slora.errors import ConfigError, DamagedCheckpointError, StateError
from slora.io.bounded import as_said, is_count
from slora.io.plain import plain
from slora.layers import LoRABlocks, adapted_layers

Phase = Literal["warm-up", "selection", "settling"]


class Strategy(ABC):
    """Chooses blocks over a run of `steps` optimizer steps, in three phases.

    - warm-up: all blocks train.
    - selection: blocks are switched off.
    - settling: the choice is final, and the remaining blocks train on.

    Create it after `slora.inject` and call `step` after every optimizer step. A model has one strategy at a time.

    Args:
        model: adapted by `slora.inject`; may be wrapped (torch.compile, DDP).
        steps: optimizer steps of the run.
        warmup: share of the steps in which all blocks train.
        settling: share of the steps at the end in which the choice is final; at least a third.

    Attributes:
        taken: calls of `step` so far.
        first: steps after which selection begins.
        last: steps after which the choice is final.

    Raises:
        ConfigError: a value is out of range, or warm-up and settling are longer than the run.
        StateError: the model has no adapted layer, is merged, or has another active strategy.
    """

    name: ClassVar[str]

    progress: ClassVar[frozenset[str]] = frozenset({"steps", "taken", "last"})
    """Entries of the state that change over a run."""

    hold: ClassVar[bool] = False
    """Whether a trainer should decay no learning rate before the choice, for what remains to train on."""

    def __init__(self, model: nn.Module, steps: int, warmup: float, settling: float) -> None:
        steps, warmup, settling = plain(steps), plain(warmup), plain(settling)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ConfigError(
                f"steps={steps!r} is not a number of optimizer steps; use the steps of the run, 1 or more"
            )
        if not isinstance(warmup, (int, float)) or not 0 <= warmup <= 1:
            raise ConfigError(f"warmup={warmup!r} is not a share of the steps; use a number from 0 to 1")
        if not isinstance(settling, (int, float)) or not LEAST_SETTLING - 1e-9 <= settling <= 1:
            raise ConfigError(
                f"settling={settling!r} is not a share from 1/3 to 1 of the steps, in which the remaining blocks train "
                f"on"
            )
        if warmup + settling > 1 + 1e-9:
            raise ConfigError(
                f"warmup={warmup:g} and settling={settling:.3g} are longer than the run; lower one of them"
            )
        self.model, self.steps, self.warmup, self.settling = model, steps, warmup, settling
        self.first, self.last = self.phase_ends(steps)
        self.taken = 0
        self.layers = _attach(self, model)
        self.start()

    @property
    def phase(self) -> Phase:
        """The phase of the next step."""
        if self.taken < self.first:
            return "warm-up"
        return "selection" if self.taken < self.last else "settling"

    @property
    def n(self) -> int:
        """Number of blocks."""
        return sum(layer.blocks for layer in self.layers.values())

    def phase_ends(self, steps: int) -> tuple[int, int]:
        """Return after how many of `steps` steps selection begins and the choice is final."""
        return phase_ends(steps, self.warmup, self.settling)

    @property
    def penalty_on_gates(self) -> float:
        """The weight of the penalty on block gates at this step; 0 where the method has none."""
        return 0.0

    def penalty(self) -> Tensor | float:
        """Return the term to add to the loss of this step; 0 where the method has none."""
        return 0.0

    @abstractmethod
    def start(self) -> None:
        """Prepare the gates for the first step; called by the constructor."""

    def begin(self) -> None:  # noqa: B027
        """Make the choices that come before the first step, where the constructor was told to wait with them."""

    def step(self) -> None:
        """Update the choice of blocks. Call it after every optimizer step, not after each accumulated backward.

        Calls beyond `steps` change nothing; the first of them gives a `UserWarning`.

        Raises:
            StateError: the strategy has ended, or the model is merged.
        """
        self._require_active()
        self.taken += 1
        if self.taken == self.steps + 1:
            warnings.warn(
                f"step() was called more often than steps={self.steps} of this {type(self).__name__}: create it with "
                f"the steps of the whole run, and call step() once per optimizer step, not per accumulated backward",
                stacklevel=2,
            )
        if self.taken <= self.last:
            self._choose()

    @abstractmethod
    def _choose(self) -> None:
        """Choose blocks after step number `taken`, which is at most `last`."""

    def finish(self) -> None:
        """End the strategy and keep its choice; another strategy may follow.

        Raises:
            StateError: the choice is not made yet, because `step` was called too seldom.
        """
        self._require_active()
        if self.taken < self.last:
            raise StateError(
                f"finish() after {self.taken} of {self.steps} steps, but the choice of blocks is made by step "
                f"{self.last}: call step() after every optimizer step, or create the strategy with the steps of the "
                f"run (slora.keep_blocks chooses at once)"
            )
        self._settle()
        _detach(self)

    @abstractmethod
    def _settle(self) -> None:
        """Restore the choice, in case something has changed the gates since, such as loading a state dict."""

    def unfinished(self) -> str:
        """Return why the active blocks are not the strategy's final choice, as a clause; empty if they are."""
        if self.taken >= self.last:
            return ""
        return (
            f"the choice of blocks is not made yet: {type(self).__name__} has taken {self.taken} of {self.steps} steps "
            f"and chooses up to step {self.last}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the state dict of the model, as JSON values."""
        return {
            "strategy": self.name,
            "steps": self.steps,
            "warmup": self.warmup,
            "settling": self.settling,
            "n": self.n,
            "taken": self.taken,
            "last": self.last,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state`, which `state_dict` of a strategy with the same arguments returned.

        Only `steps` may differ: the phases of a longer or shorter run follow the new number.

        Raises:
            ConfigError, CheckpointError: see `check_state`; nothing has changed then.
        """
        self.check_state(state)
        self.taken = state["taken"]
        self._restore(state)

    def check_state(self, state: dict[str, Any]) -> None:
        """Check that `load_state_dict` accepts `state`; changes nothing.

        Raises:
            ConfigError: the state is of another strategy, or an argument differs; names it with both values.
            CheckpointError: a value is invalid; names it.
        """
        self._require_active()
        for key, value in self.state_dict().items():
            if key in self.progress:
                continue
            before = state.get(key)
            if before != value:
                raise ConfigError(
                    f"the state to resume from has {key}={repr(before)[:60]}, this {type(self).__name__} "
                    f"{key}={value!r}; resume with the first, or start a new run"
                )
        for key in ("steps", "taken", "last"):
            require_value(state, key, is_count(state.get(key)))
        require_value(state, "steps", state["steps"] > 0)
        # Of the earlier run, which may have been longer or shorter.
        require_value(state, "last", state["last"] == self.phase_ends(state["steps"])[1])

    @abstractmethod
    def _restore(self, state: dict[str, Any]) -> None:
        """Set the gates as they were after step number `taken`, chosen where that is `last` or later."""

    def before_step(self, optimizer: Optimizer) -> None:  # noqa: B027
        """Called before every optimizer step, while the gradients are there."""

    def leave(self) -> None:  # noqa: B027
        """Remove what the strategy has attached to the model; called when it ends."""

    def _require_active(self) -> None:
        _refuse_merged(self.layers)
        if _strategy_of(self.layers) is not self:
            raise StateError(
                f"this {type(self).__name__} has ended (by finish, slora.freeze_gates or slora.keep_blocks); create a "
                f"new one"
            )


def require_value(state: dict[str, Any], key: str, holds: bool) -> None:
    """Refuse a state whose entry `key` is invalid.

    Raises:
        CheckpointError: `holds` is False; names the entry and its value.
    """
    if not holds:
        raise DamagedCheckpointError(
            f"the state to resume from is damaged: {key!r} is {as_said(state.get(key))}; use another checkpoint"
        )


def active_strategy(model: nn.Module) -> Strategy | None:
    """Return the strategy that chooses the blocks of `model`, or None."""
    return _strategy_of(dict(adapted_layers(model)))


def end_strategy(model: nn.Module) -> None:
    """End the active strategy of `model`, if there is one; the gates keep their values."""
    strategy = active_strategy(model)
    if strategy is not None:
        _detach(strategy)


def unfinished_selection(model: nn.Module) -> str:
    """Return why the active blocks of `model` are not its strategy's final choice, as a clause; empty if they are."""
    strategy = active_strategy(model)
    return "" if strategy is None else strategy.unfinished()


def freeze_gates(model: nn.Module) -> None:
    """Stop training the gates, so that the active blocks stay what they are; an active strategy ends.

    No gate gradients are computed any more. `layer.gate.requires_grad_()` trains a gate again. Rank gates are
    multiplied into B, those of a copy of a model whose strategy is still at work, too.

    Raises:
        StateError: the model has no adapted layer.
    """
    layers = require_layers(model)
    end_strategy(model)
    stop_training_gates(layers)
    for layer in layers.values():
        layer.fold_rank_gate()


def stop_training_gates(layers: dict[str, LoRABlocks]) -> None:
    """Make the gates of `layers` need no gradient, and drop the gradients they have."""
    for layer in layers.values():
        layer.gate.requires_grad_(False)
        layer.gate.grad = None


def require_layers(model: nn.Module) -> dict[str, LoRABlocks]:
    """Return the adapted layers of `model` by name.

    Raises:
        StateError: there is none, or the model is merged.
    """
    layers = dict(adapted_layers(model))
    if not layers:
        raise StateError("the model has no adapted layer; call slora.inject(model, config) first")
    _refuse_merged(layers)
    return layers


def _refuse_merged(layers: dict[str, LoRABlocks]) -> None:
    if any(layer.merged for layer in layers.values()):
        raise StateError("the model is merged, so its blocks cannot be chosen; call slora.unmerge(model) first")


def _strategy_of(layers: dict[str, LoRABlocks]) -> Strategy | None:
    return next((layer.gate_cache.strategy for layer in layers.values() if layer.gate_cache.strategy is not None), None)


def refuse_unfinished(layers: dict[str, LoRABlocks]) -> None:
    """Refuse another strategy for `layers` while theirs has not made its choice.

    Raises:
        StateError: names it and its step.
    """
    other = _strategy_of(layers)
    if other is not None and other.taken < other.last:
        raise StateError(
            f"{type(other).__name__} is active on this model (step {other.taken} of {other.steps}), and a model has "
            f"one strategy at a time: end it with slora.freeze_gates(model), or leave the second one out"
        )


def _attach(strategy: Strategy, model: nn.Module) -> dict[str, LoRABlocks]:
    layers = require_layers(model)
    refuse_unfinished(layers)
    other = _strategy_of(layers)
    if other is not None:
        _detach(other)
    for layer in layers.values():
        layer.gate_cache.strategy, layer.gate_cache.asked = strategy, ""
    return layers


def _detach(strategy: Strategy) -> None:
    strategy.leave()
    for layer in strategy.layers.values():
        layer.gate_cache.strategy = None
