"""`model_args`: keyword arguments for `timm.create_model` or `open_clip.create_model`, from a flag or a YAML file."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from typing import Any

from slora.errors import ConfigError
from slora.io.yaml_files import parse_yaml

Scalar = str | int | float | bool | None

# Arguments of create_model that come from other settings, from the data, or from the trainer.
_SET_BY_SLORA = "model_name pretrained num_classes img_size force_image_size device precision jit".split()

# A number that YAML reads as a string.
_EXPONENT = re.compile(r"[+-]?\d+(\.\d*)?[eE][+-]?\d+")


def arguments(value: Any) -> dict[str, Scalar] | None:
    """Return a mapping, or a flag such as "key=value,key=value" with YAML scalars as a mapping; None for others."""
    if isinstance(value, str):
        pairs = [entry.partition("=") for entry in value.split(",")]
        if not all(equals for _, equals, _ in pairs):
            return None
        try:
            value = {key.strip(): parse_yaml(text) for key, _, text in pairs}
        except ValueError:
            return None
    if not isinstance(value, Mapping) or not all(isinstance(key, str) and key.isidentifier() for key in value):
        return None
    if not all(_is_scalar(entry) for entry in value.values()):
        return None
    return {
        key: float(entry) if isinstance(entry, str) and _EXPONENT.fullmatch(entry) else entry
        for key, entry in value.items()
    }


def _is_scalar(entry: object) -> bool:
    return entry is None or isinstance(entry, (str, int)) or (isinstance(entry, float) and math.isfinite(entry))


def check_keys(keys: Iterable[str]) -> None:
    """Refuse arguments that slora sets by itself.

    Raises:
        ConfigError: names the argument.
    """
    for key in keys:
        if key in _SET_BY_SLORA:
            raise ConfigError(
                f"model_args holds {key!r}, which slora sets itself; leave it out, or use the settings model, "
                f"pretrained, img_size, device and precision"
            )
