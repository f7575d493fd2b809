"""`GroupedLogits`: a classifier of classes that are groups of a model's outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slora.models.logits import logits_of


class GroupedLogits(nn.Module):
    """A classifier whose classes are groups of the outputs of `model`: the largest logit of a group counts.

    For the subsets of ImageNet's classes (ImageNet-R, ImageNet-A), and for ObjectNet, where a class may stand for
    several of ImageNet (as in WiSE-FT, arXiv 2109.01903).

    Args:
        model: `images -> logits [n, outputs]`.
        groups: for each class, numbers of outputs.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.columns: Tensor
        self.model = model
        longest = max(len(group) for group in groups)
        # A group repeats its last output up to the longest, which changes no maximum.
        rows = [[*group, *[group[-1]] * (longest - len(group))] for group in groups]
        self.register_buffer("columns", torch.tensor(rows), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `[n, groups]`."""
        logits = logits_of(self.model(images))
        return logits[:, self.columns.to(logits.device)].amax(2)
