"""The position of each block in a figure: a row per transformer layer, a column per projection."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TypeVar

# Layers whose three blocks are query, key and value.
_FUSED = ("qkv", "in_proj", "attn", "self_attn", "query_key_value")

# Projections of attention in drawing order.
_ORDER = (
    (*_FUSED, "q", "q_proj", "query"), ("k", "k_proj", "key"), ("v", "v_proj", "value"), ("proj", "out_proj", "o_proj"),
)  # fmt: skip

Value = TypeVar("Value")


def grid_position(layer: str) -> tuple[str, str]:
    """Return `(row, projection)` of a layer: `blocks.3.attn.qkv` is `("blocks.3", "attn.qkv")`.

    The row ends with the last number of the name. For a layer without one it is the parent, or `model` if there is
    none.
    """
    parts = layer.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    cut = numbers[-1] + 1 if numbers else len(parts) - 1
    return ".".join(parts[:cut]) or "model", ".".join(parts[cut:])


def by_cell(values: Mapping[str, Sequence[Value]]) -> dict[tuple[str, str], Value]:
    """Return `{(row label, column label): value}` of all blocks, with labels as short as possible.

    Args:
        values: `{layer name: one value per block}`.
    """
    positions = {layer: grid_position(layer) for layer in values}
    # JSON files sort layers as text: 10 before 2, proj before qkv.
    positions = dict(sorted(positions.items(), key=lambda item: (_counting(item[1][0]), _flow(item[1][1]))))
    row_names = _short_rows(list(dict.fromkeys(row for row, _ in positions.values())))
    column_names = _short_columns(list(dict.fromkeys(column for _, column in positions.values())))
    cells = {}
    for layer, (row, column) in positions.items():
        own, name, leaf = values[layer], column_names[column], column.rpartition(".")[2]
        for i, value in enumerate(own):
            if len(own) == 3 and leaf in _FUSED:
                label = name.removesuffix(leaf) + "qkv"[i]
            else:
                label = name if len(own) == 1 else f"{name} {i + 1}"
            cells[row_names[row], label] = value
    return cells


def _counting(name: str) -> list[tuple[int, str]]:
    """A sort key that compares numbers in a name by value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _flow(column: str) -> int:
    """A sort key in data-flow order: query, key, value, output of the attention, the rest."""
    leaf = column.rpartition(".")[2]
    return next((i for i, names in enumerate(_ORDER) if leaf in names), len(_ORDER))


def _short_rows(rows: list[str]) -> dict[str, str]:
    """Rows by number, with a prefix if several towers have the same numbers: `visual 3`."""
    numbers = {row: ".".join(part for part in row.split(".") if part.isdigit()) for row in rows}
    if len(set(numbers.values())) == len(rows) and all(numbers.values()):
        return numbers
    stems = {row: [part for part in row.split(".") if not part.isdigit()] for row in rows}
    while len({(stem or [""])[-1] for stem in stems.values()}) == 1 and any(stems.values()):
        stems = {row: stem[:-1] for row, stem in stems.items()}
    short = {row: " ".join(filter(None, (".".join(stems[row]), numbers[row]))) or row for row in rows}
    return short if len(set(short.values())) == len(rows) else {row: row for row in rows}


def _short_columns(columns: list[str]) -> dict[str, str]:
    """The shortest suffix of each name that is unique; names without one stay whole."""
    short = {}
    for column in columns:
        parts = column.split(".")
        endings = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        alone = (e for e in endings if not any(f".{c}".endswith(f".{e}") for c in columns if c != column))
        short[column] = next(alone, column)
    return short
