"""`disabled`: run the base model inside a context."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

from torch import nn

from slora.errors import StateError
from slora.layers import adapted_layers


@contextlib.contextmanager
def disabled(model: nn.Module) -> Iterator[nn.Module]:
    """Run the base model: inside the context no block adds anything.

    Modules that `modules_to_save` trains in full, such as a head, stay as trained.

    Raises:
        StateError: the model is merged, so its weights are not the base's; unmerge first.
    """
    layers = [layer for _, layer in adapted_layers(model)]
    if any(layer.merged for layer in layers):
        raise StateError("the model is merged, so its base cannot be run; call slora.unmerge(model) first")
    before = [layer.enabled for layer in layers]
    try:
        for layer in layers:
            layer.enabled = False
        yield model
    finally:
        for layer, enabled in zip(layers, before, strict=True):
            layer.enabled = enabled
