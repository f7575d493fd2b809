"""`IncreLoRA`: blocks start with one rank, and important ones get more (Zhang et al. 2023, arXiv 2308.12043)."""

from __future__ import annotations

import math
import sys
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slora.config import INCRELORA_PHASES
from slora.errors import StateError
from slora.io.bounded import all_are, is_count
from slora.io.plain import count_of, nonnegative
from slora.module_tree.sharded import full
from slora.selection.adalora import ORTHOGONALITY, STD, orthogonality
from slora.selection.importance import Importance
from slora.selection.ranking import process_mean
from slora.selection.ranks import RankStrategy, require_budget, top
from slora.selection.strategy import require_value

WARMUP, SETTLING = INCRELORA_PHASES
RESERVE = 1e-5
"""Gate of the rank that a block would get next: its matrices train in advance."""


class IncreLoRA(RankStrategy):
    """Grows from one rank per block up to the budget, where `|dW * dL/ddW|` is highest.

    The method of arXiv 2308.12043. The updates are `P diag(lambda) Q` as in `AdaLoRA`, from lambda = 0, with its
    orthogonality term over the ranks that exist. The score of a block is the product of smoothed sensitivity and
    uncertainty (`Importance`) of

        sum |dW * dL/ddW| / sqrt(number of elements),    dW = c * P diag(lambda) Q

    The gradient of dW is that of the base weight, which therefore requires gradients between forward and optimizer step
    until the choice is final: one more product of the size of the base's per layer and step, and the memory of one
    gradient for each weight. Hooks take these gradients as they come, so that none stays on a base weight, and those of
    a step that no optimizer takes are dropped. A `GradScaler` does not unscale them, so that all scores are larger by
    its scale, in the same order. Beside its ranks a block has one in reserve, with lambda fixed at 1e-5, whose P and Q
    train in advance; the other rows of A and columns of B wait untouched.

    Every `every` steps of the selection phase the blocks with the highest scores get a rank each, so many that their
    number rises evenly to the budget; a block has at most the rank `r` it was injected with. (The published code adds
    a fixed number each time, until the budget is reached.) A budget below the number of blocks keeps that many blocks,
    of one rank. In several processes the sensitivities are averages over all, of the gradients of each.

    Args:
        budget: ranks to keep, or their share.
        every: steps between two allocations.
        orthogonality: weight of the term in the loss; 0.1 is published.
        model, steps, warmup, settling: see `RankStrategy`; no block grows in the warm-up.

    Raises:
        StateError: also in an optimizer step before the choice, if the base weights got no gradient, as where only
            parts of the model were called, and not the model.
    """

    name: ClassVar[str] = "increlora"
    progress: ClassVar[frozenset[str]] = RankStrategy.progress | {"ranks"}

    def __init__(
        self,
        model: nn.Module,
        budget: int | float | None,
        steps: int,
        *,
        every: int = 10,
        orthogonality: float = ORTHOGONALITY,
        warmup: float = WARMUP,
        settling: float = SETTLING,
    ) -> None:
        require_budget(self.name, budget)
        self.every = count_of("every", every)
        self.orthogonality = nonnegative("orthogonality", orthogonality)
        # Base weights that require gradients for the time being, each with the gradient of this step so far.
        self._borrowed: dict[nn.Parameter, Tensor | None] = {}
        super().__init__(model, budget, steps, warmup=warmup, settling=settling)

    def initialise(self) -> None:
        """Set lambda to 0 and draw P; every block has one rank."""
        for layer in self.layers.values():
            layer.lora_B.normal_(std=STD)
        self.limits = [layer.r for layer in self.layers.values() for _ in range(layer.blocks)]
        self.ranks = [1] * self.n
        self.write(torch.zeros_like(self.values()))
        self._arrange()
        self.scores = Importance({"blocks": self.values().new_zeros(self.n)})
        self._hooks: list[Any] = [self.model.register_forward_pre_hook(self._borrow)]
        weights: Any = [layer.base_weight for layer in self.layers.values()]
        for weight in dict.fromkeys(weights):
            trained = weight.requires_grad
            # Else torch refuses the hook, which outlasts this.
            weight.requires_grad_()
            self._hooks.append(weight.register_post_accumulate_grad_hook(self._take))
            weight.requires_grad_(trained)
        if "torch._dynamo" in sys.modules:
            # Graphs compiled for another model of the same code would be used again, without the first of these hooks.
            torch.compiler.reset()

    def _borrow(self, model: nn.Module, args: Any) -> None:
        """Let the base weights require gradients until the optimizer step."""
        # A copy of the model has a copy of this hook, but no strategy.
        active = next(iter(self.layers.values())).gate_cache.strategy is self
        if not active or self.kept is not None or not (model.training and torch.is_grad_enabled()):
            return
        if self._borrowed:
            if not torch.compiler.is_compiling() and all(layer.lora_B.grad is None for layer in self.layers.values()):
                # The step that they belong to was given up by zero_grad.
                self._borrowed = dict.fromkeys(self._borrowed)
            return
        for layer in self.layers.values():
            weight: Any = layer.base_weight
            if not weight.requires_grad:
                weight.requires_grad_()
                self._borrowed[weight] = None

    def _take(self, weight: nn.Parameter) -> None:
        """Add the gradient of a borrowed weight to that of this step, and take it off the weight."""
        if weight in self._borrowed:
            before, self._borrowed[weight] = self._borrowed[weight], weight.grad
            if before is not None and weight.grad is not None:
                self._borrowed[weight] = before.add_(weight.grad)
            weight.grad = None

    def _give_back(self) -> None:
        for weight in self._borrowed:
            weight.requires_grad_(False)
        self._borrowed = {}

    def observe(self) -> None:
        """Add the sensitivities of this step.

        Raises:
            StateError: no base weight got a gradient.
        """
        found, seen = [], False
        for layer in self.layers.values():
            weight: Any = layer.base_weight
            grad = self._borrowed.get(weight, weight.grad)
            seen = seen or grad is not None
            update = layer.scaling * layer.effective_B @ layer.lora_A
            size = torch.zeros_like(update) if grad is None else (update * full(grad).view_as(update)).abs()
            found.append((size.sum((1, 2)) / math.sqrt(size[0].numel())).to(self.gates[0].device))
        self._give_back()
        if not seen:
            raise StateError(
                "increlora needs the gradients of the base weights, and no layer has one: the model ran in evaluation "
                "mode, or only parts of it were called, not the model that the strategy was given; or use adalora"
            )
        self.scores.add("blocks", process_mean(torch.cat(found)))

    def step(self) -> None:
        """See `RankStrategy.step`; gradients of a step that no optimizer has taken are dropped."""
        super().step()
        self._give_back()

    def penalty(self) -> Tensor | float:
        """Return the orthogonality term over the ranks that exist, in the layers that have an active block."""
        on = [gates != 0 for gates in self.gates]
        active = ((layer, on[i]) for i, layer in enumerate(self.layers.values()) if layer.activity().active)
        return orthogonality(self.orthogonality, active)

    def update(self) -> None:
        """Give ranks to the blocks with the highest scores, and hold the gates of those that nobody has yet."""
        assert self.target is not None
        step, phase = self.taken - self.first, self.last - self.first
        if self.taken >= self.last or (step > 0 and step % self.every == 0):
            t = 1.0 if self.taken >= self.last else step / phase
            self._grow(self.n + round((self.target - self.n) * t))
        self._arrange()

    def _grow(self, target: int) -> None:
        """Give out ranks until there are `target`, one per block and round."""
        scores = self.scores.score("blocks")
        while (missing := target - sum(self.ranks)) > 0:
            room = [i for i in range(self.n) if self.ranks[i] < self.limits[i]]
            for i in top(scores[room], missing):
                self.ranks[room[i]] += 1

    def _arrange(self) -> None:
        """Set the gates of the ranks that no block has yet: `RESERVE` for the next of each, 0 for the others."""
        values, first = self.values(), 0
        for rank, limit in zip(self.ranks, self.limits, strict=True):
            values[first + rank : first + limit] = 0.0
            if rank < limit:
                values[first + rank] = RESERVE
            first += limit
        self.write(values)

    def chosen(self) -> list[int]:
        """Return the numbers of the ranks that blocks have; with fewer than one per block, those of the best blocks."""
        assert self.target is not None
        # A run that a resume has made shorter may lack ranks.
        self._grow(self.target)
        starts = [sum(self.limits[:i]) for i in range(self.n)]
        if self.target < self.n:
            return [starts[i] for i in top(self.scores.score("blocks"), self.target)]
        return [start + i for start, rank in zip(starts, self.ranks, strict=True) for i in range(rank)]

    def leave(self) -> None:
        """Multiply the rank gates into B, and let the base weights be."""
        for hook in self._hooks:
            hook.remove()
        self._give_back()
        if not self.taken:
            # What is in reserve, too, so that the model is as it was before.
            self.write(torch.zeros_like(self.values()))
        super().leave()

    def tensors(self) -> dict[str, Tensor]:
        """See `RankStrategy.tensors`."""
        return self.scores.tensors()

    def state_dict(self) -> dict[str, Any]:
        """See `RankStrategy.state_dict`."""
        return {
            **super().state_dict(),
            "every": self.every,
            "orthogonality": self.orthogonality,
            "ranks": list(self.ranks),
        }

    def check_state(self, state: dict[str, Any]) -> None:
        """See `Strategy.check_state`."""
        super().check_state(state)
        ranks: Any = state.get("ranks")
        fits = all_are(is_count, ranks) and len(ranks) == self.n
        require_value(state, "ranks", fits and all(1 <= r <= m for r, m in zip(ranks, self.limits, strict=True)))

    def _restore(self, state: dict[str, Any]) -> None:
        self.ranks = list(state["ranks"])
        super()._restore(state)
