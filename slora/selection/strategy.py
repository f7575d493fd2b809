"""What every strategy is: three phases of a run, one call after each optimizer step, and a state to resume from."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from typing import Any, ClassVar, Literal

from torch import nn

from slora.config import LEAST_SETTLING, phase_ends
from slora.errors import ConfigError, DamagedCheckpointError, StateError
from slora.io.bounded import as_said
from slora.io.plain import plain
from slora.layers import LoRABlocks, adapted_layers

Phase = Literal["warm-up", "selection", "settling"]


class Strategy(ABC):
    """Chooses blocks over a run of `steps` optimizer steps, in three phases.

    - warm-up: every block learns.
    - selection: blocks are switched off.
    - settling: the choice stands, and the blocks that are left go on learning.

    Make it after `slora.inject` and call `step` after every optimizer step. A model has one strategy at a time.

    Args:
        model: adapted by `slora.inject`; a wrapper around it will do (torch.compile, DDP).
        steps: optimizer steps of the run.
        warmup: share of the steps in which every block learns.
        settling: share of the steps at the end in which the choice stands; at least a third.

    Attributes:
        taken: calls of `step` so far.
        first: steps after which selection begins.
        last: steps after which the choice stands.

    Raises:
        ConfigError: a value is out of range, or warm-up and settling leave no room.
        StateError: the model has no adapted layer, is merged, or another strategy is at work on it.
    """

    name: ClassVar[str]

    progress: ClassVar[frozenset[str]] = frozenset({"steps", "taken", "last"})
    """Entries of the state that change over a run."""

    def __init__(self, model: nn.Module, steps: int, warmup: float, settling: float) -> None:
        steps, warmup, settling = plain(steps), plain(warmup), plain(settling)
        if isinstance(steps, bool) or not isinstance(steps, int) or steps < 1:
            raise ConfigError(f"steps={steps!r} is not a number of optimizer steps; use those of the run, 1 or more")
        if not isinstance(warmup, (int, float)) or not 0 <= warmup <= 1:
            raise ConfigError(f"warmup={warmup!r} is not a share of the steps; use a number from 0 to 1")
        if not isinstance(settling, (int, float)) or not LEAST_SETTLING - 1e-9 <= settling <= 1:
            raise ConfigError(
                f"settling={settling!r} is not a share from 1/3 to 1 of the steps, in which the blocks that are left "
                f"go on learning"
            )
        if warmup + settling > 1 + 1e-9:
            raise ConfigError(f"warmup={warmup:g} and settling={settling:.3g} are more than the run; lower one of them")
        self.model, self.steps, self.warmup, self.settling = model, steps, warmup, settling
        self.first, self.last = phase_ends(self.steps, warmup, settling)
        self.taken = 0
        self.layers = _take_charge(self, model)
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

    @abstractmethod
    def start(self) -> None:
        """Prepare the gates for the first step; called when the strategy is made."""

    def step(self) -> None:
        """Choose for the next step. Call it after every optimizer step: not after each part of an accumulated one.

        Calls beyond `steps` change nothing, the choice stands; the first of them gives a `UserWarning`.

        Raises:
            StateError: the strategy gave way to another one, or `slora.freeze_gates` ended it.
        """
        self._require_charge()
        self.taken += 1
        if self.taken == self.steps + 1:
            warnings.warn(
                f"step() was called more often than steps={self.steps} of this {type(self).__name__}: make it with the "
                f"steps of the whole run, and call step() once per optimizer step, not for each part of an accumulated "
                f"one",
                stacklevel=2,
            )
        if self.taken <= self.last:
            self._choose()

    @abstractmethod
    def _choose(self) -> None:
        """Act after step number `taken`, up to `last`."""

    def finish(self) -> None:
        """End the strategy: the choice stands, and another strategy may follow.

        Raises:
            StateError: the choice is not made yet, because `step` was called too seldom.
        """
        self._require_charge()
        if self.taken < self.last:
            raise StateError(
                f"finish() after {self.taken} of {self.steps} steps, but the choice of blocks is made by step "
                f"{self.last}: call step() after every optimizer step, or make the strategy with the steps of the run "
                f"(slora.keep_blocks chooses at once)"
            )
        self._settle()
        _release(self)

    @abstractmethod
    def _settle(self) -> None:
        """Put the choice back where something else has changed the gates since, such as an earlier state dict."""

    def unfinished(self) -> str:
        """Return what stands between the model and the strategy's choice, as a sentence; else the empty string."""
        if self.taken >= self.last:
            return ""
        return (
            f"the choice of blocks is not made yet: {type(self).__name__} has taken {self.taken} of {self.steps} steps "
            f"and completes it at step {self.last}"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in JSON's types; the blocks' own parameters are the model's."""
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
        """Go on from `state`, which `state_dict` of a strategy made with the same arguments returned.

        Only `steps` may differ, where a run becomes longer or shorter: the phases follow the new number.

        Raises:
            ConfigError, CheckpointError: see `check_state`; nothing has changed then.
        """
        self.check_state(state)
        self.taken = state["taken"]
        self._restore(state)

    def check_state(self, state: dict[str, Any]) -> None:
        """Check that `load_state_dict` can go on from `state`; changes nothing.

        Raises:
            ConfigError: the state is of another strategy, or an argument differs; names it with both values.
            CheckpointError: a value cannot be one of such a strategy; names it.
        """
        self._require_charge()
        for key, value in self.state_dict().items():
            if key in self.progress:
                continue
            before = state.get(key)
            if before != value:
                raise ConfigError(
                    f"the state to resume from has {key}={repr(before)[:60]}, this {type(self).__name__} "
                    f"{key}={value!r}; resume with the former, or start a new run"
                )
        for key in ("steps", "taken", "last"):
            _require_count(state, key)
        require_value(state, "steps", state["steps"] > 0)
        # Of the run that was, which may have been longer or shorter.
        require_value(state, "last", state["last"] == phase_ends(state["steps"], self.warmup, self.settling)[1])

    @abstractmethod
    def _restore(self, state: dict[str, Any]) -> None:
        """Set the gates as after step number `taken`; the choice is due where that is beyond `last`."""

    def leave(self) -> None:  # noqa: B027
        """Take back what the strategy has attached to the model; called when it is over."""

    def _require_charge(self) -> None:
        if any(layer.merged for layer in self.layers.values()):
            raise StateError("the model is merged, so its blocks cannot be chosen; call slora.unmerge(model) first")
        if _strategy_of(self.layers) is not self:
            raise StateError(
                f"this {type(self).__name__} is over (finish, slora.freeze_gates or slora.keep_blocks ended it); make "
                f"a new one"
            )


def _require_count(state: dict[str, Any], key: str) -> None:
    require_value(state, key, type(state.get(key)) is int and 0 <= state[key] < 1 << 53)


def require_value(state: dict[str, Any], key: str, holds: bool) -> None:
    """Refuse a state whose entry `key` cannot be what it should.

    Raises:
        CheckpointError: names the entry and its value.
    """
    if not holds:
        raise DamagedCheckpointError(
            f"the state to resume from is damaged: {key!r} is {as_said(state.get(key))}; use another checkpoint"
        )


def at_work(model: nn.Module) -> Strategy | None:
    """Return the strategy that is at work on `model`, or None."""
    return _strategy_of(dict(adapted_layers(model)))


def release(model: nn.Module) -> None:
    """End the strategy that is at work on `model`, if there is one, with the gates as they are."""
    strategy = at_work(model)
    if strategy is not None:
        _release(strategy)


def unfinished_selection(model: nn.Module) -> str:
    """Return what stands between `model` and the choice of its strategy, as a sentence; else the empty string."""
    strategy = at_work(model)
    return "" if strategy is None else strategy.unfinished()


def freeze_gates(model: nn.Module) -> None:
    """Keep the choice of blocks as it is: no optimizer moves a gate any more, and a strategy at work ends.

    What inactive blocks would learn is not computed any more either. Every gate keeps its value;
    `layer.gate.requires_grad_()` lets one move again.

    Raises:
        StateError: the model has no adapted layer.
    """
    layers = require_layers(model)
    release(model)
    hold(layers)


def hold(layers: dict[str, LoRABlocks]) -> None:
    """Take the gates out of training."""
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
    if any(layer.merged for layer in layers.values()):
        raise StateError("the model is merged, so its blocks cannot be chosen; call slora.unmerge(model) first")
    return layers


def _strategy_of(layers: dict[str, LoRABlocks]) -> Strategy | None:
    return next((layer.gate_cache.strategy for layer in layers.values() if layer.gate_cache.strategy is not None), None)


def _take_charge(strategy: Strategy, model: nn.Module) -> dict[str, LoRABlocks]:
    layers = require_layers(model)
    other = _strategy_of(layers)
    if other is not None and other.taken < other.last:
        raise StateError(
            f"a {type(other).__name__} is at work on this model (step {other.taken} of {other.steps}); one strategy at "
            f"a time: end it with slora.freeze_gates(model), or leave the second one out"
        )
    if other is not None:
        _release(other)
    for layer in layers.values():
        layer.gate_cache.strategy, layer.gate_cache.asked = strategy, ""
    return layers


def _release(strategy: Strategy) -> None:
    strategy.leave()
    for layer in strategy.layers.values():
        layer.gate_cache.strategy = None
