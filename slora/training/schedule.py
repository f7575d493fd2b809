"""`Schedule`: the training batches of a run, its steps, and the learning rate at each."""

from __future__ import annotations

import math
from collections.abc import Iterator

from torch import Tensor

from slora.errors import ConfigError
from slora.runs.settings import TrainSettings
from slora.sources.batches import Batches, check_batch_size


class Schedule:
    """The steps of a run: each takes `accumulation` batches, and an incomplete one at the end of an epoch is skipped.

    Args:
        batches: the training batches of this process.

    Attributes:
        steps: optimizer steps of the run.
        steps_per_epoch: of them, those of a pass over the data.
        hold: step at which the cosine decay of the learning rate begins; 0 for the end of the warm-up.

    Raises:
        ConfigError: the data are too few for one step.
    """

    def __init__(self, settings: TrainSettings, batches: Batches) -> None:
        self.batches = batches
        self.accumulation = settings.gradient_accumulation
        check_accumulation(settings, len(batches), batches.count)
        self.steps_per_epoch = len(batches) // self.accumulation
        self.steps = settings.max_steps or settings.epochs * self.steps_per_epoch
        self.warmup = round(settings.warmup * self.steps)
        self.floor = settings.min_lr_ratio
        self.hold = 0 if settings.lr_hold is None else round(settings.lr_hold * self.steps)

    def scale(self, step: int) -> float:
        """Return the factor on the learning rates of the weights at `step`, from 0; see `lr_scale`."""
        return lr_scale(step, self.steps, self.warmup, self.floor, self.hold)

    def due(self, every: int | None, step: int) -> bool:
        """Whether something that happens every `every` steps is due after `step`; None is once per epoch, 0 never."""
        every = self.steps_per_epoch if every is None else every
        return every > 0 and step % every == 0

    def rest_of_epoch(self, step: int) -> tuple[Iterator[tuple[Tensor, Tensor]], int]:
        """Return the batches from `step` on, and the number of steps left in its epoch and in the run."""
        epoch, done = divmod(step, self.steps_per_epoch)
        left = min(self.steps_per_epoch - done, self.steps - step)
        return self.batches.epoch(epoch, done * self.accumulation), left

    def images(self, batch: int) -> Tensor:
        """Return the images of batch number `batch` of the run."""
        epoch, number = divmod(batch, self.steps_per_epoch * self.accumulation)
        return next(iter(self.batches.epoch(epoch, number)))[0]


def check_images(settings: TrainSettings, count: int, world: int = 1) -> None:
    """Check that `count` training images suffice for a step of `world` processes.

    Raises:
        ConfigError: they do not.
    """
    check_batch_size(settings.batch_size, count, world)
    check_accumulation(settings, count // (settings.batch_size * world), count)


def check_accumulation(settings: TrainSettings, batches: int, count: int) -> None:
    """Check that the `batches` of an epoch, of `count` images, suffice for a step.

    Raises:
        ConfigError: they do not.
    """
    if batches < settings.gradient_accumulation:
        raise ConfigError(
            f"gradient_accumulation={settings.gradient_accumulation} times batch_size={settings.batch_size} exceeds "
            f"the {count} training images; lower one of them"
        )


def lr_scale(step: int, steps: int, warmup: int, floor: float = 0.0, hold: int = 0) -> float:
    """Return the factor on the learning rates of the weights at `step` (from 0) of a run of `steps` steps.

    `(step + 1) / warmup` during the warm-up, 1 up to step `hold`, then `floor + (1 - floor) * (1 + cos(pi * t)) / 2`,
    where t goes from 0 to 1 at `steps`.
    """
    if step < warmup:
        return (step + 1) / warmup
    start = min(max(warmup, hold), steps)
    t = max(0, step - start) / max(1, steps - start)
    return floor + (1.0 - floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, t)))
