"""Proxies of old data, made from new images, for users who have none."""

from __future__ import annotations

import torch
from torch import Tensor

from slora.errors import ConfigError


def generic_samples(images: Tensor, count: int = 64, *, patch: int = 4, seed: int = 0) -> Tensor:
    """Return `count` inputs made from `images`: half of them noise, half with shuffled patches.

    Noise is normal, with the mean and standard deviation of each channel. Shuffled patches keep local structure and
    lose the content.

    Args:
        images: some inputs of the model, `[n, c, h, w]`.
        count: number of samples.
        patch: size of a patch in pixels; a border narrower than that is not shuffled.
        seed: of the random choices.

    Returns:
        `[count, c, h, w]`, dtype and device of `images`.

    Raises:
        ConfigError: `images` has another shape, or a patch is larger than an image.
    """
    check_images(images)
    height, width = images.shape[2:]
    if not 1 <= patch <= min(height, width):
        raise ConfigError(f"patch={patch} does not fit images of {height} x {width}; use 1 to {min(height, width)}")
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randint(len(images), (count,), generator=generator)
    samples = images[chosen.to(images.device)].clone()
    mean, std = images.mean((0, 2, 3), keepdim=True), images.std((0, 2, 3), keepdim=True)
    half = count // 2
    noise = torch.randn(samples[:half].shape, generator=generator).to(samples)
    samples[:half] = mean + std * noise
    rows, columns = height // patch, width // patch
    for sample in samples[half:]:
        inner = sample[:, : rows * patch, : columns * patch]
        patches = inner.unfold(1, patch, patch).unfold(2, patch, patch).flatten(1, 2)
        order = torch.randperm(rows * columns, generator=generator).to(samples.device)
        shuffled = patches[:, order].unflatten(1, (rows, columns))
        inner.copy_(shuffled.permute(0, 1, 3, 2, 4).reshape(inner.shape))
    return samples


def mixed_samples(images: Tensor, count: int = 64, *, seed: int = 0) -> Tensor:
    """Return `count` inputs, each the mean of two of `images` with shares u and 1 - u, u uniform (mixup, 1710.09412).

    Args:
        images: some inputs of the model, `[n, c, h, w]`.
        count: number of samples.
        seed: of the random choices.

    Returns:
        `[count, c, h, w]`, dtype and device of `images`.

    Raises:
        ConfigError: `images` has another shape.
    """
    check_images(images)
    generator = torch.Generator().manual_seed(seed)
    first, second = torch.randint(len(images), (2, count), generator=generator).to(images.device)
    share = torch.rand(count, 1, 1, 1, generator=generator).to(images)
    return share * images[first] + (1 - share) * images[second]


def check_images(images: Tensor) -> None:
    """Raise `ConfigError` unless `images` is `[n, c, h, w]` with n at least 1."""
    if images.dim() != 4 or not len(images):
        raise ConfigError(f"images of shape {list(images.shape)}; expected [n, channels, height, width]")
