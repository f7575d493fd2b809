"""The files of an adapter directory, and `selective.json` checked by itself. Nothing here imports torch."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from slora.config import SelectiveLoRAConfig, check_budget
from slora.errors import CheckpointError, SLoRAError
from slora.reading import read_json

WEIGHTS, CONFIG, SELECTIVE = "adapter_model.safetensors", "adapter_config.json", "selective.json"
# What PEFT puts before the names of modules.
PREFIX = "base_model.model."

# Of selective.json.
FORMAT = 1


class Entry(NamedTuple):
    """What `selective.json` says of one layer."""

    r: int
    lora_alpha: float
    blocks: int
    active: tuple[int, ...]
    gate: tuple[float, ...]


class Selective(NamedTuple):
    """The content of `selective.json`.

    Attributes:
        config: what `inject` was called with. Its patterns are those of a file, and no layer is chosen by them.
        layers: by name.
        base_class: name of the class of the model.
        shapes: of the adapted weights, by the name of the layer.
        base_digest: of the values of these weights (`slora.adapter.fingerprint`).
        asked: the budget that chose the blocks, as in "budget=4"; empty where the gates decided.
        tensors_digest: of `adapter_model.safetensors`; None in directories written before there was one.
    """

    config: SelectiveLoRAConfig
    layers: dict[str, Entry]
    base_class: str
    shapes: dict[str, list[int]]
    base_digest: str
    asked: str
    tensors_digest: str | None


def read_selective(folder: Path) -> Selective:
    """Read `selective.json` in `folder` and check what can be checked without a model.

    Raises:
        CheckpointError: it is missing, damaged, or contradicts itself; names the entry.
    """
    path = folder / SELECTIVE
    if not path.exists():
        raise CheckpointError(f"{path} does not exist; give a directory that slora.save_adapter wrote")
    content = read_json(path)
    try:
        if content["format"] != FORMAT:
            raise CheckpointError(f"{path} has format {_short(content['format'])}; this version reads {FORMAT}")
        fields = _mapping(content["config"])
        for field in ("r", "lora_alpha", "use_rslora", "threshold"):
            # A default would be another mathematics without a word.
            fields[field]
        config = SelectiveLoRAConfig.from_dict(fields)
        base = _mapping(content["base"])
        shapes = {name: _matrix(shape) for name, shape in _mapping(base["shapes"]).items()}
        names = _text(base["class"]), _text(base["digest"])
        digest = content.get("tensors_digest")
        asked = _asked(content.get("asked", ""))
        entries = _mapping(content["layers"])
        if shapes.keys() != entries.keys():
            raise ValueError(f"base has no shape, or layers no entry, for {min(shapes.keys() ^ entries.keys())!r}")
        digest = None if digest is None else _text(digest)
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is incomplete or damaged ({_short(error)})") from error
    layers = {}
    for name, entry in entries.items():
        try:
            layers[name] = _entry(name, entry, config)
        except (KeyError, TypeError, ValueError) as error:
            why = str(error) if isinstance(error, SLoRAError) else _short(error)
            raise CheckpointError(f"{path}: the entry of {name!r} is damaged ({why})") from error
    return Selective(config, layers, names[0], shapes, names[1], asked, digest)


def _entry(name: str, entry: Any, config: SelectiveLoRAConfig) -> Entry:
    r, blocks = _integer(entry["r"]), _integer(entry["blocks"])
    gate = tuple(_number(value) for value in _list(entry["gate"]))
    active = tuple(_integer(block) for block in _list(entry["active"]))
    if len(gate) != blocks or not blocks:
        raise ValueError(f"{len(gate)} gates for {blocks} blocks")
    threshold = _single(config.threshold)
    # As the gates themselves, which are fp32.
    on = tuple(i for i, value in enumerate(gate) if _single(value) >= threshold)
    if active != on:
        raise ValueError(
            f"active={list(active)}, but gate={list(gate)} at threshold={config.threshold} gives {list(on)}"
        )
    alpha = _number(entry["lora_alpha"]) if "lora_alpha" in entry else _alpha_by_pattern(config, name)
    return Entry(r, alpha, blocks, active, gate)


def _alpha_by_pattern(config: SelectiveLoRAConfig, name: str) -> float:
    """`lora_alpha` of a layer in a directory that does not list it. A pattern that could run for ever is refused."""
    for pattern in config.alpha_pattern or ():
        # Without repetition, and with eight alternatives at most, there is little that can be tried.
        if re.search(r"[*+?{]", pattern) or pattern.count("|") > 8:
            raise ValueError(
                f"lora_alpha is missing, and alpha_pattern holds {pattern[:80]!r}, which is not run from a file; add "
                f'"lora_alpha" to each entry of "layers"'
            )
    return config.alpha_of(name)


def _asked(value: Any) -> str:
    """The budget that was asked for, once it is clear that it is one."""
    text = _text(value)
    if text:
        number = re.fullmatch(r"budget=(?:(\d{1,18})|([\d.e-]{1,30}))", text)
        if number is None:
            raise ValueError(f"asked={text[:80]!r}")
        check_budget(int(number[1]) if number[1] else float(number[2]), "blocks")
    return text


def _matrix(shape: Any) -> list[int]:
    sizes = [_integer(size) for size in _list(shape)]
    if len(sizes) != 2 or min(sizes) < 1:
        raise ValueError(f"{_short(shape)} is not the shape of a matrix")
    return sizes


def _mapping(value: Any) -> Mapping[str, Any]:
    if not isinstance(value, dict):
        raise TypeError(f"{_short(value)} is no object")
    return value


def _list(value: Any) -> list[Any]:
    if not isinstance(value, list):
        raise TypeError(f"{_short(value)} is no list")
    return value


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{_short(value)} is no text")
    return value


def _integer(value: Any) -> int:
    if type(value) is not int:
        raise TypeError(f"{_short(value)} is no integer")
    return value


def _number(value: Any) -> float:
    """A number that fp32 has, too."""
    if type(value) not in (int, float):
        raise TypeError(f"{_short(value)} is no number")
    try:
        number = float(value)
        _single(number)
    except OverflowError as error:
        raise ValueError(f"{_short(value)} is too large") from error
    if not math.isfinite(number):
        raise ValueError(f"{number} is not finite")
    return number


def _single(value: float) -> float:
    """`value` rounded to fp32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."
