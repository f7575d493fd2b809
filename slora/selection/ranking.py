"""What blocks are ranked by: a ranking returns a score for each block of a model, higher is better."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slora.errors import ConfigError, StateError
from slora.gate import adapted_layers, set_gates
from slora.layers import LoRABlocks
from slora.modes import evaluating


class Ranking(Protocol):
    """Scores for the blocks of a model: `[blocks of the model]`, in the order of `slora.active_blocks`.

    A ranking with an attribute `once = True` is asked when selection begins; any other one whenever blocks are to be
    switched off, and then only blocks that are still active count.
    """

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the scores, fp32 on any device."""
        ...


@torch.no_grad()
def update_norm(model: nn.Module) -> Tensor:
    """Return `c * ||B_i A_i||_F` of every block: the size of its update. Costs r x r products only.

    `||B A||_F^2 = tr((B.T B) (A A.T))`, so the `[N / blocks, K]` product is never formed.
    """
    norms = []
    device = None
    for _, layer in adapted_layers(model):
        A, B = layer.lora_A.detach(), layer.lora_B.detach()
        squared = ((B.mT @ B) * (A @ A.mT)).sum((1, 2))
        # Rounding can leave a minus before a zero.
        norm = layer.scaling * squared.clamp(min=0).sqrt().float()
        device = norm.device if device is None else device
        norms.append(norm.to(device))
    return torch.cat(norms)


class SoloGain:
    """Ranks by what each block gains by itself: the loss of the base minus the loss with only that block active.

    Costs one forward pass per block and one for the base, without gradients and in evaluation mode, once. Of the
    rankings tried on the demo it predicts best which blocks are worth their place.

    Args:
        loss: runs the model on a fixed sample (128 training images serve well) and returns the loss, a scalar:
            `lambda: F.cross_entropy(model(images), labels)`.
        features: the same for final features, `[n, d]`, of samples of what is to be kept (or of anything): a block's
            gain is then divided by `drift ** price`, where drift is the mean squared distance that the block by
            itself moves them.
        price: the exponent; 0.5 with `features`.
    """

    once = True

    def __init__(
        self, loss: Callable[[], Tensor], features: Callable[[], Tensor] | None = None, price: float = 0.5
    ) -> None:
        if not callable(loss):
            raise ConfigError(f"loss={loss!r} is not a function; write SoloGain(lambda: criterion(model(x), y))")
        if features is not None and not callable(features):
            raise ConfigError(f"features={features!r} is not a function that returns features [n, d]")
        if not isinstance(price, (int, float)) or not price >= 0:
            raise ConfigError(f"price={price!r} is negative or not a number; use 0 or more")
        self.loss, self.features, self.price = loss, features, price

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Tensor:
        """Return the gains, in the unit of the loss, divided by the price."""
        layers = [layer for _, layer in adapted_layers(model)]
        if any(layer.merged for layer in layers):
            raise StateError("the model is merged, so no block can be measured alone; call slora.unmerge(model) first")
        with evaluating(model), _only(layers) as switch:
            switch(None)
            base, before = self._loss(), None if self.features is None else self.features()
            gains, drifts = [], []
            for layer in layers:
                for i in range(layer.blocks):
                    switch((layer, i))
                    gains.append(base - self._loss())
                    if self.features is not None and before is not None:
                        drifts.append((self.features() - before).float().square().sum(-1).mean())
        scores = torch.stack(gains)
        if drifts:
            drift = torch.stack(drifts)
            # Only the gain of a block that gains is divided: a loss must not become small by moving much.
            scores = torch.where(scores > 0, scores / drift.clamp(min=1e-12) ** self.price, scores)
        return scores

    def _loss(self) -> Tensor:
        loss: Any = self.loss()
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ConfigError(f"the loss of SoloGain returned {found}; it has to be a scalar, such as a mean")
        return loss.float().reshape(())


@contextlib.contextmanager
def _only(layers: list[LoRABlocks]) -> Iterator[Callable[[tuple[LoRABlocks, int] | None], None]]:
    """Yield a function that switches on one block and all others off; afterwards the gates are what they were."""
    values = iter(torch.cat([layer.gate.detach().cpu() for layer in layers]).tolist())
    before = {layer: [next(values) for _ in range(layer.blocks)] for layer in layers}
    off = {layer: [layer.threshold - abs(layer.threshold) - 1.0] * layer.blocks for layer in layers}

    def switch(block: tuple[LoRABlocks, int] | None) -> None:
        gates = {layer: list(values) for layer, values in off.items()}
        if block is not None:
            layer, i = block
            gates[layer][i] = layer.threshold + abs(layer.threshold) + 1.0
        set_gates(gates)

    try:
        yield switch
    finally:
        set_gates(before)
