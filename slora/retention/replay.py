"""`Replay`: a loss term that goes on training a few labelled samples of the old data."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slora.errors import ConfigError
from slora.io.plain import count_of
from slora.models.logits import logits_of
from slora.module_tree.modes import evaluating
from slora.retention.term import Term, checked_samples, drawn, seed_of


class Replay(Term):
    """A loss term: the cross-entropy of `batch_size` labelled old samples, through the head that knows their classes.

    A model with a new head needs the old one: `predict=lambda z: old_head(features(z))`. Replay is the common control
    of continual learning (rehearsal, such as arXiv 1902.10486); unlike `Distillation` it needs labels.

    Costs a forward and a backward pass over `batch_size` samples every `every` steps.

    Args:
        model: adapted by `slora.inject`; not a wrapper around it.
        samples: inputs of the old data, `[n, ...]`, n at least 2.
        labels: their classes, `[n]` int64.
        weight: of the loss term.
        predict: `samples -> logits [n, classes]` of the old classes; by default the model itself, whose head was kept.
        batch_size: samples in a step.
        every: only every so many steps have the term, with a weight `every` times as large.
        seed: of the order of the samples.

    Raises:
        ConfigError: a value is out of range, or samples, labels and logits do not fit each other.
    """

    name = "replay"

    def __init__(
        self,
        model: nn.Module,
        samples: Tensor,
        labels: Tensor,
        weight: float = 1.0,
        *,
        predict: Callable[[Tensor], Tensor] | None = None,
        batch_size: int = 16,
        every: int = 2,
        seed: int = 0,
    ) -> None:
        super().__init__(model, weight, every)
        self.samples = checked_samples(samples, model)
        self.batch_size = min(count_of("batch_size", batch_size), len(samples))
        self.seed = seed_of("seed", seed)
        if predict is not None and not callable(predict):
            raise ConfigError(f"predict={predict!r} is not a function from samples to logits [n, classes]")
        self.predict: Callable[[Tensor], Any] = model if predict is None else predict
        if not isinstance(labels, Tensor) or labels.shape != (len(samples),) or labels.dtype != torch.int64:
            found = f"{labels.dtype} {list(labels.shape)}" if isinstance(labels, Tensor) else type(labels).__name__
            raise ConfigError(f"labels are {found}, expected torch.int64 [{len(samples)}], one class for each sample")
        with torch.no_grad(), evaluating(model):
            logits = logits_of(self.predict(self.samples[:2]))
        if logits.dim() != 2 or len(logits) != 2:
            raise ConfigError(f"the logits of 2 samples have shape {list(logits.shape)}, expected [2, classes]")
        low, high = int(labels.min()), int(labels.max())
        if low < 0 or high >= logits.shape[1]:
            raise ConfigError(
                f"labels go from {low} to {high}, but the head has {logits.shape[1]} outputs; give `predict` with the "
                f"head that was trained on these classes"
            )
        self.labels = labels.to(self.samples.device)

    def value(self, draw: int) -> Tensor:
        """Return the cross-entropy of the samples of a draw, in nats."""
        rows = drawn(len(self.samples), self.batch_size, self.seed, draw).to(self.samples.device)
        with evaluating(self.model):
            return F.cross_entropy(logits_of(self.predict(self.samples[rows])).float(), self.labels[rows])
