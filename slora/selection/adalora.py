"""`AdaLoRA`: a budget of ranks for the whole model, allocated by importance (Zhang et al. 2023, arXiv 2303.10512)."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from slora.config import ADALORA_PHASES
from slora.io.plain import count_of, nonnegative
from slora.layers import LoRABlocks
from slora.selection.importance import Importance
from slora.selection.ranks import RankStrategy, require_budget, top

WARMUP, SETTLING = ADALORA_PHASES
ORTHOGONALITY, STD = 0.1, 0.02


class AdaLoRA(RankStrategy):
    """Updates `P diag(lambda) Q`; the lambdas of the least important triplets are 0, more and more of them.

    The method of arXiv 2303.10512, with P = B, lambda = g and Q = A. At the start lambda = 0 and P is drawn from
    N(0, 0.02^2), as published; Q stays Kaiming-uniform, of similar size. The loss has a term `orthogonality` times the
    mean over all P and Q of `||P.T P - I||_F` and `||Q Q.T - I||_F`. The importance of a triplet is

        s(lambda_i) + mean_j s(P_ji) + mean_j s(Q_ij)

    where `s` is the product of smoothed sensitivity and uncertainty (`Importance`) of `|w * dL/dw|`, read before each
    optimizer step; it takes two more numbers per element of P and Q. After a share `t` of the selection phase the
    lambdas of all but the `K + (n - K) * (1 - t)^3` most important triplets are set to 0, every `every` steps. P, Q and
    the gradient of lambda stay, so that such a triplet may come back until the choice is final. The scaling stays
    `lora_alpha / r` of the first rank, as in the published code.

    Args:
        budget: ranks to keep, or their share.
        every: steps between two allocations.
        orthogonality: weight of the term in the loss; 0.1 is published.
        model, steps, warmup, settling: see `RankStrategy`.
    """

    name: ClassVar[str] = "adalora"

    def __init__(
        self,
        model: nn.Module,
        budget: int | float | None,
        steps: int,
        *,
        every: int = 1,
        orthogonality: float = ORTHOGONALITY,
        warmup: float = WARMUP,
        settling: float = SETTLING,
    ) -> None:
        require_budget(self.name, budget)
        self.every = count_of("every", every)
        self.orthogonality = nonnegative("orthogonality", orthogonality)
        super().__init__(model, budget, steps, warmup=warmup, settling=settling)

    def initialise(self) -> None:
        """Set lambda to 0 and draw P."""
        like: dict[str, Tensor] = {}
        for (name, layer), gate in zip(self.layers.items(), self.gates, strict=True):
            gate.zero_()
            layer.lora_B.normal_(std=STD)
            like |= {f"{name}.{part}": value.detach() for part, value in _factors(layer).items()}
        self.scores = Importance(like)

    def penalty(self) -> Tensor | float:
        """Return the orthogonality term over the layers that have an active block."""
        return orthogonality(
            self.orthogonality, ((layer, None) for layer in self.layers.values() if layer.activity().active)
        )

    def observe(self) -> None:
        """Add the sensitivities of this step."""
        for name, layer in self.layers.items():
            for part, value in _factors(layer).items():
                grad = torch.zeros_like(value) if value.grad is None else value.grad
                self.scores.add(f"{name}.{part}", (value * grad).abs())

    def importance(self) -> Tensor:
        """Return the importance of each triplet, `[total]`."""
        device, found = self.gates[0].device, []
        for name in self.layers:
            score = self.scores.score
            of_P, of_Q = score(f"{name}.P").mean(1), score(f"{name}.Q").mean(2)
            found.append((score(f"{name}.lambda") + of_P + of_Q).flatten().to(device))
        return torch.cat(found)

    def update(self) -> None:
        """Set the lambdas of triplets beyond the budget of this step to 0."""
        assert self.target is not None
        if self.taken <= self.first or (self.taken - self.first) % self.every:
            return
        t = (self.taken - self.first) / (self.last - self.first)
        left = int(self.target + (self.total - self.target) * (1 - t) ** 3)
        values, chosen = self.values(), top(self.importance(), left)
        allowed = torch.zeros_like(values)
        allowed[chosen] = values[chosen]
        self.write(allowed)

    def tensors(self) -> dict[str, Tensor]:
        """See `RankStrategy.tensors`."""
        return self.scores.tensors()

    def state_dict(self) -> dict[str, Any]:
        """See `RankStrategy.state_dict`."""
        return {**super().state_dict(), "every": self.every, "orthogonality": self.orthogonality}


def _factors(layer: LoRABlocks) -> dict[str, nn.Parameter]:
    assert layer.rank_gate is not None
    return {"lambda": layer.rank_gate, "P": layer.lora_B, "Q": layer.lora_A}


def orthogonality(weight: float, layers: Iterable[tuple[LoRABlocks, Tensor | None]]) -> Tensor | float:
    """Return `weight` times the mean of `||P.T P - I||_F` and `||Q Q.T - I||_F` over the blocks of `layers`.

    Args:
        layers: each with the ranks that count, bool `[blocks, r]`, or None for all.
    """
    if not weight:
        return 0.0
    norms: list[Tensor] = []
    for layer, ranks in layers:
        A: Tensor = layer.lora_A
        B: Tensor = layer.lora_B
        eye = torch.eye(layer.r, device=A.device, dtype=A.dtype).expand(layer.blocks, -1, -1)
        if ranks is not None:
            on = ranks.to(A)
            A, B, eye = A * on[:, :, None], B * on[:, None, :], torch.diag_embed(on)
        norms += [torch.linalg.matrix_norm(B.mT @ B - eye), torch.linalg.matrix_norm(A @ A.mT - eye)]
    if not norms:
        return 0.0
    return weight * torch.cat([norm.to(norms[0].device) for norm in norms]).mean()
