"""Weighted k-NN, against the definition computed by brute force in numpy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from slora import ConfigError, DataError
from slora.evaluation import features, knn_accuracy, similarity


def brute_force(
    bank: np.ndarray, bank_labels: np.ndarray, queries: np.ndarray, query_labels: np.ndarray, k: int, temperature: float
) -> float:
    """The definition, one query and one neighbour at a time, in float64."""
    correct = 0
    for query, label in zip(queries, query_labels, strict=True):
        cosines = [
            float(np.dot(query, image)) / (math.sqrt(np.dot(query, query)) * math.sqrt(np.dot(image, image)))
            for image in bank
        ]
        nearest = sorted(range(len(bank)), key=lambda i: -cosines[i])[:k]
        votes: dict[int, float] = {}
        for i in nearest:
            votes[int(bank_labels[i])] = votes.get(int(bank_labels[i]), 0.0) + math.exp(cosines[i] / temperature)
        correct += max(votes, key=lambda c: votes[c]) == label
    return correct / len(queries)


def clusters(count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Features of 6 classes that overlap, of very different lengths."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(6, 12, generator=torch.Generator().manual_seed(0))
    labels = torch.randint(6, (count,), generator=generator)
    noisy = centres[labels] + 1.5 * torch.randn(count, 12, generator=generator)
    return noisy * torch.rand(count, 1, generator=generator) * 10, labels


@pytest.mark.parametrize("temperature", [0.07, 1.0])
def test_accuracy_is_that_of_the_definition(temperature: float) -> None:
    bank, bank_labels = clusters(230, 1)
    queries, query_labels = clusters(57, 2)
    result = knn_accuracy(bank, bank_labels, queries, query_labels, temperature=temperature)
    arrays = [t.double().numpy() for t in (bank, bank_labels, queries, query_labels)]
    assert result == {k: brute_force(*arrays, k, temperature) for k in (10, 20, 100, 200)}
    assert len(set(result.values())) > 1


def test_weights_decide_where_a_plain_majority_would_err() -> None:
    bank = torch.tensor([[1.0, 0.0], [0.6, 0.8], [0.6, 0.8]])
    labels = torch.tensor([0, 1, 1])
    assert knn_accuracy(bank, labels, torch.tensor([[5.0, 0.0]]), torch.tensor([0]), k=[3]) == {3: 1.0}
    # At a temperature so high that all weigh the same, the majority wins.
    assert knn_accuracy(bank, labels, torch.tensor([[5.0, 0.0]]), torch.tensor([0]), [3], 1e6) == {3: 0.0}


def test_memory_stays_bounded_and_the_result_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    data = (*clusters(230, 1), *clusters(57, 2))
    whole = knn_accuracy(*data)
    largest = 0
    matmul = Tensor.__matmul__

    def watched(a: Tensor, b: Tensor) -> Tensor:
        nonlocal largest
        result = matmul(a, b)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(similarity, "_CHUNK_ELEMENTS", 1000)
    monkeypatch.setattr(Tensor, "__matmul__", watched)
    assert knn_accuracy(*data) == whole
    assert 0 < largest <= 1000


def test_a_class_that_only_queries_have_is_never_named() -> None:
    bank, labels = clusters(50, 1)
    assert knn_accuracy(bank, labels, bank[:4], torch.full((4,), 9), k=[1]) == {1: 0.0}


def test_bad_arguments_are_refused_by_value() -> None:
    bank, labels = clusters(50, 1)
    with pytest.raises(ConfigError, match="k=100 is not from 1 to 50"):
        knn_accuracy(bank, labels, bank, labels)
    with pytest.raises(ConfigError, match="temperature=0"):
        knn_accuracy(bank, labels, bank, labels, [1], 0)
    with pytest.raises(DataError, match=r"shapes \[50, 12\] and \[50, 11\]"):
        knn_accuracy(bank, labels, bank[:, 1:], labels, [1])
    with pytest.raises(DataError, match="50 and 50 features with 49 and 50 labels"):
        knn_accuracy(bank, labels[1:], bank, labels, [1])
    with pytest.raises(DataError, match="NaN or infinite"):
        knn_accuracy(bank / 0.0, labels, bank, labels, [1])
    with pytest.raises(ConfigError, match="k is empty"):
        knn_accuracy(bank, labels, bank, labels, [])
    with pytest.raises(ConfigError, match=r"k=1\.5 is not"):
        knn_accuracy(bank, labels, bank, labels, [1.5])
    with pytest.raises(DataError, match="label -1 is negative"):
        knn_accuracy(bank, labels - labels.min() - 1, bank, labels, [1])
    with pytest.raises(DataError, match=r"labels are torch\.float32"):
        knn_accuracy(bank, labels, bank, labels.float(), [1])


class Timm(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(2, 3)

    def forward_features(self, images: Tensor) -> Tensor:
        return self.drop(images.flatten(1)[:, :2]).to(torch.bfloat16)

    def forward_head(self, hidden: Tensor, pre_logits: bool = False) -> Tensor:
        return hidden if pre_logits else self.head(hidden)


class Clip(nn.Module):
    def encode_image(self, images: Tensor) -> Tensor:
        return images.flatten(1) * 3


BATCHES = [(torch.ones(2, 1, 2, 2), torch.tensor([0, 1])), (torch.ones(1, 1, 2, 2), torch.tensor([2]))]


def test_features_are_what_the_head_of_a_timm_model_sees() -> None:
    model = Timm().train()
    found, labels = features(model, BATCHES)
    assert torch.equal(found, torch.ones(3, 2))
    assert found.dtype == torch.float32
    assert labels.tolist() == [0, 1, 2]
    assert model.training
    assert model.drop.training
    assert not found.requires_grad


def test_features_of_an_open_clip_model_are_its_image_embedding() -> None:
    assert torch.equal(features(Clip(), BATCHES)[0], torch.full((3, 4), 3.0))


def test_a_model_that_offers_no_features_is_refused() -> None:
    with pytest.raises(ConfigError, match="Linear has neither timm's forward_features"):
        features(nn.Linear(2, 2), BATCHES)
    with pytest.raises(DataError, match="no image"):
        features(Clip(), [])
