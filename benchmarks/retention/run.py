"""One training run of the demo with a way of keeping old knowledge."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import slora
from benchmarks.retention.variants import VARIANTS
from slora.demo.letters import letters
from slora.demo.methods import RETAINED, RETAINED_COUNT, Source, judged, pretrained, settings_of
from slora.demo.shifts import Pair, task
from slora.models.features import final_features
from slora.retention import Replay, Term, generic_samples, mixed_samples
from slora.training import prepare, train


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
