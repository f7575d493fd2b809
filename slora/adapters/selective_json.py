"""The files of an adapter directory, and `selective.json`, read and checked. Nothing here imports torch."""

from __future__ import annotations

import math
import re
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

from slora.config import SelectiveLoRAConfig, check_budget
from slora.errors import CheckpointError
from slora.io.bounded import absence, as_said, read_json

WEIGHTS, CONFIG, SELECTIVE = "adapter_model.safetensors", "adapter_config.json", "selective.json"
# PEFT's prefix of module names.
PREFIX = "base_model.model."

# Version of the format of selective.json.
FORMAT = 1


class Entry(NamedTuple):
    """The entry of one layer."""

    r: int
    lora_alpha: float
    blocks: int
    active: tuple[int, ...]
    gate: tuple[float, ...]
    ranks: tuple[int, ...]
    """Of each block; 0 for an inactive one."""


class Selective(NamedTuple):
    """The content of `selective.json`.

    Attributes:
        config: that of `inject`. Its regular expressions come from a file and are not run.
        layers: `{name: entry}`.
        base_class: class name of the model.
        shapes: of the adapted weights, by layer.
        base_digest: digest of these weights (`slora.adapters.save_load.fingerprint`).
        asked: the budget that chose the blocks, such as "budget=4" or "budget=40 ranks", or a strategy, such as "sora";
            empty if the gates decided.
        tensors_digest: of `adapter_model.safetensors`; None in directories of early versions.
    """

    config: SelectiveLoRAConfig
    layers: dict[str, Entry]
    base_class: str
    shapes: dict[str, list[int]]
    base_digest: str
    asked: str
    tensors_digest: str | None


def read_selective(folder: Path) -> Selective:
    """Read `selective.json` in `folder` and check it as far as possible without a model.

    Raises:
        CheckpointError: it is missing, damaged, or contradicts itself; names the entry.
    """
    path = folder / SELECTIVE
    if not path.exists():
        raise CheckpointError(f"{path} {absence(path)}; give a directory that slora.save_adapter wrote")
    return checked(read_json(path), path)


def checked(content: Any, path: Path) -> Selective:
    """Return the content of `selective.json`, which `path` holds, checked as far as possible without a model.

    Raises:
        CheckpointError: it is damaged, or contradicts itself; names the entry.
    """
    try:
        number = _field(content, "format")
        if number != FORMAT:
            raise CheckpointError(
                f"{path} has format {as_said(number)}, and this version of slora reads {FORMAT}; load it with the "
                f"version that wrote it"
            )
        fields = _mapping(content, "config")
        for field in ("r", "lora_alpha", "use_rslora", "threshold"):
            # A default would silently change the mathematics.
            _field(fields, field)
        config = SelectiveLoRAConfig.from_dict(fields)
        base = _mapping(content, "base")
        shapes = {name: _matrix(name, shape) for name, shape in _mapping(base, "shapes").items()}
        names = _text("class", _field(base, "class")), _text("digest", _field(base, "digest"))
        digest = content.get("tensors_digest")
        asked = _asked(content.get("asked", ""))
        entries = _mapping(content, "layers")
        if shapes.keys() != entries.keys():
            raise ValueError(f"base has no shape, or layers no entry, for {min(shapes.keys() ^ entries.keys())!r}")
        digest = None if digest is None else _text("tensors_digest", digest)
    except CheckpointError:
        raise
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is incomplete or damaged ({error})") from error
    layers = {}
    for name, entry in entries.items():
        try:
            layers[name] = _entry(name, entry, config, shapes[name])
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"{path}: the entry of {name!r} is damaged ({error})") from error
    return Selective(config, layers, names[0], shapes, names[1], asked, digest)


def _entry(name: str, entry: Any, config: SelectiveLoRAConfig, shape: list[int]) -> Entry:
    r, blocks = (_integer(field, _field(entry, field)) for field in ("r", "blocks"))
    gate = tuple(_number("gate", value) for value in _list(entry, "gate"))
    active = tuple(_integer("active", block) for block in _list(entry, "active"))
    if len(gate) != blocks or not blocks:
        raise ValueError(f"'gate' has {len(gate)} values, and 'blocks' is {blocks}")
    if not 1 <= r <= max(shape):
        raise ValueError(f"'r' is {r}, and the weight has the shape {shape}")
    threshold = _single(config.threshold)
    # In fp32, like the gates themselves.
    on = tuple(i for i, value in enumerate(gate) if _single(value) >= threshold)
    if active != on:
        raise ValueError(
            f"active={list(active)}, but gate={list(gate)} at threshold={config.threshold} gives {list(on)}"
        )
    alpha = _number("lora_alpha", entry["lora_alpha"]) if "lora_alpha" in entry else _alpha_by_pattern(config, name)
    if not config.alpha_pattern and alpha != config.alpha_of(name):
        raise ValueError(f"'lora_alpha' is {alpha}, and the config, without alpha_pattern, has {config.lora_alpha}")
    own = [r if i in active else 0 for i in range(blocks)]
    ranks = tuple(_integer("ranks", rank) for rank in _list(entry, "ranks")) if "ranks" in entry else tuple(own)
    if len(ranks) != blocks or any(not 0 <= rank <= most for rank, most in zip(ranks, own, strict=True)):
        raise ValueError(f"ranks={list(ranks)}, but r={r}, and the active blocks are {list(active)} of {blocks}")
    return Entry(r, alpha, blocks, active, gate, ranks)


def _alpha_by_pattern(config: SelectiveLoRAConfig, name: str) -> float:
    """`lora_alpha` of a layer whose entry lacks it, by `alpha_pattern`; slow patterns are refused."""
    for pattern in config.alpha_pattern or ():
        # Without repetition, and with at most eight alternatives, matching takes little time.
        if re.search(r"[*+?{]", pattern) or pattern.count("|") > 8:
            raise ValueError(
                f"lora_alpha is missing, and alpha_pattern holds {pattern[:80]!r}, which is not run from a file; add "
                f'"lora_alpha" to each entry of "layers"'
            )
    return config.alpha_of(name)


def _asked(value: Any) -> str:
    """The requested budget, checked."""
    text = _text("asked", value)
    if text:
        if text in ("sora", "codyra"):
            return text
        number = re.fullmatch(r"budget=(?:(\d{1,18})|([\d.e-]{1,30}))( ranks)?", text)
        if number is None:
            raise ValueError(f"asked={text[:80]!r}")
        check_budget(int(number[1]) if number[1] else float(number[2]), "ranks" if number[3] else "blocks")
    return text


def _field(content: Any, name: str) -> Any:
    if not isinstance(content, dict):
        raise ValueError(f"it is {as_said(content)}, expected an object")
    if name not in content:
        raise ValueError(f"{name!r} is missing")
    return content[name]


def _no(name: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"{name!r} is {as_said(value)}, expected {expected}")


def _mapping(content: Any, name: str) -> Mapping[str, Any]:
    value = _field(content, name)
    if not isinstance(value, dict):
        raise _no(name, value, "an object")
    return value


def _matrix(name: str, shape: Any) -> list[int]:
    sizes = [_integer(name, size) for size in shape] if isinstance(shape, list) else []
    if len(sizes) != 2 or min(sizes) < 1:
        raise _no(name, shape, "the two sizes of a matrix")
    return sizes


def _list(content: Any, name: str) -> list[Any]:
    value = _field(content, name)
    if not isinstance(value, list):
        raise _no(name, value, "a list")
    return value


def _text(name: str, value: Any) -> str:
    if not isinstance(value, str):
        raise _no(name, value, "text")
    return value


def _integer(name: str, value: Any) -> int:
    if type(value) is not int:
        raise _no(name, value, "an integer")
    return value


def _number(name: str, value: Any) -> float:
    """A number within the range of fp32."""
    if type(value) not in (int, float):
        raise _no(name, value, "a number")
    try:
        number = float(value)
        _single(number)
    except OverflowError as error:
        raise _no(name, value, "a number within the range of fp32") from error
    if not math.isfinite(number):
        raise _no(name, value, "a finite number")
    return number


def _single(value: float) -> float:
    """`value` rounded to fp32."""
    return float(struct.unpack("<f", struct.pack("<f", value))[0])
