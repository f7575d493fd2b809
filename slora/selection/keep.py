"""`keep_blocks`: chooses the blocks of a trained model at once, without a run."""

from __future__ import annotations

from torch import nn

from slora.config import Unit, check_budget
from slora.errors import ConfigError
from slora.gates.cache import refresh_gates
from slora.gates.values import set_gates
from slora.selection.allocation import block_costs, cost_limit, fill, gates_of, refuse_ranks
from slora.selection.ranking import Ranking, block_scores, update_norm
from slora.selection.strategy import freeze_gates, require_layers


def keep_blocks(
    model: nn.Module, budget: int | float, *, unit: Unit = "blocks", ranking: Ranking | None = None
) -> None:
    """Keep the highest ranked active blocks of a trained model, switch the others off, and freeze all gates.

    Args:
        budget: as for `Budget`; a share is of all blocks, active or not.
        unit: "blocks" or "parameters".
        ranking: by default `update_norm`.

    Raises:
        ConfigError: the budget is out of range, or larger than the number of active blocks.
        StateError: the model has no adapted layer, or is merged.
    """
    layers = require_layers(model)
    refresh_gates(model)
    n = sum(layer.blocks for layer in layers.values())
    refuse_ranks(unit)
    budget = check_budget(budget, unit, n)
    if unit == "flops":
        raise ConfigError("unit='flops' needs the input rows of each layer in a step; use unit='parameters'")
    costs = block_costs(layers, unit, [1] * len(layers))
    limit = cost_limit(budget, costs, unit)
    on = [i in layer.activity().active for layer in layers.values() for i in range(layer.blocks)]
    if unit == "blocks" and limit > sum(on):
        raise ConfigError(f"budget={budget} is {limit:.0f} blocks, but only {sum(on)} of {n} are active; ask for fewer")
    scores = block_scores(update_norm if ranking is None else ranking, model, n)
    ordered = sorted((i for i in range(n) if on[i]), key=lambda i: -scores[i])
    chosen, left_out = fill(ordered, costs, limit)
    ranks = [*chosen, *left_out, *(i for i in range(n) if not on[i])]
    freeze_gates(model)
    set_gates(gates_of(ranks, len(chosen), layers))
    for layer in layers.values():
        layer.gate_cache.asked = f"budget={budget}"
