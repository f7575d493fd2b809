"""`ClipClassifier`: the image tower of a CLIP with a linear head."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slora.clip.clip import Clip


class ClipClassifier(nn.Module):
    """The image tower of an open_clip model and a linear head on its embedding.

    Has timm's `forward_features` and `forward_head`, from which k-NN gets the embedding.
    """

    def __init__(self, visual: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.visual = visual
        self.head = nn.Linear(features, classes)

    @classmethod
    def of(cls, clip: Clip, classes: int) -> ClipClassifier:
        """Return the image tower of `clip` with a new head of `classes` outputs."""
        visual = clip.model.visual
        assert isinstance(visual, nn.Module)
        return cls(visual, _width(visual, clip.input.channels, clip.input.size), classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the image embedding, `[n, features]`."""
        embedding: Tensor = self.visual(images)
        return embedding

    def forward_head(self, embedding: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits `[n, classes]`, or with `pre_logits` the input of the head."""
        if pre_logits:
            return embedding
        logits: Tensor = self.head(embedding)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `[n, classes]`."""
        return self.forward_head(self.forward_features(images))


@torch.no_grad()
def _width(visual: Any, channels: int, size: int) -> int:
    """The size of the image embedding, by a forward pass if the tower does not state it, as those from timm."""
    width = getattr(visual, "output_dim", None)
    if isinstance(width, int):
        return width
    was_training = visual.training
    embedding = visual.eval()(torch.zeros(1, channels, size, size))
    visual.train(was_training)
    return int(embedding.shape[-1])
