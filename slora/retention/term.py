"""`Term`, the interface of everything that retention adds to a loss, and what the terms share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slora.errors import ConfigError
from slora.io.bounded import is_count
from slora.io.plain import count_of, nonnegative, plain
from slora.layers import adapted_layers
from slora.module_tree import sharded


class Term(ABC):
    """A loss term; call it once in each step and add the result to the loss.

    What it is depends only on the arguments and the number of the step, so that a resumed run needs no state of it, and
    all processes of a run compute the same.

    Args:
        model: adapted by `slora.inject`; not a wrapper around it.
        weight: of the term in the loss, finite and at least 0; 0 switches it off.
        every: only every so many steps have the term, with a weight `every` times as large.

    Raises:
        ConfigError: a value is out of range, or the model has no adapted layer.
    """

    name: ClassVar[str]
    """Under which the training log has its value."""

    def __init__(self, model: nn.Module, weight: float, every: int = 1) -> None:
        self.weight: float = nonnegative("weight", weight)
        self.every: int = count_of("every", every)
        if not any(True for _ in adapted_layers(model)):
            raise ConfigError(
                f"the model has no adapted layer, so the term {self.name!r} has nothing to act on; call slora.inject"
            )
        self.model = model
        self.calls = 0

    def due(self, step: int) -> bool:
        """Whether the loss of this step has the term."""
        return bool(self.weight) and step % self.every == 0

    def __call__(self, step: int | None = None) -> Tensor:
        """Return the term of this step, a scalar; 0, without computation, in steps without the term.

        Args:
            step: number of the step from 0, which determines the samples; by default calls are counted.

        Raises:
            ConfigError: `step` is not a number of a step.
        """
        if step is None:
            step, self.calls = self.calls, self.calls + 1
        elif not is_count(plain(step)):
            raise ConfigError(f"step={step!r} is not the number of a step, an integer from 0")
        if not self.due(step):
            return next(self.model.parameters()).new_zeros(())
        return self.weight * self.every * self.value(step // self.every)

    @abstractmethod
    def value(self, draw: int) -> Tensor:
        """Return the term without its weight; `draw` counts the steps that have it, from 0."""


def seed_of(name: str, value: Any) -> int:
    """Return a seed as an int.

    Raises:
        ConfigError: it is not an integer.
    """
    value = plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ConfigError(f"{name}={value!r} is not an integer")
    return value


def checked_samples(samples: Any, model: nn.Module) -> Tensor:
    """Return `samples [n, ...]` on the device of `model`.

    Raises:
        ConfigError: they are not a tensor, fewer than two, or not finite.
    """
    if not isinstance(samples, Tensor):
        raise ConfigError(f"samples are a {type(samples).__name__}, not a tensor; stack them: torch.stack(images)")
    if samples.dim() == 0 or len(samples) < 2:
        count = 0 if samples.dim() == 0 else len(samples)
        raise ConfigError(f"samples holds {count} samples, fewer than 2; a few dozen are enough")
    if samples.is_floating_point() and not (finite := samples.flatten(1).isfinite().all(1)).all():
        first = int((~finite).nonzero()[0])
        raise ConfigError(f"samples[{first}] holds NaN or infinity; remove that sample")
    return samples.to(next(model.parameters()).device)


def refuse_sharded(model: nn.Module, name: str) -> None:
    """Raise `StateError` if the matrices of the blocks are sharded, which a term on them does not read."""
    sharded.refuse(model, f"the term {name!r} needs whole matrices: use Distillation or Replay, or DDP")


def at_least_fp32(value: Tensor) -> Tensor:
    """Return `value` in fp32, or as it is in fp64."""
    return value if value.dtype == torch.float64 else value.float()


def drawn(count: int, batch_size: int, seed: int, draw: int) -> Tensor:
    """Return the numbers of the samples of a draw, `[batch_size]`: each is drawn once before any is drawn again."""
    per_pass = count // batch_size
    generator = torch.Generator().manual_seed(seed * 1_000_003 + draw // per_pass)
    first = draw % per_pass * batch_size
    return torch.randperm(count, generator=generator)[first : first + batch_size]
