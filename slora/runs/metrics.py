"""`metrics.jsonl`, read: one JSON object a line, every value checked. Imports no torch."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

from slora.errors import CheckpointError
from slora.io.bounded import all_are, is_count, parse_json, read_bytes

METRICS = "metrics.jsonl"

# A record of a thousand gates has 20 kB.
LARGEST = 1 << 30

_log = logging.getLogger("slora")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the records in a `metrics.jsonl`; a last line that a kill cut short is skipped.

    Other invalid lines are skipped with a warning in the log.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        lines = read_bytes(path, LARGEST).splitlines(keepends=True)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; give the folder of a run") from error
    records, broken = [], []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_checked(parse_json(line.decode("utf-8"))))
        except ValueError as error:
            if number < len(lines) or line.endswith(b"\n"):
                broken.append(f"line {number} ({error})")
    if broken:
        _log.warning(
            "%s: skipped %d of %d lines, which are not valid records: %s", path, len(broken), len(lines), broken[0]
        )
    return records


def _checked(record: Any) -> dict[str, Any]:
    """Return `record` if its values have the types that `Recorder` writes.

    Raises:
        ValueError: one has another type.
    """
    if not isinstance(record, dict):
        raise ValueError("it is not a JSON object")
    if not is_count(record.get("step")):
        raise ValueError(f"its step is {str(record.get('step'))[:40]}")
    for name, value in record.items():
        holds = _OTHER.get(name, _is_number)
        if value is not None and not holds(value):
            raise ValueError(f"its {name[:40]!r} has the wrong type")
    if ("blocks" in record) != ("active" in record) or not all(
        is_count(record.get(name, 0)) for name in ("blocks", "active")
    ):
        raise ValueError("its numbers of blocks are not counts")
    return record


def _is_number(value: object) -> bool:
    # Beyond it the range of an axis would overflow.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100


def _per_block(value: object) -> bool:
    return isinstance(value, dict) and all(all_are(_is_number, numbers) for numbers in value.values())


# Values that are not numbers.
_OTHER: dict[str, Callable[[object], bool]] = {
    "error": lambda value: isinstance(value, str),
    "gates": _per_block,
    "drift": _per_block,
    "feature_drift": _per_block,
    "retention": lambda value: isinstance(value, dict) and all(map(_is_number, value.values())),
    "active_blocks": lambda value: (
        isinstance(value, dict) and all(all_are(is_count, blocks) for blocks in value.values())
    ),
}
