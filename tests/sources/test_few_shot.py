"""Few training images per class: labels of any data set without its images, and the images that are drawn."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils.data import ConcatDataset, Dataset, Subset, TensorDataset

import slora.demo  # noqa: F401 (registers its data sets)
from slora import ConfigError
from slora.evaluation import few_shot_indices
from slora.sources.data import InputSpec, open_data
from slora.sources.labels import labels_of

pytestmark = pytest.mark.once

LABELS = [2, 0, 1, 0, 2]


class Unread(Dataset[Any]):
    """Items that must not be read; the labels stand in attributes."""

    def __init__(self, **attributes: Any) -> None:
        vars(self).update(attributes)

    def __len__(self) -> int:
        return len(LABELS)

    def __getitem__(self, index: int) -> Any:
        raise AssertionError("an image was read")


@pytest.mark.parametrize(
    "dataset",
    [
        Unread(targets=LABELS),
        Unread(targets=torch.tensor(LABELS)),
        Unread(labels=LABELS, targets=LABELS[:2]),
        Unread(_labels=LABELS),
        Unread(samples=[("a.png", label) for label in LABELS]),
        TensorDataset(torch.zeros(5, 1), torch.tensor(LABELS)),
        Subset(Unread(targets=LABELS[::-1]), [4, 3, 2, 1, 0]),
        ConcatDataset([Subset(Unread(targets=LABELS), [0, 1]), Subset(Unread(targets=LABELS), [2, 3, 4])]),
    ],
    ids="list tensor labels _labels samples tensors subset concatenation".split(),
)
def test_labels_are_found_without_reading_images(dataset: Any) -> None:
    assert labels_of(dataset) == LABELS


def test_labels_of_a_data_set_without_a_list_come_from_its_items() -> None:
    assert labels_of([(None, label) for label in LABELS]) == LABELS


def test_training_images_are_drawn_and_evaluation_images_kept(image_tree: Callable[..., Path]) -> None:
    whole = open_data(f"imagefolder:{image_tree(40)}")
    few = whole.few_shot(3, seed=1)
    assert Counter(label for _, label in few.training) == {0: 3, 1: 3}
    assert few.evaluation is whole.evaluation
    assert labels_of(few.training) == labels_of(whole.few_shot(3, seed=2).training)
    assert few.training.indices != whole.few_shot(3, seed=2).training.indices
    assert whole.few_shot(None, seed=1) is whole
    with pytest.raises(ConfigError, match="shots=19 exceeds the 18 images of class 'dark'"):
        whole.few_shot(19, seed=1)


def test_images_in_memory_stay_there() -> None:
    whole = open_data("digits")
    images, labels = whole.few_shot(2, seed=0).data(InputSpec(1, 16, (0.0,), (1.0,)), training=True)[:]  # type: ignore[misc]
    rows = few_shot_indices(labels_of(whole.training), 2, 0)
    assert len(rows) == 20
    assert torch.equal(images, whole.training.tensors[0][rows])
    assert torch.equal(labels, whole.training.tensors[1][rows])
