"""`recorded_inputs`: what reaches the adapted layers of a model in a forward pass."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from torch import Tensor

from slora.layers.base import LoRABlocks

Record = Callable[[LoRABlocks, slice, Tensor], None]


@contextlib.contextmanager
def recorded_inputs(layers: Iterable[LoRABlocks], record: Record) -> Iterator[None]:
    """Call `record(layer, blocks, x)` for every product of `layers` inside the context; `x [..., K]`.

    `blocks` are those whose outputs are computed: all, but for attention whose query, key and value differ. Outside the
    context the layers are as before, and cost nothing more.
    """
    layers = list(layers)
    for layer in layers:
        # On the instance: every way to the weight, also past the forward of the layer, goes through `project`.
        layer.project = functools.partial(_project, layer, layer.project, record)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.project


def _project(
    layer: LoRABlocks, project: Callable[..., Tensor], record: Record, x: Tensor, first: int = 0,
    count: int | None = None, **bias: Any,
) -> Tensor:  # fmt: skip
    record(layer, slice(first, layer.blocks if count is None else first + count), x)
    return project(x, first, count, **bias)
