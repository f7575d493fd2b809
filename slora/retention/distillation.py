"""`Distillation`: a loss term that keeps the features of unlabelled samples close to those of the base model."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor, nn

from slora.errors import ConfigError
from slora.io.plain import plain
from slora.layers import adapted_layers
from slora.models.disabled import disabled
from slora.models.features import final_features
from slora.module_tree.modes import evaluating


class Distillation:
    """A loss term; call it in each step and add the result to the loss.

        keep = slora.retention.Distillation(model, old_images)
        for x, y in loader:
            loss = criterion(model(x), y) + keep()

    The value is `weight * mean_z ||f(z) - f_base(z)||^2 / mean_z ||f_base(z) - mean f_base||^2` over `batch_size` of
    the samples: the drift of the final features relative to their variance. (Learning without Forgetting, arXiv
    1606.09282, distils outputs on new samples; this distils features, which need no old head, on old samples.) The base
    features are computed once, with the blocks switched off.

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
        if not isinstance(samples, Tensor):
            raise ConfigError(f"samples are a {type(samples).__name__}, not a tensor; stack them: torch.stack(images)")
        if len(samples) < 2:
            raise ConfigError(f"samples holds {len(samples)} samples, fewer than 2; a few dozen are enough")
        weight, batch_size, every = plain(weight), plain(batch_size), plain(every)
        if not isinstance(weight, (int, float)) or not (math.isfinite(weight) and weight >= 0):
            raise ConfigError(f"weight={weight!r} is negative or not a finite number; use 0 or more")
        for name, value in (("batch_size", batch_size), ("every", every)):
            if not isinstance(value, int) or value < 1:
                raise ConfigError(f"{name}={value!r} is not a positive integer")
        if features is not None and not callable(features):
            raise ConfigError(f"features={features!r} is not a function from samples to features [n, d]")
        if not any(True for _ in adapted_layers(model)):
            raise ConfigError(
                "the model has no adapted layer to switch off for its base features; call slora.inject first"
            )
        self.model, self.weight, self.every, self.seed = model, weight, every, seed
        self.batch_size = min(batch_size, len(samples))
        self.features = final_features(model) if features is None else features
        device = next(model.parameters()).device
        self.samples = samples.to(device)
        self.base = self._of_base(model)
        if self.base.dim() != 2:
            raise ConfigError(f"features have shape {list(self.base.shape)}, expected [n, d]; pool them first")
        variance = (self.base - self.base.mean(0)).square().sum(1).mean()
        # For samples with equal features the variance is no scale.
        self.scale = torch.where(variance > 1e-12, variance, self.base.square().sum(1).mean().clamp(min=1e-12))
        self.calls = 0

    @torch.no_grad()
    def _of_base(self, model: nn.Module) -> Tensor:
        with evaluating(model), disabled(model):
            return torch.cat([self.features(chunk).float() for chunk in self.samples.split(256)])

    def __call__(self, step: int | None = None) -> Tensor:
        """Return the term of this step, a scalar; 0, without computation, in steps without the term.

        Args:
            step: number of the step, which determines the samples; by default calls are counted.
        """
        if step is None:
            step, self.calls = self.calls, self.calls + 1
        if step % self.every or not self.weight:
            return self.base.new_zeros(())
        rows = self._rows(step // self.every)
        # In evaluation mode, like the base features: dropout would count as drift.
        with evaluating(self.model):
            drift = (self.features(self.samples[rows]).float() - self.base[rows]).square().sum(1).mean()
        return self.weight * self.every * drift / self.scale

    def _rows(self, draw: int) -> Tensor:
        # Every sample is drawn once before any is drawn again.
        per_pass = len(self.samples) // self.batch_size
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + draw // per_pass)
        order = torch.randperm(len(self.samples), generator=generator)
        first = draw % per_pass * self.batch_size
        return order[first : first + self.batch_size].to(self.samples.device)
