"""The target data: scikit-learn's handwritten digits, in the format of the rendered letters."""

from __future__ import annotations

import numpy as np
import torch
from sklearn.datasets import load_digits
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

from slora.demo.letters import IMAGE_SIZE
from slora.errors import ConfigError

CLASSES = tuple("0123456789")

# One split for every seed: runs with different seeds are then tested on the same images.
_SPLIT_SEED = 0
_TEST_SHARE = 0.3
_FULL_INK = 16.0


def digits(seed: int) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """Return the 1797 digits, 8 x 8 in 0..16, scaled to [0, 1], enlarged to 16 x 16 and split 70/30 by class.

    Args:
        seed: any integer from 0 up; orders the training images. The split does not depend on it.

    Returns:
        (train images, train labels), (test images, test labels): images [1257, 1, 16, 16] and [540, 1, 16, 16]
        float32 in [0, 1], light ink on black, labels [1257] and [540] int64 in 0..9.

    Raises:
        ConfigError: `seed` is negative.
    """
    if seed < 0:
        raise ConfigError(f"seed={seed} is negative; use 0 or more")
    pixels, targets = load_digits(return_X_y=True)
    images = torch.from_numpy(pixels.astype(np.float32) / _FULL_INK).reshape(-1, 1, 8, 8)
    images = F.interpolate(images, size=(IMAGE_SIZE, IMAGE_SIZE), mode="bilinear", align_corners=False)
    labels = torch.from_numpy(targets.astype(np.int64))
    train, test = train_test_split(
        np.arange(len(labels)), test_size=_TEST_SHARE, random_state=_SPLIT_SEED, stratify=targets
    )
    train = np.random.default_rng(seed).permutation(train)
    return (images[train], labels[train]), (images[test], labels[test])
