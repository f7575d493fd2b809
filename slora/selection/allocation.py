"""What blocks cost, which of them fit a budget, and the gates that switch exactly those on."""

from __future__ import annotations

import math
from collections.abc import Sequence

from slora.config import Unit, check_budget, rounded_up
from slora.errors import ConfigError, StateError
from slora.layers import LoRABlocks
from slora.ops.flops import linear_flops


def gates_of(ranks: Sequence[int], left: int, layers: dict[str, LoRABlocks]) -> dict[LoRABlocks, list[float]]:
    """Return gate values that decrease with the rank and switch on the first `left` blocks of `ranks`.

    `threshold + spread * (left + 1/2 - rank) / n`, with ranks from 1 and `spread = |threshold|`; while all blocks are
    on nothing is ranked, and every gate is `threshold + spread / 2`.
    """
    n = len(ranks)
    rank = {block: position for position, block in enumerate(ranks, start=1)}
    blocks = iter(range(n))
    result = {}
    for layer in layers.values():
        if left == n:
            result[layer] = [gate_on(layer)] * layer.blocks
            continue
        spread = _spread(layer)
        result[layer] = [layer.threshold + spread * (left + 0.5 - rank[next(blocks)]) / n for _ in range(layer.blocks)]
    return result


def gate_on(layer: LoRABlocks) -> float:
    """Return the gate of a block that is on without a rank among others; as far below the threshold it is off."""
    return layer.threshold + _spread(layer) / 2


def _spread(layer: LoRABlocks) -> float:
    return max(abs(layer.threshold), 1e-3)


def active_count(layers: dict[str, LoRABlocks]) -> int:
    """Return the number of active blocks."""
    return sum(len(layer.activity().active) for layer in layers.values())


def block_costs(layers: dict[str, LoRABlocks], unit: str, rows: Sequence[int]) -> list[float]:
    """Return the cost of each block in `unit`, in the order of the blocks.

    Args:
        rows: input rows of each layer, for the unit "flops".
    """
    costs: list[float] = []
    for layer, M in zip(layers.values(), rows, strict=True):
        N, K = layer.base_weight.shape
        n, r = N // layer.blocks, layer.r
        each = {
            "blocks": 1,
            "parameters": r * (K + n),
            "flops": linear_flops(M, r, K) + linear_flops(M, n, r),
        }[unit]
        costs += [each] * layer.blocks
    return costs


def cost_limit(budget: int | float, costs: Sequence[float], unit: str) -> float:
    """Return the budget as a sum of costs.

    Raises:
        ConfigError: a share is below the cost of the smallest block; names the smallest share that keeps one.
    """
    if isinstance(budget, int):
        return budget
    if unit == "blocks":
        return math.floor(budget * len(costs) + 0.5)
    target, smallest = budget * sum(costs), min(cost for cost in costs if cost > 0)
    if 0 < target < smallest:
        raise ConfigError(
            f"budget={budget} of the {unit} is less than the smallest block takes; the smallest share that keeps one "
            f"is {rounded_up(smallest / sum(costs))}, or write 0.0 for none"
        )
    return target


def checked_budget(budget: int | float, unit: Unit, layers: dict[str, LoRABlocks]) -> int | float:
    """Check a budget against the blocks of a model, and return it; a share of the FLOPs as far as it can be known.

    Raises:
        ConfigError: it is not from 0 to all blocks, or ranks, or a share is below the smallest block.
    """
    each = (layer.blocks * (layer.r if unit == "ranks" else 1) for layer in layers.values())
    budget = check_budget(budget, unit, sum(each))
    if unit == "parameters":
        cost_limit(budget, block_costs(layers, unit, [1] * len(layers)), unit)
    return budget


def refuse_ranks(unit: Unit) -> None:
    """Refuse a budget of ranks where whole blocks are chosen.

    Raises:
        ConfigError: `unit` is "ranks".
    """
    if unit == "ranks":
        raise ConfigError(
            "unit='ranks' is of the strategies that choose single ranks, such as slora.selection.SoRA; use 'blocks'"
        )


def refuse_empty(layers: dict[str, LoRABlocks]) -> None:
    """Refuse blocks that would count, and never train.

    Raises:
        StateError: a rank-wise strategy has left no rank in some blocks; names the first of their layers.
    """
    empty = {name: blocks for name, layer in layers.items() if (blocks := layer.empty_blocks())}
    if empty:
        raise StateError(
            f"{sum(map(len, empty.values()))} of {sum(layer.blocks for layer in layers.values())} blocks, the first in "
            f"{next(iter(empty))!r}, have no rank left after a rank-wise strategy, so they cannot be switched on for a "
            f"new choice; use slora.keep_blocks, or inject again"
        )


def fill(ordered: Sequence[int], costs: Sequence[float], limit: float) -> tuple[list[int], list[int]]:
    """Return `(chosen, left out)`: greedily, in the given order, every block that still fits within `limit`."""
    chosen: list[int] = []
    left_out: list[int] = []
    spent = 0.0
    for i in ordered:
        # Sums of costs are exact in doubles, a share of them is not.
        fits = spent + costs[i] <= limit * (1 + 1e-12)
        (chosen if fits else left_out).append(i)
        spent += costs[i] if fits else 0.0
    return chosen, left_out
