"""`strategy`: the selection strategy that settings ask for, and the samples that its ranking uses."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from functools import cached_property

import torch
from torch import Tensor, nn

from slora.config import DEPTH_PRICE, DRIFT_PRICE
from slora.errors import ConfigError
from slora.evaluation.accuracy import logits_of
from slora.gates.values import gates as gates_of
from slora.models.features import final_features
from slora.module_tree.modes import evaluating
from slora.retention import generic_samples
from slora.runs.settings import TrainSettings
from slora.selection import Budget, Gates, SoloGain, Strategy, budget, gates

# Training images for the loss of `SoloGain`, and samples for its drift.
SAMPLE, DRIFT_SAMPLE = 128, 64


def strategy(
    model: nn.Module,
    steps: int,
    settings: TrainSettings,
    sample: Callable[[int], tuple[Tensor, Tensor]],
    criterion: Callable[[Tensor, Tensor], Tensor],
    autocast: Callable[[], contextlib.AbstractContextManager[object]],
    retains: bool = False,
) -> Strategy | None:
    """Return the active strategy of a run of `steps` steps on `model`.

    None for methods without selection, and if there is no budget and the gates are frozen.

    Args:
        sample: returns a number of training images with their labels, the same ones at every call.
        criterion: `(logits, labels) -> scalar`.
        autocast: returns the context that the model runs in.
        retains: whether the run distils features on old samples.

    Raises:
        ConfigError: the budget is out of range, or `drift_price` is set for a model without final features.
    """
    if settings.method != "selective":
        return None
    warmup = settings.selection_warmup
    if settings.budget is None:
        if not any(gate.requires_grad for gate in gates_of(model)):
            return None
        return Gates(
            model,
            steps,
            penalty=settings.penalty,
            warmup=gates.WARMUP if warmup is None else warmup,
            settling=gates.SETTLING if settings.settling is None else settings.settling,
        )
    measured = _Measured(model, sample, criterion, autocast, settings.seed)
    ranking = None
    if settings.ranking == "solo":
        price, depth = settings.drift_price, settings.depth_price
        price = (DRIFT_PRICE if retains else 0.0) if price is None else price
        depth = (0.0 if retains else DEPTH_PRICE) if depth is None else depth
        if price:
            # Fail now rather than when selection begins.
            try:
                final_features(model)
            except ConfigError as error:
                raise ConfigError(f"drift_price={price}: {error}; or set drift_price to 0") from error
        ranking = SoloGain(measured.loss, measured.features if price else None, price, depth)
    chosen = Budget(
        model,
        settings.budget,
        steps,
        unit=settings.budget_unit,
        ranking=ranking,
        warmup=budget.WARMUP if warmup is None else warmup,
        settling=budget.SETTLING if settings.settling is None else settings.settling,
    )
    if settings.budget_unit == "flops":
        # Fail now, not after the first step, if the share is too small.
        with torch.no_grad(), evaluating(model), autocast():
            model(sample(1)[0])
        chosen.check_rows()
    return chosen


class _Measured:
    """Loss and final features of a model on fixed samples."""

    def __init__(
        self,
        model: nn.Module,
        sample: Callable[[int], tuple[Tensor, Tensor]],
        criterion: Callable[[Tensor, Tensor], Tensor],
        autocast: Callable[[], contextlib.AbstractContextManager[object]],
        seed: int,
    ) -> None:
        self.model, self.sample, self.criterion = model, sample, criterion
        self.autocast, self.seed = autocast, seed

    @cached_property
    def images(self) -> tuple[Tensor, Tensor]:
        return self.sample(SAMPLE)

    @cached_property
    def generic(self) -> Tensor:
        images = self.images[0]
        if images.dim() != 4:
            # Inputs that are not images have no patches.
            return images[:DRIFT_SAMPLE]
        patch = max(1, min(images.shape[2:]) // 4)
        return generic_samples(images, DRIFT_SAMPLE, patch=patch, seed=self.seed)

    def loss(self) -> Tensor:
        images, labels = self.images
        with self.autocast():
            return self.criterion(logits_of(self.model(images)), labels)

    def features(self) -> Tensor:
        with self.autocast():
            return final_features(self.model)(self.generic)


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
