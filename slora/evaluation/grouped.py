"""`GroupedLogits`: a classifier of classes that are groups of a model's outputs."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from slora.errors import ConfigError
from slora.io.bounded import is_count
from slora.io.plain import plain
from slora.models.logits import logits_of


class GroupedLogits(nn.Module):
    """A classifier whose classes are groups of the outputs of `model`: the largest logit of a group counts.

    For the subsets of ImageNet's classes (ImageNet-R, ImageNet-A), and for ObjectNet, where a class may stand for
    several of ImageNet (as in WiSE-FT, arXiv 2109.01903).

    Args:
        model: `images -> logits [n, outputs]`.
        groups: for each class, numbers of outputs, at least one.

    Raises:
        ConfigError: there is no class, a class has no output, or an entry is not the number of an output.
    """

    def __init__(self, model: nn.Module, groups: Sequence[Sequence[int]]) -> None:
        super().__init__()
        self.columns: Tensor
        self.model = model
        if not groups:
            raise ConfigError("there is no class; give a group of outputs for each")
        for number, group in enumerate(groups):
            if not len(group):
                raise ConfigError(f"class {number} has no output; give at least one, or leave the class out")
            for output in group:
                if not is_count(plain(output)):
                    raise ConfigError(f"output {output} of class {number} is not the number of an output, from 0")
        self.last = max(max(group) for group in groups)
        longest = max(len(group) for group in groups)
        # A group repeats its last output up to the longest, which changes no maximum.
        rows = [[*group, *[group[-1]] * (longest - len(group))] for group in groups]
        self.register_buffer("columns", torch.tensor(rows), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `[n, groups]`.

        Raises:
            ConfigError: the model has fewer outputs than the groups name.
        """
        logits = logits_of(self.model(images))
        if self.last >= logits.shape[1]:
            raise ConfigError(f"output {self.last} is not among the {logits.shape[1]} of the model; use other groups")
        return logits[:, self.columns.to(logits.device)].amax(2)
