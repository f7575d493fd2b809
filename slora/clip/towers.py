"""Which tower of a CLIP is trained, as targets of an adapter config."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

from torch import nn

from slora.config import SelectiveLoRAConfig, Tower
from slora.errors import ConfigError, TargetError
from slora.models.targets import candidates, targets
from slora.module_tree.wrappers import unwrapped

SCALE = "logit_scale"


def targets_of_tower(model: nn.Module, config: SelectiveLoRAConfig, tower: Tower) -> SelectiveLoRAConfig:
    """Return `config` with those of its targets that belong to `tower`, by name.

    Raises:
        ConfigError: the model is not a CLIP with two towers.
        TargetError: none of the targets does, or see `slora.inject`.
    """
    require_towers(model)
    if tower == "both":
        return config
    chosen = [name for name in targets(model, config) if in_tower(name, tower)]
    if not chosen:
        raise TargetError(
            f"target_modules={config.target_modules!r} names no layer of the {tower} tower; name one, or use another "
            f"tower"
        )
    # A name is also the end of longer ones: of open_clip's towers, those of the text are ends of those of the image.
    others = [name for name in candidates(model).kinds if not in_tower(name, tower)]
    excluded = others if tower == "text" else None
    return dataclasses.replace(config, target_modules=chosen, exclude_modules=excluded)


def parameters_of_tower(model: nn.Module, tower: Tower) -> Iterator[nn.Parameter]:
    """Yield the parameters of `tower`, and `logit_scale`.

    Raises:
        ConfigError: the model is not a CLIP with two towers.
    """
    require_towers(model)
    for name, parameter in unwrapped(model).named_parameters():
        if name == SCALE or (in_tower(name, tower) and name != "logit_bias"):
            yield parameter


def in_tower(name: str, tower: Tower) -> bool:
    """Whether a module or parameter of a CLIP belongs to `tower`."""
    return tower == "both" or name.startswith("visual.") == (tower == "image")


def require_towers(model: nn.Module) -> None:
    """Refuse a model that is not a CLIP with two towers and nothing else.

    Raises:
        ConfigError: names what it is.
    """
    found = unwrapped(model)
    kind = type(found).__name__
    if not all(hasattr(found, name) for name in ("visual", "encode_image", "encode_text", SCALE)):
        raise ConfigError(f"{kind} has no image and text tower; use an open_clip model, or head='linear'")
    if hasattr(found, "text_decoder"):
        raise ConfigError(
            f"{kind} has a text decoder, which its embeddings do not use; use a CLIP without, or head='linear'"
        )
