"""Values from YAML files and flags, converted to the types of the settings. Imports no torch."""

from __future__ import annotations

import difflib
import re
import types
from collections.abc import Mapping
from typing import Any, Literal, Union, get_args, get_origin

from slora.errors import ConfigError
from slora.io.plain import shown
from slora.sources.model_args import Scalar, arguments

# More choices than this are not all listed where some are near.
MANY = 5

# One or more module names or endings, separated by commas. Anything else is a regular expression.
_NAMES = re.compile(r"\s*[\w.-]+(\s*,\s*[\w.-]+)*\s*")


def converted(name: str, value: Any, hint: Any) -> Any:
    """Return `value` as the type `hint`; strings become numbers and lists (YAML reads 1e-3 as a string).

    Raises:
        ConfigError: it has no such form; names the setting `name`, the value and what is expected.
    """
    options = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    if isinstance(value, str) and list[str] in options and _NAMES.fullmatch(value) and value != "all-linear":
        return [entry.strip() for entry in value.split(",")]
    if bool in options and str in options and value in ("true", "false"):
        # As a flag gives it.
        return value == "true"
    if int in options and float in options and _is_share(value):
        # 1 is a number of blocks, 1.0 a share.
        options = tuple(option for option in options if option is not int)
    for option in options:
        result = _converted(value, option)
        if result is not None or (value is None and option is type(None)):
            return result
    choices = [choice for option in options if get_origin(option) is Literal for choice in get_args(option)]
    near = difflib.get_close_matches(value, map(str, choices), n=2) if isinstance(value, str) else []
    if near and len(choices) > MANY:
        raise ConfigError(f"{name}={shown(value)} is unknown; near names are {', '.join(map(repr, near))}")
    raise ConfigError(f"{name}={shown(value)} is not {' or '.join(_described(option) for option in options)}")


def _is_share(value: Any) -> bool:
    return isinstance(value, float) or (isinstance(value, str) and not value.strip().lstrip("+-").isdigit())


def _converted(value: Any, option: Any) -> Any:
    """`value` as the type `option`, or None where it cannot be."""
    if get_origin(option) is Literal:
        return value if value in get_args(option) else None
    if get_origin(option) is list:
        names = isinstance(value, (list, tuple)) and all(isinstance(entry, str) for entry in value)
        return list(value) if names else None
    if option == dict[str, Scalar]:
        return arguments(value)
    if get_origin(option) is dict:
        return _converted_mapping(value, get_args(option)[1])
    if option is str:
        return value if isinstance(value, str) else None
    if option is bool:
        return value if isinstance(value, bool) else None
    if option in (int, float) and isinstance(value, (int, float, str)) and not isinstance(value, bool):
        if option is int and isinstance(value, int):
            return value
        try:
            number = float(value)
        except (ValueError, OverflowError):
            return None
        if option is float:
            return number
        return int(number) if number.is_integer() else None
    return None


def _converted_mapping(value: Any, of: Any) -> dict[str, Any] | None:
    """A mapping, or a flag such as "name=number,name=number", with values of type `of`; None where it is neither."""
    if isinstance(value, str):
        pairs = [entry.rpartition("=")[::2] for entry in value.split(",")]
    elif isinstance(value, Mapping):
        pairs = list(value.items())
    else:
        return None
    entries = {str(name).strip(): _converted(number, of) for name, number in pairs}
    return None if "" in entries or None in entries.values() else entries


def _described(option: Any) -> str:
    if get_origin(option) is Literal:
        *first, last = map(repr, get_args(option))
        return f"{', '.join(first)} or {last}" if first else last
    if get_origin(option) is list:
        return "a list of names"
    if option == dict[str, Scalar]:
        return "arguments with scalar values, such as drop_path_rate=0.1,qk_norm=true"
    if get_origin(option) is dict:
        return "a mapping such as qkv=8,fc2=32"
    return {int: "an integer", float: "a number", str: "a string", bool: "true or false", type(None): "unset"}[option]
