"""What keeps old knowledge, compared on the demo: the variants as data, and one training run of each.

A method of the demo that chooses or trains blocks (`BASES`) runs with each of `VARIANTS`. The weight of a variant is
chosen among three on validation images, with seeds that the results do not use; the results are on test images.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import slora
from slora.demo.letters import letters
from slora.demo.methods import RETAINED, RETAINED_COUNT, Source, judged, pretrained, settings_of
from slora.demo.shifts import Pair, task
from slora.models.features import final_features
from slora.retention import Replay, Term, generic_samples, mixed_samples
from slora.training import prepare, train

# Methods of the demo: LoRA on all blocks after the same linear probe, and four blocks that are selected.
BASES = ("head-first", "selective")

# Choose weights with these; the results have the demo's seeds, from 0.
VALIDATION_SEEDS = (11,)
SCALES = (0.25, 0.5, 0.75)


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
        "price on feature drift, old images", "old", "drift_price", (0.5, 1.0, 2.0), _PRICED, ("selective",)
    ),
    "price-generic": Variant(
        "price on feature drift, noise and patches", "", "drift_price", (0.5, 1.0, 2.0), _PRICED, ("selective",)
    ),
}


def run_variant(
    base: str, variant: str, weight: float, shift: str, seed: int, source: Source, validation: bool = False,
    scales: Sequence[float] = (),
) -> dict[str, Any]:  # fmt: skip
    """Train once and return an entry: what `slora.demo.methods.judged` measures, also at `scales`, and the seconds.

    Args:
        base: a method of `BASES`.
        variant: a name in `VARIANTS`.
        weight: of its setting.
        shift: a name in `slora.demo.shifts.SHIFTS`.
        seed: of the run.
        source: the letters.
        validation: whether to judge on validation images instead of test images.
        scales: factors on the update at which it is judged, too, as if merged with them (WiSE).
    """
    chosen = VARIANTS[variant]
    settings = settings_of(base, seed).replace(count_flops=False, **chosen.own)
    if chosen.setting:
        settings = settings.replace(**{chosen.setting: weight})
    training, test = task(shift, seed, validation)
    torch.manual_seed(seed)
    model = prepare(pretrained(), settings=settings)
    old, labels = _old(source)

    def replay(model: nn.Module) -> Sequence[Term]:
        features = final_features(model)
        return [Replay(model, old, labels, weight, predict=lambda z: source.letter_head(features(z)))]

    outcome = train(
        model,
        TensorDataset(*training),
        None,
        settings,
        retain=_samples(chosen.samples, source, training[0], seed),
        terms=replay if variant == "replay" else None,
    )
    found = {scale: judged(model, test, source, scale) for scale in (*scales, 1.0)}
    return {
        "base": base,
        "variant": variant,
        "weight": weight,
        "shift": shift,
        "seed": seed,
        "validation": validation,
        "seconds": outcome.seconds,
        "active": sum(int(on.sum()) for on in slora.active_blocks(model).values()),
        **found.pop(1.0),
        "scaled": [{"scale": scale, **values} for scale, values in found.items()],
    }


def _old(source: Source) -> Pair:
    """The retained letters of the demo with their labels."""
    images, labels = letters(*RETAINED)
    rows = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:RETAINED_COUNT]
    assert torch.equal(images[rows], source.retained)
    return source.retained, labels[rows]


def _samples(kind: str, source: Source, images: Tensor, seed: int) -> Tensor | None:
    if kind == "old":
        return source.retained
    if kind == "generic":
        return generic_samples(images[:256], RETAINED_COUNT, patch=4, seed=seed)
    if kind == "mixed":
        return mixed_samples(images[:256], RETAINED_COUNT, seed=seed)
    return images[:RETAINED_COUNT] if kind == "target" else None
