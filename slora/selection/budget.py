"""`Budget`: exactly as many blocks as asked for, or a share of the blocks, their parameters or their FLOPs."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slora.config import BUDGET_PHASES, Unit, check_budget, rounded_up
from slora.errors import ConfigError, StateError
from slora.gates.cache import refresh_gates
from slora.gates.values import set_gates
from slora.layers import LoRABlocks
from slora.ops.flops import linear_flops
from slora.selection.ranking import Ranking, update_norm
from slora.selection.strategy import Strategy, freeze_gates, hold, require_layers, require_value

WARMUP, SETTLING = BUDGET_PHASES


class Budget(Strategy):
    """Ends with exactly the blocks asked for: all learn, the lowest ranked are switched off one after another, settle.

        selection = slora.selection.Budget(model, 4, steps=300)
        for x, y in loader:
            ...
            optimizer.step()
            selection.step()

    With `n` blocks and a budget of `K`, after a share `t` of the selection phase `K + round((n - K) * (1 - t)^3)` are
    left (the cubic schedule of Zhu and Gupta, arXiv 1710.01878). A block that is off stays off. Gates follow the
    ranking and nothing else: no optimizer moves them, a penalty on them has no effect, and inactive blocks cost
    nothing. A gate says where its block stands: above the threshold by as many places as blocks could still go before
    it, below by as many as would have to come back first.

    In several processes the scores are averaged over all, so that each makes the same choice.

    Args:
        model: adapted by `slora.inject`.
        budget: an int counts blocks; a float from 0 to 1 is a share of the `unit` of all blocks (1 is one block,
            1.0 is all). A share of blocks is rounded to the nearest number; one of parameters or FLOPs is kept below
            and filled by rank.
        steps: optimizer steps of the run.
        unit: what a share is of: "blocks", "parameters" (of A and B), or "flops" (of a forward pass, with the rows
            that each layer saw in the first step).
        ranking: scores blocks; by default `update_norm`, which is free. `SoloGain` is better and needs a loss.
        warmup: share of the steps in which every block learns; 0.3.
        settling: share of the steps at the end in which the choice stands, 0.6; at least a third. Keep the learning
            rate up until then: a decay before leaves little of it for the blocks that stay.

    Raises:
        ConfigError: the budget is not from 0 to all blocks, a share rounds to nothing, or a value is out of range.
        StateError: the model has no adapted layer, another strategy is at work on it, or matrices were freed.
    """

    name: ClassVar[str] = "budget"
    progress: ClassVar[frozenset[str]] = Strategy.progress | {"rows", "ranks", "left", "scores"}

    def __init__(
        self,
        model: nn.Module,
        budget: int | float,
        steps: int,
        *,
        unit: Unit = "blocks",
        ranking: Ranking | None = None,
        warmup: float = WARMUP,
        settling: float = SETTLING,
    ) -> None:
        self.unit = unit
        self.ranking: Ranking = update_norm if ranking is None else ranking
        if not callable(self.ranking):
            raise ConfigError(f"ranking={ranking!r} is not callable; use slora.selection.SoloGain(loss), or None")
        layers = require_layers(model)
        freed = [name for name, layer in layers.items() if layer.released]
        if freed:
            raise StateError(
                f"the LoRA matrices of {len(freed)} layers, the first {freed[0]!r}, were freed by inactive='frozen', "
                f"so they cannot be switched on for a new choice; use slora.keep_blocks, or inject anew"
            )
        self.budget = budget = check_budget(budget, unit, sum(layer.blocks for layer in layers.values()))
        self.rows = [1] * len(layers)
        if unit == "parameters":
            _target(budget, _costs(layers, unit, self.rows), unit)
        self.scores: list[float] | None = None
        self._hooks: list[Any] = []
        super().__init__(model, steps, warmup, settling)

    def start(self) -> None:
        """Switch every block on and take the gates out of training."""
        hold(self.layers)
        self.ranks = list(range(self.n))
        self._write(self.n)
        if self.unit == "flops":
            self.rows = [0] * len(self.layers)
            for number, layer in enumerate(self.layers.values()):
                self._hooks.append(layer.register_forward_pre_hook(self._noting_rows(number)))

    def _noting_rows(self, number: int) -> Any:
        def note(layer: nn.Module, args: tuple[Any, ...]) -> None:
            # A layer that did not run, and so costs nothing, keeps its 0.
            self.rows[number] = self.rows[number] or math.prod(args[0].shape[:-1])

        return note

    def _choose(self) -> None:
        self.check_rows()
        if self.taken < self.first:
            return
        if self.taken >= self.last:
            for layer in self.layers.values():
                layer.gate_cache.asked = f"budget={self.budget}"
        costs = _costs(self.layers, self.unit, self.rows)
        total, target = sum(costs), _target(self.budget, costs, self.unit)
        t = 1.0 if self.taken >= self.last else (self.taken - self.first) / (self.last - self.first)
        above = (total - target) * (1 - t) ** 3
        allowed = target + (round(above) if self.unit == "blocks" else above)
        kept = self.ranks[: self.left]
        once = bool(getattr(self.ranking, "once", False))
        # None to keep, or all, is no choice.
        if (self.scores is None and once and 0 < target < total) or (
            not once and sum(costs[i] for i in kept) > allowed
        ):
            self.scores = measured(self.ranking, self.model, self.n)
        if sum(costs[i] for i in kept) <= allowed:
            return
        scores = self.scores or [0.0] * self.n
        ordered = sorted(kept, key=lambda i: -scores[i])
        kept = _fill(ordered, costs, allowed)
        chosen = set(kept)
        self.ranks = [*kept, *(i for i in ordered if i not in chosen), *self.ranks[self.left :]]
        self._write(len(kept))

    def check_rows(self) -> None:
        """Check a share of the FLOPs with the rows that layers have seen so far, and count no more rows.

        The first `step` does so. Call it after a forward pass of your own to hear of a share that is too small before
        the first optimizer step.

        Raises:
            ConfigError: the share keeps no block.
            StateError: no layer has run.
        """
        if not self._hooks:
            return
        self._remove_hooks()
        if not any(self.rows):
            raise StateError(
                "unit='flops' needs the rows that each layer sees, but no layer ran before the first step() (a model "
                "compiled before the strategy was made does not say); use unit='parameters'"
            )
        _target(self.budget, _costs(self.layers, self.unit, self.rows), self.unit)

    def leave(self) -> None:
        """Count no more rows."""
        self._remove_hooks()

    def _remove_hooks(self) -> None:
        for hook in self._hooks:
            hook.remove()
        self._hooks = []

    def _write(self, left: int) -> None:
        """Leave the first `left` of the ranks on."""
        self.left = left
        set_gates(gates_of(self.ranks, left, self.layers))
        active = _active(self.layers)
        if active != left:
            dtype = next(iter(self.layers.values())).gate.dtype
            raise StateError(
                f"{left} of {self.n} blocks were to be on, but {active} are: gates in {dtype} cannot tell so many "
                f"ranks apart; keep the gates in fp32"
            )

    def _settle(self) -> None:
        hold(self.layers)
        self._write(self.left)

    def unfinished(self) -> str:
        """Return where the choice stands, and whether something else has changed it since."""
        active = _active(self.layers)
        if self.taken < self.last or active == self.left:
            return super().unfinished()
        return (
            f"the gates were changed since Budget made its choice: {active} blocks are active, {self.left} were "
            f"chosen; finish() of the strategy puts the choice back"
        )

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, in JSON's types."""
        return {
            **super().state_dict(),
            "budget": self.budget,
            "unit": self.unit,
            "rows": self.rows,
            "ranks": self.ranks,
            "left": self.left,
            "scores": self.scores,
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """See `Strategy.check_state`."""
        super().check_state(state)
        rows: Any = state.get("rows")
        ranks: Any = state.get("ranks")
        scores: Any = state.get("scores")
        left = state.get("left")
        require_value(state, "rows", _all_counts(rows) and len(rows) == len(self.layers))
        require_value(state, "ranks", _all_counts(ranks) and sorted(ranks) == list(range(self.n)))
        require_value(state, "left", type(left) is int and 0 <= left <= self.n)
        numbers = isinstance(scores, list) and len(scores) == self.n
        numbers = numbers and all(type(score) in (int, float) and math.isfinite(score) for score in scores)
        require_value(state, "scores", "scores" in state and (scores is None or numbers))
        if self.unit == "flops" and state["taken"]:
            require_value(state, "rows", any(rows))
            _target(self.budget, _costs(self.layers, self.unit, rows), self.unit)
        if state["taken"] >= state["last"]:
            costs = _costs(self.layers, self.unit, rows)
            spent = sum(costs[i] for i in ranks[:left])
            require_value(state, "left", spent <= _target(self.budget, costs, self.unit) * (1 + 1e-12))

    def _restore(self, state: dict[str, Any]) -> None:
        self.rows, self.ranks, self.scores = list(state["rows"]), list(state["ranks"]), state["scores"]
        if self.taken:
            self._remove_hooks()
        self._write(state["left"])
        if self.left < self.n:
            # In a run made longer, too: what is off stays off.
            self.first = min(self.first, self.taken)
        if self.taken >= self.last:
            self._choose()


def keep_blocks(
    model: nn.Module, budget: int | float, *, unit: Unit = "blocks", ranking: Ranking | None = None
) -> None:
    """Keep the highest ranked active blocks of a trained model, switch the others off, and freeze all gates.

    Args:
        budget: as for `Budget`; a share is of all blocks, active or not.
        unit: "blocks" or "parameters".
        ranking: by default `update_norm`.

    Raises:
        ConfigError: the budget is out of range, or above what is active.
        StateError: the model has no adapted layer, or is merged.
    """
    layers = require_layers(model)
    refresh_gates(model)
    n = sum(layer.blocks for layer in layers.values())
    budget = check_budget(budget, unit, n)
    if unit == "flops":
        raise ConfigError("unit='flops' needs the rows that each layer sees in a step; use unit='parameters'")
    costs = _costs(layers, unit, [1] * len(layers))
    target = _target(budget, costs, unit)
    on = [i in layer.activity().active for layer in layers.values() for i in range(layer.blocks)]
    if unit == "blocks" and target > sum(on):
        raise ConfigError(
            f"budget={budget} is {target:.0f} blocks, but only {sum(on)} of {n} are active; ask for fewer"
        )
    scores = measured(update_norm if ranking is None else ranking, model, n)
    ordered = sorted((i for i in range(n) if on[i]), key=lambda i: -scores[i])
    kept = _fill(ordered, costs, target)
    chosen = set(kept)
    ranks = [*kept, *(i for i in ordered if i not in chosen), *(i for i in range(n) if not on[i])]
    freeze_gates(model)
    set_gates(gates_of(ranks, len(kept), layers))
    for layer in layers.values():
        layer.gate_cache.asked = f"budget={budget}"


def measured(ranking: Ranking, model: nn.Module, n: int) -> list[float]:
    """Return the scores of `ranking`, averaged over processes; all finite, a NaN ranks last.

    Raises:
        ConfigError: the ranking returns something else than `[n]` scores, or NaN for every block.
    """
    scores: Any = ranking(model)
    if not isinstance(scores, Tensor) or scores.shape != (n,):
        found = f"shape {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ConfigError(f"the ranking returned {found}; expected a tensor with one score for each of {n} blocks")
    scores = scores.detach().float()
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        # A copy: the collective works in place.
        scores = scores.clone()
        torch.distributed.all_reduce(scores)
        scores /= torch.distributed.get_world_size()
    if n and bool(scores.isnan().all()):
        raise ConfigError(
            "the ranking gives no block a number (all scores are NaN): has the loss become infinite, or the sample?"
        )
    # Finite, because JSON, which a checkpoint's state is, knows no other numbers.
    values: list[float] = scores.nan_to_num(nan=torch.finfo(torch.float32).min).tolist()
    if n > 1 and min(values) == max(values):
        warnings.warn(
            f"the ranking gives every block the same score, {values[0]:g}, so the first blocks of the model stay: rank "
            f"after training (B is zero before), or by something that tells blocks apart",
            stacklevel=3,
        )
    return values


def gates_of(ranks: Sequence[int], left: int, layers: dict[str, LoRABlocks]) -> dict[LoRABlocks, list[float]]:
    """Return gates that tell the rank of each block and leave the first `left` on.

    `threshold + spread * (left + 1/2 - rank) / n`, with ranks from 1 and `spread` the size of the threshold; while all
    are on there are no ranks, and every gate is `threshold + spread / 2`.
    """
    n = len(ranks)
    place = {block: position for position, block in enumerate(ranks, start=1)}
    blocks = iter(range(n))
    result = {}
    for layer in layers.values():
        spread = max(abs(layer.threshold), 1e-3)
        if left == n:
            result[layer] = [layer.threshold + spread / 2] * layer.blocks
            continue
        result[layer] = [layer.threshold + spread * (left + 0.5 - place[next(blocks)]) / n for _ in range(layer.blocks)]
    return result


def _active(layers: dict[str, LoRABlocks]) -> int:
    return sum(len(layer.activity().active) for layer in layers.values())


def _costs(layers: dict[str, LoRABlocks], unit: str, rows: Sequence[int]) -> list[float]:
    """What each block costs, in the order of the blocks; `rows` are those that each layer sees."""
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


def _target(budget: int | float, costs: Sequence[float], unit: str) -> float:
    """The budget in units of cost."""
    if isinstance(budget, int):
        return budget
    if unit == "blocks":
        return math.floor(budget * len(costs) + 0.5)
    target, smallest = budget * sum(costs), min(cost for cost in costs if cost > 0)
    if 0 < target < smallest:
        raise ConfigError(
            f"budget={budget} of the {unit} is less than the smallest block has; the smallest share that keeps one is "
            f"{rounded_up(smallest / sum(costs))}, or write 0.0 for none"
        )
    return target


def _all_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(entry) is int and 0 <= entry < 1 << 53 for entry in value)


def _fill(ordered: Sequence[int], costs: Sequence[float], allowed: float) -> list[int]:
    """The blocks of `ordered` that fit, the first ones first; one that does not is passed over."""
    kept, spent = [], 0.0
    for i in ordered:
        # Sums of costs are exact in doubles, but a share of them is not.
        if spent + costs[i] <= allowed * (1 + 1e-12):
            kept.append(i)
            spent += costs[i]
    return kept
