"""Weighted k-NN on features: how well features separate the classes of a data set, without a trained head.

As in DINO (Caron et al. 2021, arXiv 2104.14294): features are L2-normalised, the k nearest training images by
cosine similarity vote for their class with weight `exp(similarity / 0.07)`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from slora.errors import ConfigError, DataError
from slora.evaluation.labels import require_labels
from slora.evaluation.similarity import similarities
from slora.io.bounded import is_count
from slora.io.plain import plain
from slora.models.features import final_features
from slora.module_tree.modes import evaluating

NEIGHBOURS = (10, 20, 100, 200)
TEMPERATURE = 0.07


@torch.no_grad()
def features(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return `(features [n, d] fp32, labels [n])` on `device`, of a model in evaluation mode.

    The features are those of `slora.models.features.final_features`. The mode of the model is restored.

    Raises:
        ConfigError: slora does not find final features in the model.
        DataError: there is no image.
    """
    embed = final_features(model)
    with evaluating(model):
        found = [(embed(images.to(device)).float(), labels.to(device)) for images, labels in batches]
    if not found:
        raise DataError("there is no image to compute features of; give at least one")
    return torch.cat([x for x, _ in found]), torch.cat([labels for _, labels in found])


@torch.no_grad()
def knn_accuracy(
    bank: Tensor,
    bank_labels: Tensor,
    queries: Tensor,
    query_labels: Tensor,
    k: Sequence[int] = NEIGHBOURS,
    temperature: float = TEMPERATURE,
) -> dict[int, float]:
    """Return `{k: accuracy}`, the share of queries classified correctly.

    Memory is bounded: similarities are computed for a chunk of queries at a time.

    Args:
        bank: features of the images that vote, `[b, d]`; normalised here.
        bank_labels: their classes, `[b]` integers from 0.
        queries: features of the images to classify, `[q, d]`.
        query_labels: their classes, `[q]`.
        k: numbers of neighbours; each from 1 to b.
        temperature: divides the similarity in the exponent of a vote.

    Raises:
        ConfigError: there is no k or one is out of range, or the temperature is not positive.
        DataError: shapes disagree, a feature is not finite, or labels are not integers from 0.
    """
    if not temperature > 0:
        raise ConfigError(f"temperature={temperature} is not positive; DINO uses 0.07")
    if not k:
        raise ConfigError(f"k is empty; give numbers of neighbours, such as {NEIGHBOURS[0]}")
    for neighbours in k:
        if not is_count(plain(neighbours)) or not 1 <= neighbours <= len(bank):
            raise ConfigError(f"k={neighbours} is not from 1 to {len(bank)}, the number of images that vote")
    if bank.dim() != 2 or queries.dim() != 2 or bank.shape[1] != queries.shape[1]:
        raise DataError(f"features of shapes {list(bank.shape)} and {list(queries.shape)}; expected [b, d] and [q, d]")
    if len(bank) != len(bank_labels) or len(queries) != len(query_labels) or not len(queries):
        raise DataError(
            f"{len(bank)} and {len(queries)} features with {len(bank_labels)} and {len(query_labels)} labels; "
            f"expected one label each, and at least one query"
        )
    require_labels(bank_labels, len(bank))
    require_labels(query_labels, len(queries))
    if not bool(torch.isfinite(bank).all() and torch.isfinite(queries).all()):
        raise DataError("a feature is NaN or infinite; the model was damaged, or an image is not finite")
    classes = int(torch.cat([bank_labels, query_labels]).max()) + 1
    correct = dict.fromkeys(k, 0)
    for all_similarities, targets in similarities(queries, query_labels, bank):
        similarity, nearest = all_similarities.topk(max(k), dim=1)
        weights, voted = (similarity / temperature).exp(), bank_labels[nearest]
        for neighbours in k:
            votes = weights.new_zeros(len(targets), classes)
            votes.scatter_add_(1, voted[:, :neighbours], weights[:, :neighbours])
            correct[neighbours] += int((votes.argmax(1) == targets).sum())
    return {neighbours: hits / len(queries) for neighbours, hits in correct.items()}
