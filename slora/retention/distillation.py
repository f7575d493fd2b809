"""`Distillation`: a loss term that keeps the features of unlabelled samples close to those of the base model."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from slora.errors import ConfigError
from slora.io.plain import count_of
from slora.models.disabled import disabled
from slora.models.features import final_features
from slora.module_tree.modes import evaluating
from slora.retention.term import Term, at_least_fp32, checked_samples, drawn, seed_of


class Distillation(Term):
    """A loss term; call it in each step and add the result to the loss.

        keep = slora.retention.Distillation(model, old_images)
        for x, y in loader:
            loss = criterion(model(x), y) + keep()

    The value is `weight * mean_z ||f(z) - f_base(z)||^2 / mean_z ||f_base(z) - mean f_base||^2` over `batch_size` of
    the samples: the drift of the final features relative to their variance. (Learning without Forgetting, arXiv
    1606.09282, distils outputs on new samples; this distils features, which need no old head, on old samples, on
    proxies of them, or on the new ones.) The base features are computed once, with the blocks switched off.

    Costs a forward and a backward pass over `batch_size` samples every `every` steps.

    Args:
        model: adapted by `slora.inject`; not a wrapper around it.
        samples: unlabelled inputs of the old data, `[n, ...]`, n at least 2. A few dozen are enough.
        weight: of the loss term.
        features: `samples -> [n, d]`; by default `slora.models.features.final_features(model)`.
        batch_size: samples in a step.
        every: only every so many steps have the term, with a weight `every` times as large.
        seed: of the order of the samples.

    Raises:
        ConfigError: a value is out of range, or slora does not find final features in the model.
    """

    name = "distillation"

    def __init__(
        self,
        model: nn.Module,
        samples: Tensor,
        weight: float = 2.0,
        *,
        features: Callable[[Tensor], Tensor] | None = None,
        batch_size: int = 16,
        every: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(model, weight, every)
        self.samples = checked_samples(samples, model)
        self.batch_size = min(count_of("batch_size", batch_size), len(samples))
        self.seed = seed_of("seed", seed)
        self.features = features_of(model, features)
        self.base, self.scale = base_features(model, self.features, self.samples)

    def value(self, draw: int) -> Tensor:
        """Return the drift on the samples of a draw, relative to the variance of the features."""
        rows = self._rows(draw)
        # In evaluation mode, like the base features: dropout would count as drift.
        with evaluating(self.model):
            drift = (at_least_fp32(self.features(self.samples[rows])) - self.base[rows]).square().sum(1).mean()
        return drift / self.scale

    def _rows(self, draw: int) -> Tensor:
        return drawn(len(self.samples), self.batch_size, self.seed, draw).to(self.samples.device)


def features_of(model: nn.Module, features: Callable[[Tensor], Tensor] | None) -> Callable[[Tensor], Tensor]:
    """Return `features`, or the final features of `model`.

    Raises:
        ConfigError: `features` is not a function, or slora does not find final features in the model.
    """
    if features is not None and not callable(features):
        raise ConfigError(f"features={features!r} is not a function from samples to features [n, d]")
    return final_features(model) if features is None else features


@torch.no_grad()
def base_features(model: nn.Module, features: Callable[[Tensor], Tensor], samples: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features `[n, d]` of the base model, and the scale of their drift: their variance.

    Raises:
        ConfigError: the features have another shape, or are not finite.
    """
    with evaluating(model), disabled(model):
        base = torch.cat([at_least_fp32(features(chunk)) for chunk in samples.split(256)])
    if base.dim() != 2:
        raise ConfigError(f"features have shape {list(base.shape)}, expected [n, d]; pool them first")
    if not (finite := base.isfinite().all(1)).all():
        first = int((~finite).nonzero()[0])
        raise ConfigError(f"the base model's features of samples[{first}] hold NaN or infinity; remove that sample")
    variance = (base - base.mean(0)).square().sum(1).mean()
    # For samples with equal features the variance is no scale.
    return base, torch.where(variance > 1e-12, variance, base.square().sum(1).mean().clamp(min=1e-12))
