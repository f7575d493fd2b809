"""`strategy`: the selection strategy that settings ask for, by a table of factories, and the samples it measures on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from slora.config import DEPTH_PRICE, DRIFT_PRICE
from slora.errors import ConfigError
from slora.gates.values import gates as gates_of
from slora.models.features import final_features
from slora.module_tree.modes import evaluating
from slora.retention import generic_samples
from slora.runs.settings import TrainSettings
from slora.runs.strategies import STRATEGIES
from slora.selection import (
    AdaLoRA,
    All,
    Budget,
    CoDyRA,
    First,
    Gates,
    IncreLoRA,
    Last,
    Random,
    Sensitivity,
    SoloGain,
    SoRA,
    Strategy,
)
from slora.training.loss import Criterion, takes_labels, task_loss

# Training images for the loss of `SoloGain`, and samples for its drift.
SAMPLE, DRIFT_SAMPLE = 128, 64

# Batches of `Sensitivity`, as in the code of SPT (arXiv 2303.08566), and the images in each: fixed, so that the choice
# depends neither on the batch size nor on the number of processes.
SENSITIVITY_BATCHES, SENSITIVITY_BATCH = 8, 32


@dataclass(frozen=True)
class Given:
    """What a run gives to the factory of its strategy.

    Attributes:
        model: adapted, with all of its blocks still trainable.
        steps: optimizer steps of the run.
        settings: those of the run.
        sample: returns a number of training images with their labels, the same ones at every call.
        criterion: `(logits, labels) -> scalar`.
        autocast: returns the context that the model runs in.
        retains: whether the run distils features on old samples.
        retain: those samples, or None.
    """

    model: nn.Module
    steps: int
    settings: TrainSettings
    sample: Callable[[int], tuple[Tensor, Tensor]]
    criterion: Criterion
    autocast: Callable[[], contextlib.AbstractContextManager[object]]
    retains: bool = False
    retain: Tensor | None = None

    def loss(self, images: Tensor, labels: Tensor) -> Tensor:
        """Return the loss of the run, in the present mode of the model."""
        with self.autocast():
            return task_loss(self.model, images, labels, self.criterion, takes_labels(self.model))[0]

    def phases(self) -> dict[str, float]:
        """Return the arguments `warmup` and `settling` of a strategy: the settings, or its defaults."""
        default = STRATEGIES[self.settings.chosen_strategy].phases
        assert default is not None
        set_by_user = self.settings.selection_warmup, self.settings.settling
        return {
            name: own if value is None else value
            for name, own, value in zip(("warmup", "settling"), default, set_by_user, strict=True)
        }

    def forward(self) -> None:
        """Run the model on one image."""
        self.loss(*self.sample(1))

    def one_shot(self) -> dict[str, Any]:
        """Return the arguments of a strategy that chooses before the first step, once the head is trained."""
        return {
            "budget": self.settings.budget,
            "steps": self.steps,
            "unit": self.settings.unit,
            "forward": self.forward,
            "now": False,
        }


def strategy(given: Given) -> Strategy | None:
    """Return the active strategy of a run.

    None for methods without selection, and if there is no budget and the gates are frozen.

    Raises:
        ConfigError: the budget is out of range, or `drift_price` is set for a model without final features.
    """
    if given.settings.method != "selective":
        return None
    return FACTORIES[given.settings.chosen_strategy](given)


def _gates(given: Given) -> Strategy | None:
    if not any(gate.requires_grad for gate in gates_of(given.model)):
        return None
    return Gates(given.model, given.steps, penalty=given.settings.penalty, **given.phases())


def _budget(given: Given) -> Strategy:
    settings = given.settings
    assert settings.budget is not None
    ranking = _solo_gain(given) if settings.ranking == "solo" else None
    chosen = Budget(given.model, settings.budget, given.steps, unit=settings.unit, ranking=ranking, **given.phases())
    if settings.unit == "flops":
        # Fail now, not after the first step, if the share is too small.
        with torch.no_grad(), evaluating(given.model):
            given.forward()
        chosen.check_rows()
    return chosen


def _sensitivity(given: Given) -> Strategy:
    def batches() -> Iterator[tuple[Tensor, Tensor]]:
        images, labels = given.sample(SENSITIVITY_BATCHES * SENSITIVITY_BATCH)
        yield from zip(images.split(SENSITIVITY_BATCH), labels.split(SENSITIVITY_BATCH), strict=True)

    price = given.settings.depth_price or 0.0
    return Sensitivity(given.model, batches=batches(), loss=given.loss, depth_price=price, **given.one_shot())


def _random(given: Given) -> Strategy:
    return Random(given.model, seed=given.settings.seed, **given.one_shot())


def _one_shot(kind: Callable[..., Strategy]) -> Callable[[Given], Strategy]:
    return lambda given: kind(given.model, **given.one_shot())


def _ranks(kind: Callable[..., Strategy]) -> Callable[[Given], Strategy]:
    return lambda given: kind(given.model, given.settings.budget, given.steps, **given.phases())


# A factory for each entry of `slora.runs.strategies.STRATEGIES`.
FACTORIES: dict[str, Callable[[Given], Strategy | None]] = {
    "gates": _gates,
    "budget": _budget,
    "sora": _ranks(SoRA),
    "codyra": _ranks(CoDyRA),
    "increlora": _ranks(IncreLoRA),
    "adalora": _ranks(AdaLoRA),
    "sensitivity": _sensitivity,
    "random": _random,
    "first": _one_shot(First),
    "last": _one_shot(Last),
    "all": lambda given: All(given.model, given.steps),
}


def _solo_gain(given: Given) -> SoloGain:
    settings, measured = given.settings, _Measured(given)
    price, depth = settings.drift_price, settings.depth_price
    on_retained = settings.drift_data == "retained"
    if on_retained and given.retain is None:
        raise ConfigError("drift_data='retained' needs retained samples; set retain_data (in Python give retain)")
    price = (DRIFT_PRICE if given.retains or on_retained else 0.0) if price is None else price
    depth = (0.0 if given.retains or on_retained else DEPTH_PRICE) if depth is None else depth
    if price:
        # Fail now rather than when selection begins.
        try:
            _drift_features(given.model)
        except ConfigError as error:
            raise ConfigError(f"drift_price={price}: {error}; or set drift_price to 0") from error
    return SoloGain(measured.loss, measured.features if price else None, price, depth)


def _drift_features(model: nn.Module) -> Callable[[Tensor], Tensor]:
    """The features whose drift is a price: the model's own choice, or its final features."""
    own: Callable[[Tensor], Tensor] | None = getattr(model, "drift_features", None)
    return own or final_features(model)


class _Measured:
    """Loss and final features of a model on fixed samples."""

    def __init__(self, given: Given) -> None:
        self.given = given

    @cached_property
    def images(self) -> tuple[Tensor, Tensor]:
        return self.given.sample(SAMPLE)

    @cached_property
    def drifting(self) -> Tensor:
        """The samples whose features drift."""
        if self.given.settings.drift_data == "retained" and self.given.retain is not None:
            return self.given.retain[:DRIFT_SAMPLE].to(next(self.given.model.parameters()).device)
        images = self.images[0]
        if images.dim() != 4:
            # Inputs that are not images have no patches.
            return images[:DRIFT_SAMPLE]
        patch = max(1, min(images.shape[2:]) // 4)
        return generic_samples(images, DRIFT_SAMPLE, patch=patch, seed=self.given.settings.seed)

    def loss(self) -> Tensor:
        return self.given.loss(*self.images)

    def features(self) -> Tensor:
        with self.given.autocast():
            return _drift_features(self.given.model)(self.drifting)


def first_images(batches: Iterator[tuple[Tensor, Tensor]], count: int) -> tuple[Tensor, Tensor]:
    """Return up to `count` images and labels from the start of a pass over the training data."""
    images: list[Tensor] = []
    labels: list[Tensor] = []
    while sum(map(len, images)) < count:
        try:
            x, y = next(batches)
        except StopIteration:
            break
        images.append(x)
        labels.append(y)
    return torch.cat(images)[:count], torch.cat(labels)[:count]
