"""`loss_terms`: what the settings of a run add to its loss so that the model keeps what it knew."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import Tensor, nn

from slora.errors import ConfigError
from slora.retention import EWC, L2, Distillation, LocalDrift, Term
from slora.runs.settings import TrainSettings

Terms = Callable[[nn.Module], Sequence[Term]]
"""Makes terms of a user for a model, which is on the device of the run by then."""

# Training images for the local drift of a run without retained samples.
SAMPLE = 64


def loss_terms(
    model: nn.Module,
    settings: TrainSettings,
    retain: Tensor | None,
    sample: Callable[[int], tuple[Tensor, Tensor]],
    more: Terms | None = None,
) -> tuple[list[Term], LocalDrift | None]:
    """Return the terms of a run, and what measures the local drift of its blocks if the run logs or penalises it.

    Args:
        retain: inputs on which the model should stay as it was.
        sample: returns a number of training images with their labels, the same ones at every call.
        more: makes further terms.

    Raises:
        ConfigError: a term lacks its samples, or the model its blocks.
    """
    if settings.ewc_penalty and retain is None:
        raise ConfigError(
            f"ewc_penalty={settings.ewc_penalty:g} needs samples to find the important weights on; give retain"
        )
    terms: list[Term] = []
    drift = None
    if retain is not None and settings.retain_weight:
        terms.append(Distillation(model, retain, settings.retain_weight, seed=settings.seed))
    if settings.drift_penalty or settings.log_drift:
        samples = sample(SAMPLE)[0] if retain is None else retain
        drift = LocalDrift(model, samples, settings.drift_penalty, seed=settings.seed)
        terms.append(drift)
    if settings.l2_penalty:
        terms.append(L2(model, settings.l2_penalty))
    if settings.ewc_penalty and retain is not None:
        terms.append(EWC(model, retain, settings.ewc_penalty, seed=settings.seed))
    terms += () if more is None else more(model)
    return terms, drift
