"""Zero-shot classification with a CLIP: class prompts are the classifier."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slora.errors import DataError
from slora.module_tree.modes import evaluating

Template = str | Callable[[str], str]


def imagenet_templates() -> tuple[Template, ...]:
    """Return the 80 prompt templates that CLIP's authors wrote for ImageNet (arXiv 2103.00020), from open_clip."""
    import open_clip

    templates: tuple[Template, ...] = open_clip.OPENAI_IMAGENET_TEMPLATES
    return templates


class ZeroShotClassifier(nn.Module):
    """A CLIP whose classifier is its text embedding of class prompts.

    `images [n, c, h, w] -> logits [n, classes]`: cosine similarities times `logit_scale.exp()`, plus `logit_bias` where
    the model has one. A class is the normalised mean of the normalised embeddings of its prompts (CLIP, section 3.1.4
    of arXiv 2103.00020); `open_clip.build_zero_shot_classifier` computes it once, with the present text tower.

    Args:
        clip: an open_clip model.
        tokenizer: `list of texts -> tokens [n, context]`.
        classes: their names, as they stand in a prompt.
        templates: with `{}` for the name, or functions of it; None for `imagenet_templates()`.

    Raises:
        DataError: there is no class, or a name is empty.
    """

    def __init__(
        self, clip: Any, tokenizer: Any, classes: Sequence[str], templates: Sequence[Template] | None = None
    ) -> None:
        import open_clip

        super().__init__()
        self.weights: Tensor
        if not classes or not all(name.strip() for name in classes):
            raise DataError(f"class names {list(classes)[:5]}; a zero-shot classifier needs at least one, none empty")
        self.clip = clip
        device = next(clip.parameters()).device
        with evaluating(clip):
            weights = open_clip.build_zero_shot_classifier(
                clip,
                tokenizer,
                list(classes),
                list(templates or imagenet_templates()),
                device=device,
            )
        self.register_buffer("weights", weights.float(), persistent=False)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the image embedding, `[n, d]`."""
        embedding: Tensor = self.clip.encode_image(images)
        return embedding

    def forward_head(self, embedding: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits `[n, classes]`, or with `pre_logits` the embedding."""
        if pre_logits:
            return embedding
        logits: Tensor = self.clip.logit_scale.exp() * F.normalize(embedding.float(), dim=-1) @ self.weights
        bias = getattr(self.clip, "logit_bias", None)
        return logits if bias is None else logits + bias

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `[n, classes]`."""
        return self.forward_head(self.forward_features(images))


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
        output = self.model(images)
        logits: Tensor = output if isinstance(output, Tensor) else output.logits
        return logits[:, self.columns.to(logits.device)].amax(2)
