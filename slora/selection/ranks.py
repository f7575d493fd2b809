"""`RankStrategy`: what all rank-wise strategies share. They choose single ranks of blocks by rank gates."""

from __future__ import annotations

import math
from abc import abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from slora.config import check_budget
from slora.errors import ConfigError, StateError
from slora.gates.values import set_gates
from slora.io.bounded import all_are, is_count
from slora.layers import LoRABlocks
from slora.module_tree.sharded import is_sharded
from slora.selection.allocation import gate_on
from slora.selection.strategy import Strategy, require_layers, require_value, stop_training_gates

UNIT = "ranks"

_DDP = (
    "DistributedDataParallel would not know the rank gates, which are made with the strategy: create it before the "
    "model is wrapped"
)


class RankStrategy(Strategy):
    """Chooses ranks inside the blocks: the update of a block is `c * B diag(g) A`, and a rank is gone where `g` is 0.

        selection = slora.selection.SoRA(model, 40, steps=300)  # before the optimizer, and before DDP
        optimizer = torch.optim.AdamW(slora.parameter_groups(model, lr=1e-3))
        for x, y in loader:
            loss = criterion(model(x), y) + selection.penalty()
            ...
            optimizer.step()
            selection.step()
        selection.finish()

    The rank gates `g [blocks, r]` are parameters of the layers (`slora.layers.ranks`) and train with the matrices. All
    ranks are computed until the choice is made; then the blocks that have none left are switched off, and the rank
    gates of the others train on. `finish` multiplies the gates into B and removes the other ranks: only there the
    shapes change, so that checkpoints of a run have one shape and it resumes bit for bit. The scaling stays what it
    was: `lora_alpha` follows the rank of the layer, and the config of the adapter records both. For more training
    after `finish` make a new optimizer.

    Where a strategy ends otherwise (`slora.freeze_gates`, another strategy, a failed run), the gates are multiplied
    into B, and A and B keep their shapes: before the choice no rank is removed, after it those not chosen are 0 in A
    and B, so that they never train again. `slora.save_adapter` without `finish` writes the same.

    Args:
        model: adapted by `slora.inject` and not trained yet (B = 0), as the method draws factors of its own.
        budget: an int counts ranks; a float from 0 to 1 is a share of all ranks, rounded to the nearest number.
        steps: optimizer steps of the run.
        warmup: share of the steps before the first rank is removed.
        settling: share of the steps at the end in which the choice is final; at least a third.

    Raises:
        ConfigError: a value is out of range.
        StateError: the blocks are trained already; matrices were freed, or sharded by `fully_shard`; or the model is
            wrapped by DistributedDataParallel, which has to come after.
    """

    progress: ClassVar[frozenset[str]] = Strategy.progress | {"kept", "tensors"}
    hold: ClassVar[bool] = True

    def __init__(
        self, model: nn.Module, budget: int | float | None, steps: int, *, warmup: float, settling: float
    ) -> None:
        layers = require_layers(model)
        _refuse_unfit(model, layers)
        self.total = sum(layer.blocks * layer.r for layer in layers.values())
        self.budget = None if budget is None else check_budget(budget, UNIT, self.total)
        # Ranks to keep, or None where the method's own rule decides.
        self.target: int | None = self.budget if isinstance(self.budget, int) else None
        if isinstance(self.budget, float):
            self.target = math.floor(self.budget * self.total + 0.5)
        self.kept: list[int] | None = None
        self._saw_matrices = self._saw_gates = self._observed = False
        super().__init__(model, steps, warmup, settling)

    def start(self) -> None:
        """Add rank gates, switch every block on and stop training the block gates."""
        stop_training_gates(self.layers)
        set_gates({layer: [gate_on(layer)] * layer.blocks for layer in self.layers.values()})
        self.gates = [layer.add_rank_gate() for layer in self.layers.values()]
        with torch.no_grad():
            self.initialise()

    @abstractmethod
    def initialise(self) -> None:
        """Set the first values of the rank gates and, if the method has its own, of the matrices."""

    @abstractmethod
    def update(self) -> None:
        """Apply the rule of the method to the rank gates, after step number `taken`; not called once ranks are kept."""

    def importance(self) -> Tensor:
        """Return the score of each rank, `[total]`; the highest are kept. By default the size of its gate."""
        return self.values().abs()

    @torch.no_grad()
    def values(self) -> Tensor:
        """Return all rank gates, `[total]`: layer after layer, block after block."""
        device = self.gates[0].device
        return torch.cat([gate.detach().flatten().to(device) for gate in self.gates])

    @torch.no_grad()
    def write(self, values: Tensor) -> None:
        """Set all rank gates, `[total]`."""
        for gate, own in zip(self.gates, values.split([gate.numel() for gate in self.gates]), strict=True):
            gate.copy_(own.view_as(gate))

    def before_step(self, optimizer: torch.optim.Optimizer) -> None:
        """Note what `optimizer` trains, and let the method read the gradients; called before each optimizer step.

        Raises:
            StateError: the model runs in a DistributedDataParallel that was made before the rank gates.
        """
        held = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        gates = any(id(gate) in held for gate in self.gates)
        matrices = any(id(layer.lora_B) in held for layer in self.layers.values())
        if gates and not self._saw_gates:
            self._refuse_earlier_ddp()
        self._saw_gates, self._saw_matrices = self._saw_gates or gates, self._saw_matrices or matrices
        if (gates or matrices) and self.kept is None and not self._observed:
            self._observed = True
            with torch.no_grad():
                self.observe()

    def _refuse_earlier_ddp(self) -> None:
        reference = next(iter(self.layers.values())).gate_cache.ddp
        ddp: Any = None if reference is None else reference()
        if ddp is not None and id(self.gates[0]) not in map(id, ddp._module_parameters):
            raise StateError(_DDP)

    def observe(self) -> None:
        """Read the gradients of the step that is about to be taken."""

    def step(self) -> None:
        """See `Strategy.step`.

        Raises:
            StateError: an optimizer moves the matrices, but none the rank gates.
        """
        if self._saw_matrices and not self._saw_gates:
            self._require_active()
            raise StateError(
                f"no optimizer moves the rank gates of this {type(self).__name__}, which were made with it: create the "
                f"strategy before the optimizer, as in AdamW(slora.parameter_groups(model, lr=...))"
            )
        super().step()
        self._observed = False
        if self.taken > self.last:
            self._hold()

    def _choose(self) -> None:
        if self.kept is None:
            with torch.no_grad():
                self.update()
            if self.taken >= self.last:
                self._close()
        self._hold()

    def chosen(self) -> list[int]:
        """Return the numbers of the ranks to keep: the `target` most important, or those whose gate is not 0."""
        if self.target is None:
            return torch.nonzero(self.values()).flatten().tolist()
        return top(self.importance(), self.target)

    @torch.no_grad()
    def _close(self) -> None:
        """Make the choice: what is not kept is 0 from now on."""
        self.kept = sorted(self.chosen())
        self._write_kept()

    @torch.no_grad()
    def _hold(self) -> None:
        """Set the gates of removed ranks to 0 again, which an optimizer with momentum moves."""
        if self.kept is not None:
            values = self.values()
            held = torch.zeros_like(values)
            held[self.kept] = values[self.kept]
            self.write(held)

    def _write_kept(self) -> None:
        """Switch the blocks off that keep no rank."""
        values = {}
        for layer, blocks in zip(self.layers.values(), self._kept_by_block(), strict=True):
            off = layer.threshold - (gate_on(layer) - layer.threshold)
            values[layer] = [gate_on(layer) if ranks else off for ranks in blocks]
            layer.gate_cache.asked = self.name if self.budget is None else f"budget={self.budget} {UNIT}"
        set_gates(values)

    def _kept_by_block(self) -> list[list[list[int]]]:
        """The kept ranks of each block of each layer."""
        remaining, first = iter([*(self.kept or ()), self.total]), 0
        number, found = next(remaining), []
        for layer in self.layers.values():
            blocks = []
            for _ in range(layer.blocks):
                ranks = []
                while number < first + layer.r:
                    ranks.append(number - first)
                    number = next(remaining)
                blocks.append(ranks)
                first += layer.r
            found.append(blocks)
        return found

    def _settle(self) -> None:
        stop_training_gates(self.layers)
        self._hold()
        self._write_kept()
        kept = self._kept_by_block()
        for layer, blocks in zip(self.layers.values(), kept, strict=True):
            layer.fold_rank_gate()
            if not layer.released:
                layer.keep_ranks(blocks)

    def leave(self) -> None:
        """Multiply the rank gates into B; removed ranks stay 0 in A and B."""
        for layer in self.layers.values():
            layer.fold_rank_gate(remove=self.kept is not None)

    def tensors(self) -> dict[str, Tensor]:
        """Return what a resumed run needs beside the model and single numbers, by name; written in place."""
        return {}

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs beside the state dict of the model: JSON values, and "tensors" by name."""
        state = {**super().state_dict(), "budget": self.budget, "total": self.total, "kept": self.kept}
        tensors = {name: value.detach().clone() for name, value in self.tensors().items()}
        return {**state, "tensors": tensors} if tensors else state

    def check_state(self, state: dict[str, Any]) -> None:
        """See `Strategy.check_state`."""
        super().check_state(state)
        kept: Any = state.get("kept")
        if kept is not None:
            numbers = all_are(is_count, kept) and kept == sorted(set(kept)) and all(i < self.total for i in kept)
            require_value(state, "kept", numbers and (self.target is None or len(kept) == self.target))
        require_value(state, "kept", kept is not None or state["taken"] < state["last"])
        expected, found = self.tensors(), state.get("tensors", {})
        names = isinstance(found, dict) and found.keys() == expected.keys()
        require_value(state, "tensors", names)
        for name, own in expected.items():
            value = found[name]
            fits = isinstance(value, Tensor) and value.shape == own.shape and value.dtype == own.dtype
            require_value(state["tensors"], name, fits and bool(value.isfinite().all()))

    def _restore(self, state: dict[str, Any]) -> None:
        for name, value in self.tensors().items():
            value.copy_(state["tensors"][name])
        self.kept = state["kept"]
        if self.kept is None and self.taken >= self.last:
            # The resumed run is shorter.
            self._close()
        elif self.kept is not None:
            self._write_kept()


def soft_threshold(values: Tensor, threshold: float, keep: int | None) -> Tensor:
    """Return `sign(v) * max(|v| - t, 0)`, the proximal step of an L1 penalty, leaving at least `keep` values that
    differ from 0, if there are so many.

    `t` is `threshold`, or if that would leave fewer than `keep`, the largest size of a value below the `keep` largest.
    """
    if keep:
        sizes = values.abs()
        least = sizes.topk(keep).values[-1]
        if threshold >= least:
            below = sizes[sizes < least]
            threshold = float(below.max()) if len(below) else 0.0
    return nn.functional.softshrink(values, threshold) if threshold else values.clone()


def top(scores: Tensor, count: int) -> list[int]:
    """Return the numbers of the `count` highest scores; among equal ones the first."""
    return scores.sort(descending=True, stable=True).indices[:count].tolist()


def _refuse_unfit(model: nn.Module, layers: dict[str, LoRABlocks]) -> None:
    for name, layer in layers.items():
        if layer.released:
            raise StateError(f"the LoRA matrices of {name!r} were freed by inactive='frozen'; inject again")
        if is_sharded(layer.lora_B):
            raise StateError(
                f"{name!r} is sharded by fully_shard, which would not know the rank gates; use Budget or Gates, or one "
                f"of the rank-wise strategies with DistributedDataParallel"
            )
        if bool(layer.lora_B.detach().any()):
            raise StateError(
                f"{name!r} is trained already (B is not 0), and rank-wise strategies start with factors of their own; "
                f"inject again, or use slora.keep_blocks or Budget"
            )
    if any(isinstance(module, DistributedDataParallel) for module in model.modules()):
        raise StateError(_DDP)


def require_budget(name: str, budget: int | float | None) -> None:
    """Refuse a method that needs a budget without one.

    Raises:
        ConfigError: `budget` is None.
    """
    if budget is None:
        raise ConfigError(f"{name} needs a budget of ranks, such as 40 or 0.1; sora and codyra also run without")
