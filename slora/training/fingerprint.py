"""`fingerprint`: identifies the model that a checkpoint belongs to."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import nn

from slora.adapters.tensors import spread_sample
from slora.errors import CheckpointError
from slora.layers import adapted_layers
from slora.module_tree.wrappers import named_parameters, unwrapped


def fingerprint(model: nn.Module) -> dict[str, Any]:
    """Return what identifies a model before it is trained.

    Its class, the shapes of all parameters, the names of the trainable ones, and a digest of up to 256 elements of each
    frozen one.
    """
    digest = hashlib.sha256()
    samples = []
    own = {layer.gate for _, layer in adapted_layers(model)}
    for parameter in model.parameters():
        if not parameter.requires_grad and parameter not in own:
            samples.append(spread_sample(parameter.detach()).float())
    if samples:
        digest.update(torch.cat(samples).cpu().numpy().tobytes())
    return {
        "class": type(unwrapped(model)).__name__,
        "shapes": {name: list(parameter.shape) for name, parameter in named_parameters(model)},
        # Without gates: strategies switch their training on and off.
        "trainable": [name for name, p in named_parameters(model) if p.requires_grad and p not in own],
        "frozen": digest.hexdigest(),
    }


def check_same_model(folder: Path, saved: dict[str, Any], present: dict[str, Any]) -> None:
    """Check that the fingerprint in the checkpoint `folder` is that of the present model.

    Raises:
        CheckpointError: names the first difference.
    """
    remedy = "resume with the model and settings of that run"
    if saved["class"] != present["class"]:
        raise CheckpointError(f"{folder} is of a {saved['class']}, this model is a {present['class']}; {remedy}")
    for name in dict.fromkeys([*saved["shapes"], *present["shapes"]]):
        before, now = saved["shapes"].get(name), present["shapes"].get(name)
        if before != now:
            raise CheckpointError(
                f"{folder} is of another {saved['class']}: {name!r} has shape {before or 'none'} there and "
                f"{now or 'none'} here; {remedy}"
            )
    odd = sorted(set(saved["trainable"]) ^ set(present["trainable"]))
    if odd:
        where = "there" if odd[0] in saved["trainable"] else "here"
        raise CheckpointError(f"{folder}: {odd[0]!r} is trainable only {where}; {remedy}")
    if saved["frozen"] != present["frozen"]:
        raise CheckpointError(
            f"{folder} was trained on other frozen weights than this {present['class']} has: shapes agree, values "
            f"do not; load the same pretrained weights"
        )
