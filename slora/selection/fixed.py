"""`First`, `Last`, `Random` and `All`: choices that know nothing of the task, to compare with.

One file, because each is one line: the order in which it takes blocks.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any, ClassVar

from torch import nn

from slora.config import Unit
from slora.errors import ConfigError
from slora.io.plain import plain
from slora.selection.one_shot import OneShot


class First(OneShot):
    """Keeps the first blocks of the model that fit the budget, in the order of `slora.active_blocks`."""

    name: ClassVar[str] = "first"

    def order(self) -> list[int]:
        """See `OneShot.order`."""
        return list(range(self.n))


class Last(OneShot):
    """Keeps the last blocks of the model that fit the budget, in the order of `slora.active_blocks`."""

    name: ClassVar[str] = "last"

    def order(self) -> list[int]:
        """See `OneShot.order`."""
        return list(range(self.n))[::-1]


class Random(OneShot):
    """Keeps blocks drawn at random, in the same order for every budget and in every process.

    Args:
        seed: the same seed gives the same blocks.
        model, budget, steps, unit, forward, now: see `OneShot`.
    """

    name: ClassVar[str] = "random"

    def __init__(
        self,
        model: nn.Module,
        budget: int | float,
        steps: int,
        *,
        seed: int = 0,
        unit: Unit = "blocks",
        forward: Callable[[], object] | None = None,
        now: bool = True,
    ) -> None:
        self.seed = plain(seed)
        if isinstance(self.seed, bool) or not isinstance(self.seed, int):
            raise ConfigError(f"seed={seed!r} is not a seed; use an integer")
        super().__init__(model, budget, steps, unit=unit, forward=forward, now=now)

    def order(self) -> list[int]:
        """See `OneShot.order`."""
        draw = random.Random(f"blocks {self.seed}")
        drawn: dict[int, None] = {}
        while len(drawn) < self.n:
            drawn[draw.randrange(self.n)] = None
        return list(drawn)

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON values."""
        return super().state_dict() | {"seed": self.seed}


class All(OneShot):
    """Keeps every block: LoRA everywhere, as one end of a comparison.

    Args:
        model: adapted by `slora.inject`.
        steps: optimizer steps of the run.
    """

    name: ClassVar[str] = "all"

    def __init__(self, model: nn.Module, steps: int) -> None:
        super().__init__(model, 1.0, steps)

    def order(self) -> list[int]:
        """See `OneShot.order`."""
        return list(range(self.n))
