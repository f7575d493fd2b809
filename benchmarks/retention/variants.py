"""The compared ways of keeping old knowledge, as data."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

# Methods of the demo: LoRA on all blocks after the same linear probe, and four blocks that are selected.
BASES = ("head-first", "selective")

SHIFTS, SEEDS = ("noisy", "mnist"), (0, 1, 2, 3, 4)
# Weights are chosen here, on validation images.
TUNED_ON, TUNING_SEEDS = "noisy", (11,)
# Factors of the update of the variant "none": the curve to beat (WiSE-FT, arXiv 2109.01903). Close together, because
# the curve is convex: between two scales far apart a straight line would be above it.
SCALES = (0.0, 0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)


@dataclass(frozen=True)
class Variant:
    """One way of keeping old knowledge.

    Attributes:
        label: its name in the table.
        samples: what the model keeps its features on: "old" (64 unlabelled old images), "generic" (noise and
            shuffled patches), "mixed" (pairs of target images), "target" (target images), or "" for none.
        setting: the field of `TrainSettings` that has the weight; "" for replay, which is a term of its own.
        weights: to choose from.
        own: further settings.
        bases: the methods that it makes sense for.
    """

    label: str
    samples: str = ""
    setting: str = ""
    weights: tuple[float, ...] = (0.0,)
    own: Mapping[str, Any] = field(default_factory=dict)
    bases: tuple[str, ...] = BASES


# Without distillation, so that another term alone holds the features.
_ALONE: dict[str, Any] = {"retain_weight": 0.0}
# Selection ranks by gain over drift of the features, not over depth.
_PRICED: dict[str, Any] = {"depth_price": 0.0, "retain_weight": 0.0}
_ON_OLD: dict[str, Any] = {**_PRICED, "drift_data": "retained"}

VARIANTS: dict[str, Variant] = {
    "none": Variant("nothing"),
    "letters": Variant("distillation, old images", "old", "retain_weight", (0.5, 2.0, 8.0)),
    "generic": Variant("distillation, noise and patches", "generic", "retain_weight", (0.5, 2.0, 8.0)),
    "mixed": Variant("distillation, mixed new images", "mixed", "retain_weight", (0.1, 0.5, 2.0)),
    "target": Variant("distillation, new images (LwF)", "target", "retain_weight", (0.1, 0.5, 2.0)),
    "drift-target": Variant("local drift, new images", "target", "drift_penalty", (0.01, 0.1, 1.0), _ALONE),
    "drift-letters": Variant("local drift, old images", "old", "drift_penalty", (0.01, 0.1, 1.0), _ALONE),
    "l2": Variant("L2 to the base", "", "l2_penalty", (0.001, 0.01, 0.1)),
    "ewc-letters": Variant("EWC, old images", "old", "ewc_penalty", (0.1, 1.0, 10.0), _ALONE),
    "ewc-generic": Variant("EWC, noise and patches", "generic", "ewc_penalty", (0.1, 1.0, 10.0), _ALONE),
    "replay": Variant("replay, labelled old images", "old", "", (0.3, 1.0, 3.0), _ALONE),
    "price-letters": Variant(
        "price on feature drift, old images", "old", "drift_price", (0.5, 1.0, 2.0), _ON_OLD, ("selective",)
    ),
    "price-generic": Variant(
        "price on feature drift, noise and patches", "", "drift_price", (0.5, 1.0, 2.0), _PRICED, ("selective",)
    ),
}
