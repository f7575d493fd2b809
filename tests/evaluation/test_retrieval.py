"""Recall@k of image-text retrieval, against the definition computed one query at a time in numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from slora import ConfigError, DataError
from slora.evaluation import image_embeddings, recall_at_k, similarity, text_embeddings

pytestmark = pytest.mark.once


def by_hand(queries: np.ndarray, items: np.ndarray, right: list[set[int]], k: int) -> float:
    hits = 0
    for query, wanted in zip(queries, right, strict=True):
        cosines = [float(query @ item) / math.sqrt((query @ query) * (item @ item)) for item in items]
        nearest = sorted(range(len(items)), key=lambda i: -cosines[i])[:k]
        hits += bool(wanted & set(nearest))
    return hits / len(queries)


@pytest.fixture
def embeddings() -> tuple[Tensor, Tensor, Tensor]:
    """30 images with 1 to 4 captions each, in no order, that lie near their image."""
    images = torch.randn(30, 8)
    numbers = torch.cat([torch.arange(30), torch.randint(30, (50,))])[torch.randperm(80)]
    return images * torch.rand(30, 1) * 5, images[numbers] + 1.5 * torch.randn(80, 8), numbers


def test_recall_is_that_of_the_definition_in_both_directions(embeddings: tuple[Tensor, Tensor, Tensor]) -> None:
    images, texts, numbers = embeddings
    result = recall_at_k(images, texts, numbers)
    arrays = images.double().numpy(), texts.double().numpy()
    captions = [{t for t, i in enumerate(numbers.tolist()) if i == image} for image in range(30)]
    for k in (1, 5, 10):
        assert result.text_to_image[k] == pytest.approx(
            by_hand(arrays[1], arrays[0], [{i} for i in numbers.tolist()], k)
        )
        assert result.image_to_text[k] == pytest.approx(by_hand(arrays[0], arrays[1], captions, k))
    assert 0 < result.text_to_image[1] < result.text_to_image[10] < 1


def test_memory_stays_bounded_and_the_result_the_same(
    embeddings: tuple[Tensor, Tensor, Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = recall_at_k(*embeddings)
    largest = 0
    matmul = Tensor.__matmul__

    def watched(a: Tensor, b: Tensor) -> Tensor:
        nonlocal largest
        result = matmul(a, b)
        largest = max(largest, result.numel())
        return result

    monkeypatch.setattr(similarity, "_CHUNK_ELEMENTS", 200)
    monkeypatch.setattr(Tensor, "__matmul__", watched)
    assert recall_at_k(*embeddings) == whole
    assert 0 < largest <= 200


def test_a_model_that_maps_everything_to_one_point_recalls_nothing() -> None:
    ones = torch.ones(4, 3)
    assert recall_at_k(ones, ones, torch.arange(4), [1, 3]).text_to_image == {1: 0.0, 3: 0.0}


def test_bad_arguments_are_refused_by_value() -> None:
    images, texts = torch.randn(3, 4), torch.randn(4, 4)
    with pytest.raises(ConfigError, match="recall@10 needs k from 1 to 3"):
        recall_at_k(images, texts, torch.tensor([0, 1, 2, 2]), [1, 10])
    with pytest.raises(DataError, match="every image needs at least one text"):
        recall_at_k(images, texts, torch.tensor([0, 1, 1, 1]), [1])
    with pytest.raises(DataError, match="every image needs at least one text"):
        recall_at_k(images, texts, torch.tensor([0, 1, 2, 3]), [1])
    with pytest.raises(DataError, match="with 3 numbers of images"):
        recall_at_k(images, texts, torch.tensor([0, 1, 2]), [1])
    with pytest.raises(DataError, match="NaN or infinite"):
        recall_at_k(images / 0.0, texts, torch.tensor([0, 1, 2, 2]), [1])
    with pytest.raises(DataError, match="number of an image -1 is negative"):
        recall_at_k(images, texts, torch.tensor([0, 1, 2, -1]), [1])
    with pytest.raises(DataError, match=r"numbers of images are torch\.float32"):
        recall_at_k(images, texts, torch.tensor([0.0, 1, 2, 2]), [1])
    with pytest.raises(ConfigError, match=r"recall@1\.5"):
        recall_at_k(images, texts, torch.tensor([0, 1, 2, 2]), [1.5])


def test_embeddings_are_those_of_the_model_in_evaluation_mode(families: dict[str, Any]) -> None:
    clip = families["open_clip"].build().train()
    images, texts = torch.randn(3, 3, 16, 16), torch.randint(1, 40, (3, 7))
    found, labels = image_embeddings(clip, [(images[:2], torch.tensor([0, 1])), (images[2:], torch.tensor([2]))])
    again = text_embeddings(clip, lambda part: texts[: len(part)], ["a", "b", "c"])
    assert clip.training
    clip.eval()
    assert torch.allclose(found, clip.encode_image(images), atol=1e-5)
    assert torch.allclose(again, clip.encode_text(texts), atol=1e-5)
    assert labels.tolist() == [0, 1, 2]
    with pytest.raises(DataError, match="no image"):
        image_embeddings(clip, [])
    with pytest.raises(DataError, match="no text"):
        text_embeddings(clip, None, [])
