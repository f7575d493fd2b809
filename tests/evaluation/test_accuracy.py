"""Accuracy of a classifier."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slora import DataError
from slora.evaluation import accuracy
from slora.evaluation.accuracy import tally


class Replay(nn.Module):
    """Returns its input: logits are given as images."""

    def forward(self, images: Tensor) -> Tensor:
        return images


def test_accuracy_counts_over_uneven_batches() -> None:
    logits, labels = torch.randn(103, 8), torch.randint(8, (103,))
    batches = list(zip(logits.split(40), labels.split(40), strict=True))
    model = Replay().train()
    result = accuracy(model, batches)
    ranks = (logits > logits.gather(1, labels[:, None])).sum(1)
    assert result.top1 == pytest.approx((ranks == 0).float().mean().item())
    assert result.top5 == pytest.approx((ranks < 5).float().mean().item())
    by_class = [(ranks[labels == c] == 0).float().mean().item() for c in range(8)]
    assert result.per_class == pytest.approx(sum(by_class) / 8, abs=1e-6)
    assert result.loss == pytest.approx(F.cross_entropy(logits, labels).item(), rel=1e-5)
    assert result.count == 103
    assert model.training
    correct, loss, count = tally(model, batches, "cpu").tolist()
    assert (correct / count, loss / count) == (pytest.approx(result.top1), pytest.approx(result.loss))


def test_fewer_than_five_classes_have_a_top_5_of_one() -> None:
    result = accuracy(Replay(), [(torch.randn(6, 3), torch.randint(3, (6,)))])
    assert result.top5 == 1.0


def test_labels_the_model_has_no_output_for_are_refused() -> None:
    with pytest.raises(DataError, match="label 9 is not among the 3 outputs of the model"):
        accuracy(Replay(), [(torch.randn(2, 3), torch.tensor([0, 9]))])


def test_no_image_is_refused() -> None:
    with pytest.raises(DataError, match="no image to evaluate on"):
        accuracy(Replay(), [])
