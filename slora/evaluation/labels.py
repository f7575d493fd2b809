"""`require_labels`: refuses labels that are not classes."""

from __future__ import annotations

from torch import Tensor

from slora.errors import DataError


def require_labels(labels: Tensor, count: int, one: str = "label", several: str = "labels") -> None:
    """Refuse labels other than `[count]` integers from 0.

    Args:
        one, several: what they are called, for the message.

    Raises:
        DataError: the shape or the dtype is another one, or a label is negative.
    """
    if labels.shape != (count,) or labels.is_floating_point() or labels.is_complex():
        raise DataError(f"{several} are {labels.dtype} {list(labels.shape)}, expected integers [{count}]")
    if count and int(labels.min()) < 0:
        raise DataError(f"{one} {int(labels.min())} is negative; they count from 0")
