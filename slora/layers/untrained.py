"""A warning at the first optimizer step of active layers that got no gradient, whatever kept the training from them.

A forward may never reach a layer, or read its weight in a way that slora does not see; the layer then stays as it was
and counts as active all the same. Later steps only find that their optimizer has been looked at.
"""

from __future__ import annotations

import functools
import warnings
import weakref
from collections.abc import Iterable
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_pre_hook

from slora.errors import UntrainedLayerWarning, listed
from slora.gates.cache import Gated, mirrors, unmoved
from slora.module_tree.sharded import is_sharded

_done: weakref.WeakSet[torch.optim.Optimizer] = weakref.WeakSet()


def _before_optimizer_step(optimizer: torch.optim.Optimizer, *_: Any) -> None:
    if optimizer in _done or torch.compiler.is_compiling():
        return
    held = {id(parameter): parameter for group in optimizer.param_groups for parameter in group["params"]}
    # Where nothing has a gradient yet, a closure computes it within the step.
    if all(parameter.grad is None for parameter in held.values()):
        return
    if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
        return
    _done.add(optimizer)
    for mirror in mirrors():
        _warn([layer for layer in mirror.layers() if id(layer.lora_B) in held])


def _warn(layers: Iterable[Gated]) -> None:
    left = [layer for layer in layers if not layer._named and _without_gradient(layer)]
    if not left:
        return
    for layer in left:
        layer._named = True
    some = listed(layer._name or f"a {type(layer).__name__}" for layer in left)
    count = f"{len(left)} adapted and active layer{'' if len(left) == 1 else 's'}"
    warnings.warn(
        f"{count} got no gradient for the first optimizer step: {some}. No forward reached them, or their weight was "
        f"read in a way that slora does not see. Call the layer, or read `self.<layer>.weight` in the forward of the "
        f"module that holds it; list what is not used in exclude_modules",
        UntrainedLayerWarning,
        stacklevel=4,
    )


def _without_gradient(layer: Gated) -> bool:
    if layer.lora_B.grad is not None or not layer.lora_B.requires_grad or layer.merged:
        return False
    # Reading sharded gates is for all processes at once.
    if is_sharded(layer.moving_gate) and not (layer._activity and unmoved(layer)):
        return False
    return bool(layer.activity().active)


@functools.cache
def register() -> None:
    """Look at every optimizer of the process before its first step."""
    register_optimizer_step_pre_hook(_before_optimizer_step)
