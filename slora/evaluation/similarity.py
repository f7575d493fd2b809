"""`similarities`: cosine similarities of many queries and items in bounded memory."""

from __future__ import annotations

from collections.abc import Iterator

import torch.nn.functional as F
from torch import Tensor

# Similarities per chunk: 256 MB in fp32.
_CHUNK_ELEMENTS = 1 << 26


def similarities(queries: Tensor, targets: Tensor, items: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `(similarities [m, i] fp32, targets [m])` for one chunk of the queries after the other.

    Args:
        queries: `[q, d]`; normalised here.
        targets: what belongs to each query, `[q]`.
        items: `[i, d]`, i at least 1; normalised here.
    """
    queries, items = F.normalize(queries.float(), dim=1), F.normalize(items.float(), dim=1)
    chunk = max(1, _CHUNK_ELEMENTS // len(items))
    for rows, expected in zip(queries.split(chunk), targets.split(chunk), strict=True):
        yield rows @ items.T, expected
