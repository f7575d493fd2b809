"""Damaged copies of valid files, by a seed: what a disk, a half copy, another version or a hostile sender may give.

Files are held in memory as `{path within the folder: content}`. JSON and safetensors files are also damaged by their
meaning, so that what a reader checks late is reached; every other file by its bytes alone.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

Files = dict[str, bytes]
Seal = Callable[[Files], Files]


class Mutant(NamedTuple):
    """`files` after the changes that `what` describes."""

    number: int
    what: str
    files: Files


def mutants(
    files: Mapping[str, bytes],
    numbers: range,
    *,
    other: Mapping[str, bytes],
    seal: Seal = lambda files: files,
    seed: int = 0,
) -> Iterator[Mutant]:
    """Yield the mutants of `files` with these numbers; each follows from the seed and its own number alone.

    Args:
        other: valid files of the same names, but of something else; some of them are mixed in.
        seal: returns files whose digests fit their contents again; every other mutant is sealed, so that checks
            behind the digest are reached as well.
    """
    for number in numbers:
        rng = random.Random(f"{seed}/{number}")
        changed, notes = dict(files), []
        for _ in range(rng.choice((1, 1, 1, 2))):
            notes.append(_mutate(changed, other, rng))
        if rng.random() < 0.5:
            changed = seal(changed)
            notes.append("sealed")
        yield Mutant(number, "; ".join(notes), changed)


def write(folder: Path, files: Mapping[str, bytes]) -> None:
    """Make `files` the whole content of `folder`."""
    # Folders stay, since to remove and make them again takes longer than all the rest.
    for path in folder.rglob("*"):
        if not path.is_dir() or path.is_symlink():
            path.unlink()
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def read(folder: Path) -> Files:
    """Return all files of `folder`."""
    return {str(path.relative_to(folder)): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def _mutate(files: Files, other: Mapping[str, bytes], rng: random.Random) -> str:
    """Change `files` and say how."""
    if not files:
        return "no file is left"
    name = rng.choice(sorted(files))
    way = rng.random()
    if way < 0.03:
        del files[name]
        return f"{name} removed"
    if way < 0.08 and name in other:
        files[name] = other[name]
        return f"{name} of another"
    if way < 0.1:
        second = rng.choice(sorted(files))
        files[name], files[second] = files[second], files[name]
        return f"{name} and {second} exchanged"
    content = files[name]
    try:
        if way < 0.25:
            raise ValueError("by its bytes")
        if name.endswith(".json"):
            what, content = _mutate_json(content, rng)
        elif name.endswith(".safetensors"):
            what, content = (_mutate_header if way < 0.45 else _mutate_tensors)(content, rng)
        else:
            raise ValueError("by its bytes")
    except (ValueError, RecursionError, SafetensorError):
        what, content = _mutate_bytes(content, rng)
    files[name] = content
    return f"{name}: {what}"


def _mutate_bytes(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    damaged = bytearray(content)
    first, second = sorted(rng.randrange(len(damaged) + 1) for _ in range(2))
    way = rng.choice(("flip", "flip", "flip", "truncate", "cut out", "zero", "insert", "double"))
    if way == "flip" and damaged:
        for _ in range(rng.choice((1, 1, 1, 8))):
            damaged[rng.randrange(len(damaged))] ^= 1 << rng.randrange(8)
        return "bits flipped", bytes(damaged)
    if way == "truncate":
        return f"cut after {first} bytes", bytes(damaged[:first])
    if way == "cut out":
        return f"bytes {first} to {second} cut out", bytes(damaged[:first] + damaged[second:])
    if way == "zero":
        return f"bytes {first} to {second} zero", bytes(damaged[:first] + bytes(second - first) + damaged[second:])
    if way == "double":
        return "twice", bytes(damaged + damaged)
    return f"bytes inserted at {first}", bytes(damaged[:first] + rng.randbytes(rng.choice((1, 16))) + damaged[first:])


# Values by their text, since JSON's own writer knows few of them.
HOSTILE = (
    "null", "true", "false", "0", "-0.0", "-1", "1", "2", "3", "0.1", "0.05", "0.15", "1e400", "-1e400", "1e308",
    "1e39", "-1e39", "5e-324", "NaN", "Infinity", "-Infinity", str(2**31), str(2**63), str(-(2**63)), "1" + "0" * 30,
    "1" + "0" * 400, "1" + "0" * 5000, '""', '"NaN"', '"\\u0000"', '"\\ud800"', '"../../x"', '"/dev/zero"',
    '"' + "x" * 10000 + '"', '"(([a-z0-9.]+)+)+!"', '"("', '".*"', '"nn"', '"float64"', '"float8_e4m3fn"', "[]", "{}",
    "[0.15]", "[[0.15]]", "[null]", "[0, 0]", "[1, 0]", "[-1]", '["a"]', '{"a": 1}', '{"": null}',
    "[" * 40 + "]" * 40, "[" * 2000 + "]" * 2000, '{"a":' * 2000 + "0" + "}" * 2000,
)  # fmt: skip


def _mutate_json(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    root = [json.loads(content)]
    places = _places(root)
    holder, key = rng.choice(places)
    path = f"{key!r}"
    way = rng.choice(("replace", "replace", "replace", "nudge", "remove", "rename", "repeat", "exchange", "append"))
    raw = rng.choice(HOSTILE)
    if way == "remove" and holder is not root:
        del holder[key]
        return f"{path} removed", _text(root[0], raw)
    if way == "rename" and isinstance(holder, dict):
        new = rng.choice([*holder, key + "x", "", key.upper()])
        holder[new] = holder.pop(key)
        return f"{path} renamed to {new!r}", _text(root[0], raw)
    if way == "repeat" and isinstance(holder, dict):
        holder[_KEY] = 0
        return f"{path} twice, then {_short(raw)}", _text(root[0], f"{json.dumps(key)}: {raw}")
    if way == "exchange":
        second, at = rng.choice(places)
        if root not in (holder, second):
            holder[key], second[at] = json.loads(json.dumps([second[at], holder[key]]))
            return f"{path} and {at!r} exchanged", _text(root[0], raw)
    if way == "append" and isinstance(holder[key], list):
        holder[key].append(rng.choice([*holder[key], _VALUE]))
        return f"{path} longer", _text(root[0], raw)
    if way == "nudge" and type(holder[key]) in (int, float):
        holder[key] = rng.choice((holder[key] + 1, -holder[key], holder[key] * 2, holder[key] / 2, float(holder[key])))
        return f"{path} = {holder[key]}", _text(root[0], raw)
    holder[key] = _VALUE
    return f"{path} = {_short(raw)}", _text(root[0], raw)


_VALUE, _KEY = "@value@", "@key@"


def _text(value: Any, raw: str) -> bytes:
    """JSON text with `raw` in the place of the marks."""
    return json.dumps(value).replace(f'"{_KEY}": 0', raw).replace(f'"{_VALUE}"', raw).encode()


def _short(raw: str) -> str:
    return raw if len(raw) <= 30 else f"{raw[:20]}... ({len(raw)} characters)"


def _places(root: Any) -> list[tuple[Any, Any]]:
    """(container, key) of every value, the root's first."""
    found, open_ = [], [root]
    while open_:
        holder = open_.pop()
        for key in holder if isinstance(holder, dict) else range(len(holder)):
            found.append((holder, key))
            if isinstance(holder[key], (dict, list)):
                open_.append(holder[key])
    return found


def _mutate_header(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Damage the JSON before the tensors of a safetensors file, or the number before it."""
    length = int.from_bytes(content[:8], "little")
    header, data = content[8 : 8 + length], content[8 + length :]
    if rng.random() < 0.2:
        wrong = rng.choice((0, 1, length - 1, length + 1, length + 8, 2**31, 2**40, 2**63, 2**64 - 1))
        return f"header of {wrong} bytes", wrong.to_bytes(8, "little") + header + data
    what, header = _mutate_json(header, rng)
    header += b" " * (-len(header) % 8)
    return f"header: {what}", len(header).to_bytes(8, "little") + header + data


_DTYPES = (
    torch.float64, torch.float16, torch.bfloat16, torch.float8_e4m3fn, torch.complex64, torch.int64, torch.int32,
    torch.uint8, torch.bool,
)  # fmt: skip


def _mutate_tensors(content: bytes, rng: random.Random) -> tuple[str, bytes]:
    """Damage the tensors of a safetensors file, which stays a valid one."""
    tensors = load(content)
    if not tensors:
        raise ValueError("no tensor to change")
    name = rng.choice(sorted(tensors))
    value = tensors[name]
    way = rng.choice(("shape", "dtype", "value", "value", "rename", "remove", "add", "exchange", "all"))
    if way == "shape":
        tensors[name] = _other_shape(value, rng)
        return f"{name} of shape {list(tensors[name].shape)}", save(tensors)
    if way == "dtype":
        dtype = rng.choice(_DTYPES)
        tensors[name] = value.float().to(dtype)
        return f"{name} in {dtype}", save(tensors)
    if way == "value" and value.numel():
        number = rng.choice((float("nan"), float("inf"), float("-inf"), 0.0, 1.0, 1e30, -3.4e38))
        if value.is_floating_point():
            value.view(-1)[rng.randrange(value.numel())] = min(max(number, -6e4), 6e4) if value.itemsize < 4 else number
            return f"{name} holds {number}", save(tensors)
    if way == "rename":
        new = rng.choice([name + "x", name.upper(), "", name.partition(".")[2], *tensors])
        tensors[new] = tensors.pop(name)
        return f"{name} renamed to {new}", save(tensors)
    if way == "add":
        tensors[name + rng.choice((".x", "_x"))] = value.clone()
        return f"{name} once more", save(tensors)
    if way == "exchange":
        second = rng.choice(sorted(tensors))
        tensors[name], tensors[second] = tensors[second], value
        return f"{name} and {second} exchanged", save(tensors)
    if way == "all":
        tensors = {key: torch.randn(t.shape).to(t.dtype) for key, t in tensors.items()}
        return "all tensors of other values", save(tensors)
    del tensors[name]
    return f"{name} removed", save(tensors)


def _other_shape(value: Tensor, rng: random.Random) -> Tensor:
    shapes = [
        value.reshape(-1),
        value[None],
        value.reshape(*value.shape, 1),
        value.new_zeros(0),
        value.new_zeros(()),
        value.new_zeros([0, *value.shape]),
        torch.cat([value.reshape(-1), value.reshape(-1)[:1]]),
    ]
    if value.dim():
        shapes += [value[1:], torch.cat([value, value[:1]]), value.transpose(0, -1)]
    return rng.choice(shapes).clone(memory_format=torch.contiguous_format)
