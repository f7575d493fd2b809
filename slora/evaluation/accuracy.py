"""Accuracy and loss of a classifier."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slora.errors import DataError
from slora.evaluation.labels import require_labels
from slora.models.logits import logits_of
from slora.module_tree.modes import evaluating

CALIBRATION_BINS = 15


@dataclass(frozen=True)
class Accuracy:
    """Shares from 0 to 1, over `count` images.

    Attributes:
        top1: top-1 accuracy.
        top5: top-5 accuracy (top-n with n < 5 classes).
        per_class: mean of the accuracies per class, over the classes present; usual for Pets and Flowers.
        loss: mean cross-entropy, which is the negative log-likelihood (NLL), in nats.
        calibration_error: expected calibration error (ECE, arXiv 1706.04599) in 15 bins of the largest probability.
    """

    top1: float
    top5: float
    per_class: float
    loss: float
    count: int
    calibration_error: float


@torch.no_grad()
def accuracy(
    model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str = "cpu"
) -> Accuracy:
    """Evaluate a classifier in evaluation mode; its mode is restored afterwards.

    Args:
        batches: `(images [n, ...], labels [n])`, labels integers; moved to `device`, where the model is.

    Raises:
        DataError: there is no image, a label is not an output of the model, or a logit is NaN or infinite (-infinity
            excludes a class).
    """
    from torchmetrics.classification import MulticlassAccuracy, MulticlassCalibrationError

    metrics: dict[str, Any] = {}
    loss, count = torch.zeros((), dtype=torch.float64, device=device), 0
    with evaluating(model):
        for images, labels in batches:
            require_labels(labels, len(images))
            if not len(images):
                continue
            logits, labels = logits_of(model(images.to(device))), labels.to(device)
            classes = logits.shape[1]
            if not bool((logits < torch.inf).all()):
                raise DataError("a logit is NaN or infinite; the model was damaged, or an image is not finite")
            if not metrics:
                metrics = {
                    "top1": MulticlassAccuracy(classes, average="micro"),
                    "top5": MulticlassAccuracy(classes, average="micro", top_k=min(5, classes)),
                    "per_class": MulticlassAccuracy(classes, average="macro"),
                    "calibration_error": MulticlassCalibrationError(classes, n_bins=CALIBRATION_BINS, norm="l1"),
                }
                metrics = {name: metric.to(device) for name, metric in metrics.items()}
            if int(labels.max()) >= classes:
                raise DataError(
                    f"label {int(labels.max())} is not among the {classes} outputs of the model; evaluate on the "
                    f"data set it was trained for"
                )
            for name, metric in metrics.items():
                # It would take logits from 0 to 1 for probabilities.
                metric.update(logits.float().softmax(1) if name == "calibration_error" else logits, labels)
            loss += F.cross_entropy(logits.float(), labels, reduction="sum")
            count += len(labels)
    if not count:
        raise DataError("there is no image to evaluate on; give at least one")
    values = {name: float(metric.compute()) for name, metric in metrics.items()}
    return Accuracy(**values, loss=float(loss) / count, count=count)


@torch.no_grad()
def tally(model: nn.Module, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str) -> Tensor:
    """Return `[correct, sum of losses, count]` over `batches`, in evaluation mode; its mode is restored afterwards.

    For use during training: totals of several processes can be added.
    """
    # MPS has no float64.
    wide = torch.float32 if torch.device(device).type == "mps" else torch.float64
    totals = torch.zeros(3, dtype=wide, device=device)
    with evaluating(model):
        for images, labels in batches:
            logits = logits_of(model(images))
            totals[0] += (logits.argmax(1) == labels).sum()
            totals[1] += F.cross_entropy(logits.float(), labels, reduction="sum")
            totals[2] += len(labels)
    return totals
