"""The loss of a run on a batch: a criterion on the logits of the model, or what the model itself computes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from slora.models.logits import logits_of

Criterion = Callable[[Tensor, Tensor], Tensor]


def takes_labels(model: nn.Module) -> bool:
    """Whether `model` computes its own loss: it has a true attribute `takes_labels`."""
    return bool(getattr(model, "takes_labels", False))


def task_loss(
    model: Any, images: Tensor, labels: Tensor, criterion: Criterion, own: bool
) -> tuple[Tensor, Tensor | None]:
    """Return the loss, a scalar, and the logits `[n, classes]`, or None if the loss does not need them.

    Args:
        model: as it is to be called, so wrapped by DistributedDataParallel in several processes.
        criterion: `(logits, labels) -> scalar`.
        own: `takes_labels` of the model without its wrapper: it is called with images and labels, and returns an object
            with `loss` and `logits`.
    """
    if own:
        output = model(images, labels)
        return output.loss, output.logits
    logits = logits_of(model(images))
    return criterion(logits, labels), logits
