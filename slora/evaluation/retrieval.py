"""Image-text retrieval: recall@k of a CLIP in both directions.

As in CLIP (arXiv 2103.00020): the share of queries with at least one correct item among the k most similar ones.
An image may have several captions, and each of them is a query of its own for text-to-image retrieval.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from slora.errors import ConfigError, DataError
from slora.evaluation.labels import require_labels
from slora.evaluation.similarity import similarities
from slora.io.bounded import is_count
from slora.io.plain import plain
from slora.module_tree.modes import evaluating

RECALL_AT = (1, 5, 10)

# Texts per forward pass.
_TEXTS = 256


class Recall(NamedTuple):
    """`{k: share of queries}`, from 0 to 1, for both directions."""

    text_to_image: dict[int, float]
    image_to_text: dict[int, float]


@torch.no_grad()
def recall_at_k(images: Tensor, texts: Tensor, image_of_text: Tensor, k: Sequence[int] = RECALL_AT) -> Recall:
    """Return the recall@k of retrieving images by their captions and captions by their image.

    Memory is bounded: similarities are computed for a chunk of queries at a time. Of equally similar items the correct
    one counts last, so identical embeddings recall nothing by chance.

    Args:
        images: embeddings `[i, d]`; normalised here.
        texts: embeddings `[t, d]`.
        image_of_text: number of the image of each text, `[t]` from 0 to i - 1.
        k: each from 1 to the number of images.

    Raises:
        ConfigError: a k is out of range.
        DataError: shapes disagree, an image has no text, a text no image, or an embedding is not finite.
    """
    if images.dim() != 2 or texts.dim() != 2 or images.shape[1] != texts.shape[1] or len(image_of_text) != len(texts):
        raise DataError(
            f"embeddings of shapes {list(images.shape)} and {list(texts.shape)} with {len(image_of_text)} numbers of "
            f"images; expected [i, d], [t, d] and t"
        )
    for each in k:
        if not is_count(plain(each)) or not 1 <= each <= len(images):
            raise ConfigError(f"recall@{each} needs k from 1 to {len(images)}, the number of images")
    if not bool(torch.isfinite(images).all() and torch.isfinite(texts).all()):
        raise DataError("an embedding is NaN or infinite; the model was damaged, or an image is not finite")
    require_labels(image_of_text, len(texts), "number of an image", "numbers of images")
    captions = torch.bincount(image_of_text, minlength=len(images))
    if len(captions) > len(images) or not bool(captions.all()):
        raise DataError("every image needs at least one text, and every text one of the images")
    numbers = torch.arange(len(images), device=images.device)
    by_text = _ranks(texts, images, image_of_text, numbers)
    by_image = _ranks(images, texts, numbers, image_of_text)
    return Recall(*({each: float((ranks < each).float().mean()) for each in k} for ranks in (by_text, by_image)))


def _ranks(queries: Tensor, items: Tensor, wanted: Tensor, labels: Tensor) -> Tensor:
    """For each query, how many wrong items are at least as similar as the best of those labelled `wanted`."""
    found = []
    for similarity, targets in similarities(queries, wanted, items):
        right = labels[None] == targets[:, None]
        best = similarity.masked_fill(~right, -torch.inf).amax(1, keepdim=True)
        found.append(((similarity >= best) & ~right).sum(1))
    return torch.cat(found)


@torch.no_grad()
def image_embeddings(
    clip: Any, batches: Iterable[tuple[Tensor, Tensor]], device: torch.device | str = "cpu"
) -> tuple[Tensor, Tensor]:
    """Return `(embeddings [i, d] fp32, their labels [i])` of an open_clip model in evaluation mode.

    Raises:
        DataError: there is no image.
    """
    with evaluating(clip):
        found = [(clip.encode_image(x.to(device)).float(), labels.to(device)) for x, labels in batches]
    if not found:
        raise DataError("there is no image to retrieve; give at least one")
    return torch.cat([x for x, _ in found]), torch.cat([labels for _, labels in found])


@torch.no_grad()
def text_embeddings(clip: Any, tokenizer: Any, texts: Sequence[str], device: torch.device | str = "cpu") -> Tensor:
    """Return the embeddings `[t, d]` fp32 of an open_clip model in evaluation mode.

    Raises:
        DataError: there is no text.
    """
    if not texts:
        raise DataError("there is no text to retrieve; give at least one")
    with evaluating(clip):
        parts = [list(texts[i : i + _TEXTS]) for i in range(0, len(texts), _TEXTS)]
        return torch.cat([clip.encode_text(tokenizer(part).to(device)).float() for part in parts])
