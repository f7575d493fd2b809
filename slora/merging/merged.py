"""`merged`: a model whose update is merged for a while."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from slora.merging.merge import merge, unmerge


@contextlib.contextmanager
def merged(model: nn.Module, scale: float = 1.0) -> Iterator[None]:
    """Merge `scale` times the update inside the context, and unmerge it bit for bit afterwards.

    Raises:
        StateError, ShapeError, ConfigError: see `merge`.
    """
    merge(model, scale)
    try:
        yield
    finally:
        unmerge(model)
