"""Scalars and collections of other libraries as Python's own types, for JSON and checkpoints. Without torch."""

from __future__ import annotations

import math
import numbers
from collections.abc import Iterable, Mapping
from typing import Any

from slora.errors import ConfigError


def plain(value: Any) -> Any:
    """Return a scalar (of NumPy or PyTorch, a fraction, a str subclass) as bool, int, float or str.

    Anything else is returned unchanged.
    """
    if getattr(value, "ndim", None) == 0 and callable(getattr(value, "item", None)):
        try:
            value = value.item()
        except RuntimeError:
            # On the meta device there is no value.
            return value
    if isinstance(value, bool):
        return value
    if isinstance(value, numbers.Integral):
        return int(value)
    if isinstance(value, numbers.Real):
        try:
            return float(value)
        except OverflowError:
            return value
    return str.__str__(value) if isinstance(value, str) else value


def nonnegative(name: str, value: Any) -> float:
    """Return a finite number from 0 up as a float.

    Raises:
        ConfigError: it is negative, not finite or not a number; names it and its value.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, (int, float)) or not (math.isfinite(number) and number >= 0):
        raise ConfigError(f"{name}={value!r} is negative or not a finite number; use 0 or more")
    return float(number)


def count_of(name: str, value: Any) -> int:
    """Return a count, 1 or more, as an int.

    Raises:
        ConfigError: it is not a positive integer; names it and its value.
    """
    number = plain(value)
    if isinstance(number, bool) or not isinstance(number, int) or number < 1:
        raise ConfigError(f"{name}={value!r} is not a positive integer")
    return number


def shown(value: Any) -> str:
    """Return `repr(value)` for a message: of a huge integer its size, of a long text the first 200 characters."""
    if isinstance(value, int) and value.bit_length() > 128:
        return f"<an integer of {value.bit_length()} bits>"
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]}..."


def plain_mapping(value: Any) -> Any:
    """Return a mapping between scalars as a dict of `plain` ones; anything else unchanged."""
    return {plain(key): plain(entry) for key, entry in value.items()} if isinstance(value, Mapping) else value


def plain_names(field: str, value: Any, expected: str) -> Any:
    """Return a collection of names as a list, a set sorted; a string or None unchanged.

    Raises:
        ConfigError: it is something else; the message names `field` and what is `expected`.
    """
    value = plain(value)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        raise ConfigError(f"{field}={value!r} is {expected}; for its keys alone write {field}={list(value)!r}")
    if not isinstance(value, Iterable) or isinstance(value, bytes):
        raise ConfigError(f"{field}={value!r} is {expected}")
    return plain_list(value)


def plain_list(values: Iterable[Any]) -> list[Any]:
    """Return `values`, made `plain`, as a list; those of a set sorted."""
    entries = [plain(value) for value in values]
    return sorted(entries, key=str) if isinstance(values, (set, frozenset)) else entries
