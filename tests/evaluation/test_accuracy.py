"""Accuracy of a classifier."""

from __future__ import annotations

from collections.abc import Callable

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


def calibration_error(logits: Tensor, labels: Tensor) -> float:
    """The mean gap between confidence and accuracy over 15 bins of the confidence, weighted by their images."""
    gap, probabilities = 0.0, logits.double().softmax(1)
    for number in range(15):
        inside = [i for i, p in enumerate(probabilities.amax(1).tolist()) if number < 15 * p <= number + 1]
        if inside:
            confidence = sum(float(probabilities[i].max()) for i in inside)
            gap += abs(confidence - sum(int(logits[i].argmax() == labels[i]) for i in inside)) / len(logits)
    return gap


# Values between 0 and 1 could be taken for probabilities.
@pytest.mark.parametrize("scale", [torch.sigmoid, lambda x: 3 * x], ids=["from 0 to 1", "any"])
def test_the_calibration_error_is_that_of_the_probabilities(scale: Callable[[Tensor], Tensor]) -> None:
    logits, labels = scale(torch.randn(400, 4)), torch.randint(4, (400,))
    batches = list(zip(logits.split(70), labels.split(70), strict=True))
    # Probabilities of fp32 are exact to 1e-7; one on the border of two bins would move by a 400th.
    assert accuracy(Replay(), batches).calibration_error == pytest.approx(calibration_error(logits, labels), abs=1e-6)


def test_fewer_than_five_classes_have_a_top_5_of_one() -> None:
    result = accuracy(Replay(), [(torch.randn(6, 3), torch.randint(3, (6,)))])
    assert result.top5 == 1.0


def test_labels_the_model_has_no_output_for_are_refused() -> None:
    with pytest.raises(DataError, match="label 9 is not among the 3 outputs of the model"):
        accuracy(Replay(), [(torch.randn(2, 3), torch.tensor([0, 9]))])


def test_no_image_is_refused() -> None:
    with pytest.raises(DataError, match="no image to evaluate on"):
        accuracy(Replay(), [])


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (torch.tensor([0, -1]), "label -1 is negative"),
        (torch.tensor([0.0, 1.0]), "labels are torch.float32"),
        (torch.tensor([0, 1, 2]), r"labels are torch.int64 \[3\], expected integers \[2\]"),
    ],
)
def test_labels_that_are_no_classes_are_refused(labels: Tensor, message: str) -> None:
    with pytest.raises(DataError, match=message):
        accuracy(Replay(), [(torch.randn(2, 3), labels)])


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_logits_that_are_not_finite_are_refused(value: float) -> None:
    logits = torch.zeros(2, 3)
    logits[1, 2] = value
    with pytest.raises(DataError, match="a logit is NaN or infinite"):
        accuracy(Replay(), [(logits, torch.tensor([0, 1]))])


def test_a_class_may_be_excluded_by_a_logit_of_minus_infinity_and_a_batch_may_be_empty() -> None:
    logits = torch.tensor([[1.0, 0.0, -torch.inf]])
    result = accuracy(Replay(), [(logits, torch.tensor([0])), (logits[:0], torch.tensor([], dtype=torch.long))])
    assert (result.top1, result.count) == (1.0, 1)
