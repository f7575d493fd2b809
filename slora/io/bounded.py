"""Reading files that may come from elsewhere: only regular files, with limits on size, nesting and digits.

A pipe or a device in place of a file could be read for ever; text nested thousands of levels deep, or a number of
thousands of digits, breaks later code. Nothing here imports torch.
"""

from __future__ import annotations

import json
import math
import os
import re
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slora.errors import CheckpointError

# Bytes. The largest JSON file, the state of a long run, has a few MB.
LARGEST = 64 << 20

# Levels of nesting; slora writes six.
DEEPEST = 32

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")

_FILE_TYPES = {
    stat.S_IFDIR: "a folder",
    stat.S_IFIFO: "a pipe",
    stat.S_IFCHR: "a device",
    stat.S_IFBLK: "a device",
    stat.S_IFSOCK: "a socket",
}


def require_file(path: str | os.PathLike[str]) -> None:
    """Check that `path` is a regular file, or a link to one.

    Raises:
        CheckpointError: it is missing, or a folder, a pipe or a device.
    """
    os.close(_opened(path))


def read_bytes(path: str | os.PathLike[str], largest: int = LARGEST) -> bytes:
    """Return the content of a regular file of at most `largest` bytes.

    Raises:
        CheckpointError: it is missing, larger, cannot be read, or is not a regular file.
    """
    with os.fdopen(_opened(path), "rb") as file:
        try:
            content = bytearray()
            # Not by its size: that of files such as those in /proc is 0.
            while len(content) <= largest and (chunk := file.read(1 << 20)):
                content += chunk
        except OSError as error:
            raise _unreadable(path, error) from error
    if len(content) > largest:
        raise CheckpointError(
            f"{path} is larger than {largest / (1 << 20):g} MiB, too large for such a file; remove it"
        )
    return bytes(content)


def read_text(path: str | os.PathLike[str], largest: int = LARGEST) -> str:
    """Return the content of a regular file in UTF-8.

    Raises:
        CheckpointError: see `read_bytes`; or it is not UTF-8.
    """
    try:
        return read_bytes(path, largest).decode("utf-8")
    except UnicodeDecodeError as error:
        raise CheckpointError(f"{path} is not text in UTF-8 ({error}); it may be damaged") from error


def read_json(path: str | os.PathLike[str], largest: int = LARGEST) -> Any:
    """Read a JSON file whose numbers are finite.

    Raises:
        CheckpointError: see `read_bytes`; or it is not JSON.
    """
    content = read_bytes(path, largest)
    try:
        return parse_json(content.decode("utf-8"))
    except ValueError as error:
        raise CheckpointError(f"{path} is not readable JSON ({error}); it may be damaged") from error


def parse_json(text: str) -> Any:
    """Return the value of JSON text whose numbers are finite.

    Raises:
        ValueError: it is not JSON, holds a number that is not finite or has more than 40 digits, or is nested more
            than 32 levels deep.
    """
    try:
        value = json.loads(text, parse_int=_integer, parse_float=_number, parse_constant=_number)
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    level = [value]
    for _ in range(DEEPEST):
        level = [child for entry in level for child in _children(entry) if isinstance(child, (dict, list))]
        if not level:
            break
    else:
        raise ValueError(f"it is nested more than {DEEPEST} levels deep")
    if _SURROGATE.search(text):
        # A lone surrogate can be neither printed nor written. UnicodeEncodeError is a ValueError.
        json.dumps(value, ensure_ascii=False).encode("utf-8")
    return value


def absence(path: Path) -> str:
    """Return why `path` cannot be found, as the end of a sentence."""
    try:
        os.stat(path)
    except FileNotFoundError:
        return "does not exist"
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    return "exists now"


def as_said(value: Any) -> str:
    """Return a JSON value for a message: objects and lists by their type, long text cut."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else f"a list of {len(value)}"
    text = str(value).lower() if isinstance(value, bool) else "null" if value is None else repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."


def is_count(value: Any) -> bool:
    """Whether a JSON value is an integer from 0 to 2**53 - 1."""
    return type(value) is int and 0 <= value < 1 << 53


def is_number(value: Any) -> bool:
    """Whether a JSON value is a finite number within the range of a double."""
    return type(value) in (int, float) and abs(value) < 1e300 and math.isfinite(value)


def all_are(holds: Callable[[Any], bool], value: Any) -> bool:
    """Whether a JSON value is a list whose entries all satisfy `holds`."""
    return isinstance(value, list) and all(map(holds, value))


def _children(value: Any) -> Any:
    return value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()


def _integer(text: str) -> int:
    if len(text) > 40:
        raise ValueError(f"it holds a number of {len(text)} digits")
    return int(text)


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"it holds {text[:40]}, which is not a finite number")
    return value


def _opened(path: str | os.PathLike[str]) -> int:
    """A descriptor of a regular file; opening a pipe does not block."""
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except (OSError, ValueError) as error:
        raise _unreadable(path, error) from error
    mode = os.fstat(descriptor).st_mode
    if not stat.S_ISREG(mode):
        os.close(descriptor)
        raise CheckpointError(f"{path} is {_FILE_TYPES.get(stat.S_IFMT(mode), 'not a regular file')}, expected a file")
    return descriptor


def _unreadable(path: str | os.PathLike[str], error: Exception) -> CheckpointError:
    return CheckpointError(f"{Path(os.fspath(path))!s} cannot be read ({getattr(error, 'strerror', None) or error})")
