"""`labels_of`: the labels of a data set without reading its images."""

from __future__ import annotations

from typing import Any

from torch.utils.data import ConcatDataset, Subset, TensorDataset

# As torchvision's data sets call them, and `(file, label)` pairs.
_LABELS, _PAIRS = ("targets", "labels", "_labels"), ("samples", "_samples")


def labels_of(dataset: Any) -> list[int]:
    """Return the label of each item of a data set of `(image, label)`; images are read only if there is no list."""
    if isinstance(dataset, TensorDataset):
        return [int(label) for label in dataset.tensors[1].tolist()]
    if isinstance(dataset, Subset):
        labels = labels_of(dataset.dataset)
        return [labels[row] for row in dataset.indices]
    if isinstance(dataset, ConcatDataset):
        return [label for part in dataset.datasets for label in labels_of(part)]
    for name in _LABELS:
        found = getattr(dataset, name, None)
        if found is not None and len(found) == len(dataset):
            return [int(label) for label in found]
    for name in _PAIRS:
        pairs = getattr(dataset, name, None)
        if pairs is not None and len(pairs) == len(dataset):
            return [int(label) for _, label in pairs]
    return [int(dataset[row][1]) for row in range(len(dataset))]
