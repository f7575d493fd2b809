"""`compress_adapter` and `decompress_adapter`: an adapter as one small file of signs, and back.

The file is a safetensors file with

    signs   uint8: the signs of A and B of each active block, in the order of `selective.json` (`ternary.pack`)
    scales  fp32 [active blocks]: the factor on A and on B
    json    uint8: `selective.json` and `adapter_config.json`, deflated
    other tensors, under their names in the adapter: what `modules_to_save` trains, exactly as it was
"""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors.torch import save_file
from torch import Tensor

from slora.adapters.save_load import write_adapter
from slora.adapters.selective_json import CONFIG, PREFIX, SELECTIVE, WEIGHTS, Selective, checked
from slora.adapters.tensors import digest_of, read_adapter, read_safetensors, refuse_not_finite
from slora.adapters.ternary import Signs, inflated, pack, signs_of, squared_error, unpack
from slora.errors import CheckpointError, ConfigError
from slora.io.atomic import write_atomically
from slora.io.bounded import LARGEST, parse_json, read_json

SCALES = ("norm", "fit")


class Compressed(NamedTuple):
    """What compression cost.

    Attributes:
        before: bytes of the adapter directory's three files.
        after: bytes of the compressed file.
        exact: bytes of the tensors in it that are not compressed (`modules_to_save`).
        blocks: number of active blocks.
        error: `||dW - dW'|| / ||dW||` of the updates of all blocks together; 0 if they are 0.
        errors: the same of each layer, by name.
    """

    before: int
    after: int
    exact: int
    blocks: int
    error: float
    errors: dict[str, float]


def compress_adapter(
    folder: str | os.PathLike[str], out: str | os.PathLike[str], density: float = 0.2, scale: str | float = "norm"
) -> Compressed:
    """Write an adapter as a file of signs: see `slora.adapters.ternary`, after ComPEFT (arXiv 2311.13171).

    Args:
        folder: adapter directory of `slora.save_adapter`.
        out: file to write.
        density: share of the values of each A and B whose sign is kept, above 0 up to 1.
        scale: factor on the signs: "norm" keeps the norm of each block's update, "fit" makes its error least, a number
            is ComPEFT's alpha (times the standard deviation), to be tuned on validation data.

    Raises:
        ConfigError: `out` exists, the adapter has no active block, or an argument is out of range.
        CheckpointError: the adapter is missing or damaged.
        WriteError: the disk is full or the folder cannot be written.
    """
    folder, out = Path(folder), Path(out)
    scale = check_compression(out, density, scale)
    content, tensors = read_adapter(folder)
    raw, for_peft = (read_json(folder / name) for name in (SELECTIVE, CONFIG))
    if checked(raw, folder / SELECTIVE) != content:
        raise CheckpointError(f"{folder} was saved again meanwhile; compress it once that is complete")
    refuse_not_finite({name: value for name, value in tensors.items() if name in _lora_names(content)}, ())
    pairs = {name: [*_pairs(name, content, tensors, folder)] for name, entry in content.layers.items() if entry.active}
    if not pairs:
        raise ConfigError(f"{folder} has no active block, so there is no update to compress")
    exact = {name: value for name, value in tensors.items() if name not in _lora_names(content)}
    signs = {name: [signs_of(A, B, density, scale) for A, B in blocks] for name, blocks in pairs.items()}
    each = [s for blocks in signs.values() for s in blocks]
    raw["tensors_digest"] = digest_of(_restored(content, iter(each)) | exact)
    trits = torch.cat([matrix.reshape(-1) for s in each for matrix in (s.A, s.B)])
    text = json.dumps({"selective": raw, "adapter_config": for_peft}, separators=(",", ":"))
    held = {
        "signs": _as_tensor(pack(trits)),
        "scales": torch.tensor([s.scale for s in each]),
        "json": _as_tensor(zlib.compress(text.encode(), 9)),
    }
    squares = {
        name: [squared_error(A, B, s) for (A, B), s in zip(blocks, signs[name], strict=True)]
        for name, blocks in pairs.items()
    }
    # The scaling of a layer, which is common to its blocks, weighs the layers.
    total = [[_scaling(content, name) ** 2 * value for value in pair] for name in squares for pair in squares[name]]
    error = _ratio(total)
    # One entry: several would be written in a random order.
    metadata = {"slora_signs": json.dumps({"density": density, "scale": scale, "error": round(error, 4)})}
    write_atomically(out, lambda path: save_file(held | exact, path, metadata))
    return Compressed(
        before=sum((folder / name).stat().st_size for name in (WEIGHTS, SELECTIVE, CONFIG)),
        after=out.stat().st_size,
        exact=sum(value.nbytes for value in exact.values()),
        blocks=len(each),
        error=error,
        errors={name: _ratio(squares[name]) for name in squares},
    )


def decompress_adapter(file: str | os.PathLike[str], out: str | os.PathLike[str]) -> None:
    """Write the adapter directory that a file of `compress_adapter` holds; slora and PEFT load it.

    Raises:
        ConfigError: `out` exists.
        CheckpointError: the file is missing, damaged, or not of `compress_adapter`.
        WriteError: the disk is full or the folder cannot be written.
    """
    file, out = Path(file), Path(out)
    if out.exists():
        raise ConfigError(f"{out} exists; choose another folder, or remove it first")
    tensors = read_safetensors(file)
    try:
        signs, scales, text = (tensors.pop(name) for name in ("signs", "scales", "json"))
        held = parse_json(inflated(_as_bytes(text), LARGEST).decode())
        raw, for_peft = held["selective"], held["adapter_config"]
    except KeyError as error:
        raise CheckpointError(f"{file} lacks {error}; give a file that slora compress wrote") from error
    except (ValueError, TypeError) as error:
        raise _damaged(file, error) from error
    content = checked(raw, file)
    try:
        restored = _restored(content, _read_signs(content, signs, scales)) | tensors
    except (ValueError, StopIteration, RuntimeError) as error:
        raise _damaged(file, error) from error
    if digest_of(restored) != content.tensors_digest or not isinstance(for_peft, dict):
        raise _damaged(file, "its tensors are not those that were written")
    write_adapter(out, restored, for_peft, raw)


def check_compression(out: Path, density: float, scale: str | float) -> str | float:
    """Check arguments of `compress_adapter`; return `scale`, a number given as text as a number.

    Raises:
        ConfigError: see `compress_adapter`.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; choose another file, or remove it first")
    if isinstance(density, bool) or not isinstance(density, (int, float)) or not 0 < density <= 1:
        raise ConfigError(f"density={density!r} is not a share above 0 and up to 1, such as 0.2")
    if isinstance(scale, str) and scale in SCALES:
        return scale
    try:
        alpha = float(scale)
    except (TypeError, ValueError):
        alpha = 0.0
    if not 0 < alpha < 1e6:
        raise ConfigError(f"scale={scale!r} is neither norm nor fit nor a positive number, ComPEFT's alpha")
    return alpha


def _pairs(name: str, content: Selective, tensors: dict[str, Tensor], folder: Path) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield `A [r, K]` and `B [n, r]` of each active block of a layer, fp32."""
    entry = content.layers[name]
    r, blocks, active = entry.r, entry.blocks, entry.active
    N, K = content.shapes[name]
    n = N // blocks
    A, B = (tensors.get(key) for key in _keys(name))
    if A is None or B is None or (A.shape, B.shape) != ((len(active) * r, K), (blocks * n, len(active) * r)):
        raise CheckpointError(f"{folder / WEIGHTS}: A or B of {name!r} is missing or has another shape")
    for j, i in enumerate(active):
        rows = slice(j * r, (j + 1) * r)
        yield A[rows].float(), B[i * n : (i + 1) * n, rows].float()


def _read_signs(content: Selective, packed: Tensor, scales: Tensor) -> Iterator[Signs]:
    """Yield the signs of all blocks, in the order of `selective.json`."""
    shapes = [
        (entry.r, content.shapes[name][1], content.shapes[name][0] // entry.blocks)
        for name, entry in content.layers.items()
        for _ in entry.active
    ]
    trits = unpack(_as_bytes(packed), sum(r * (K + n) for r, K, n in shapes))
    if scales.dtype != torch.float32 or scales.shape != (len(shapes),):
        raise ValueError(f"'scales' is {scales.dtype} {list(scales.shape)} for {len(shapes)} blocks")
    parts = iter(trits.split([size for r, K, n in shapes for size in (r * K, r * n)]))
    for (r, K, n), scale in zip(shapes, scales.tolist(), strict=True):
        yield Signs(next(parts).view(r, K), next(parts).view(n, r), scale)


def _restored(content: Selective, signs: Iterator[Signs]) -> dict[str, Tensor]:
    """The LoRA tensors of an adapter directory: A stacked, B block-diagonal."""
    tensors = {}
    for name, entry in content.layers.items():
        if not entry.active:
            continue
        key_A, key_B = _keys(name)
        found = [next(signs) for _ in entry.active]
        tensors[key_A] = torch.cat([s.scale * s.A.float() for s in found])
        n, r = found[0].B.shape
        B = torch.zeros(entry.blocks * n, len(found) * r)
        for j, (i, s) in enumerate(zip(entry.active, found, strict=True)):
            B[i * n : (i + 1) * n, j * r : (j + 1) * r] = s.scale * s.B.float()
        tensors[key_B] = B
    return tensors


def _keys(name: str) -> tuple[str, str]:
    return f"{PREFIX}{name}.lora_A.weight", f"{PREFIX}{name}.lora_B.weight"


def _lora_names(content: Selective) -> set[str]:
    return {key for name in content.layers for key in _keys(name)}


def _scaling(content: Selective, name: str) -> float:
    entry = content.layers[name]
    return entry.lora_alpha / (entry.r**0.5 if content.config.use_rslora else entry.r)


def _ratio(squares: list[Any]) -> float:
    size = sum(pair[1] for pair in squares)
    return float((sum(pair[0] for pair in squares) / size) ** 0.5) if size else 0.0


def _as_tensor(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(content), dtype=torch.uint8)


def _as_bytes(tensor: Tensor) -> bytes:
    if tensor.dtype != torch.uint8:
        raise ValueError(f"it holds {tensor.dtype} where bytes are expected")
    return tensor.numpy().tobytes()


def _damaged(file: Path, error: object) -> CheckpointError:
    return CheckpointError(f"{file} is damaged ({error}); compress the adapter again")
