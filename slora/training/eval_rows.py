"""The rows of an evaluation: each measurement before and after fine-tuning."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slora.errors import ConfigError
from slora.evaluation.accuracy import Accuracy, accuracy
from slora.evaluation.few_shot import few_shot_indices, linear_probe_accuracy
from slora.evaluation.knn import features, knn_accuracy
from slora.evaluation.retrieval import RECALL_AT, image_embeddings, recall_at_k, text_embeddings
from slora.models.input_spec import InputSpec
from slora.runs.eval_table import Row, row
from slora.runs.settings import TrainSettings
from slora.sources.batches import Batches, Data
from slora.sources.captions import Captions
from slora.sources.data import Source
from slora.sources.eval_sets import EvalSet
from slora.training.eval_models import Classifiers, Evaluated

Batched = Callable[[Data], Batches]


class Measured:
    """Measurements of a model before and after fine-tuning.

    Args:
        before, after: the model in both states; only one of them needs to be on `device` at a time.
        spec: the images it takes.
        batched: a data set as batches on `device`.
    """

    def __init__(
        self, before: Evaluated, after: Evaluated, spec: InputSpec, batched: Batched, device: torch.device
    ) -> None:
        self.states = before, after
        self.spec, self.batched, self.device = spec, batched, device

    def suite(self, made: Classifiers, suite: EvalSet) -> list[Row]:
        """Return the row of a suite: top-1 accuracy, NLL and calibration error."""
        with _naming(suite.name, made.settings):
            models = [made.of_suite(state, suite) for state in self.states]
            return [self._accuracy(made.task(suite), suite.name, models, suite.data(self.spec))]

    def zero_shot(self, made: Classifiers, images: EvalSet) -> list[Row]:
        """Return the row of zero-shot classification."""
        with _naming(images.name, made.settings):
            models = [made.zero_shot(state, images) for state in self.states]
            return [self._accuracy("zero-shot", images.name, models, images.data(self.spec))]

    def own(self, name: str, data: Data, after: Accuracy) -> list[Row]:
        """Return the row of the run's own evaluation images, of which `after` is known."""
        before = self.states[0].head
        scores = None if before is None else accuracy(before.to(self.device), self.batched(data).epoch(), self.device)
        return [_of_accuracy("id", name, scores, after)]

    def retrieval(self, captions: Captions) -> list[Row]:
        """Return rows of recall@k: text to image, then image to text; only k up to the number of images."""
        ks = [k for k in RECALL_AT if k <= len(captions.images)]
        found = []
        for state in self.states:
            assert state.clip is not None
            clip = state.clip.model.to(self.device)
            images, numbers = image_embeddings(clip, self.batched(captions.data(self.spec)).epoch(), self.device)
            # Images that cannot be read are left out, and their captions with them.
            place = {int(number): i for i, number in enumerate(numbers.tolist())}
            texts = [(t, place[n]) for t, n in zip(captions.texts, captions.image_of_text, strict=True) if n in place]
            embedded = text_embeddings(clip, state.clip.tokenizer, [t for t, _ in texts], self.device)
            owners = torch.tensor([n for _, n in texts], device=self.device)
            found.append(recall_at_k(images, embedded, owners, [k for k in ks if k <= len(images)]))
        before, after = found
        rows = []
        for direction in ("text_to_image", "image_to_text"):
            count = len(captions.texts if direction == "text_to_image" else captions.images)
            first, last = getattr(before, direction), getattr(after, direction)
            for k, share in first.items():
                name = f"R@{k} {direction.replace('_', ' ')}"
                rows.append(row("retrieval", captions.name, name, share, last[k], count))
        return rows

    def source(self, source: Source, k: Sequence[int], shots: Sequence[int], seed: int) -> tuple[list[Row], list[Row]]:
        """Return rows of k-NN on a data set, and rows of a linear probe and k-NN on a few shots of it.

        With n shots, n neighbours vote.
        """
        pairs = [(self._features(state, source)) for state in self.states]
        queries = len(pairs[0][2])
        shares = [knn_accuracy(*pair, k=k) for pair in pairs]
        rows = [row("knn", source.name, f"{n}-NN", shares[0][n], shares[1][n], queries) for n in k]
        few = []
        for n in shots:
            chosen = few_shot_indices(pairs[0][1].cpu(), n, seed, source.classes)
            banks = [(bank[chosen], labels[chosen], x, y) for bank, labels, x, y in pairs]
            probed = [linear_probe_accuracy(*bank) for bank in banks]
            voted = [knn_accuracy(*bank, k=[n])[n] for bank in banks]
            for metric, (before, after) in ((f"{n}-shot linear", probed), (f"{n}-shot {n}-NN", voted)):
                few.append(row("few-shot", source.name, metric, before, after, queries))
        return rows, few

    def _features(self, state: Evaluated, source: Source) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        return source_features(state.model.to(self.device), source, self.spec, self.batched, self.device)

    def _accuracy(self, task: str, name: str, models: Sequence[Any], data: Data) -> Row:
        scores = [
            None if model is None else accuracy(model.to(self.device), self.batched(data).epoch(), self.device)
            for model in models
        ]
        assert scores[1] is not None
        return _of_accuracy(task, name, scores[0], scores[1])


@contextlib.contextmanager
def _naming(data: str, settings: TrainSettings) -> Iterator[None]:
    """Say of a refusal, as of a class name that a tokenizer does not know, on what the model was to be evaluated."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{settings.model} cannot be evaluated on {data}: {error}") from error


def source_features(
    model: nn.Module, source: Source, spec: InputSpec, batched: Batched, device: torch.device
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return features and labels of the training images of a data set, then those of its evaluation images."""
    bank, queries = (
        features(model, batched(source.data(spec, training=training)).epoch(), device) for training in (True, False)
    )
    return *bank, *queries


def _of_accuracy(task: str, name: str, before: Accuracy | None, after: Accuracy) -> Row:
    found = row(task, name, "top-1", None if before is None else before.top1, after.top1, after.count)
    for key, attribute in (("top5", "top5"), ("nll", "loss"), ("calibration_error", "calibration_error")):
        first = None if before is None else getattr(before, attribute)
        found[key] = {"before": first, "after": getattr(after, attribute)}
    return found
