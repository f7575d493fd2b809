"""What blocks are ranked by: a ranking returns a score for each block of a model, higher is better."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slora.config import DEPTH_PRICE
from slora.errors import ConfigError, StateError
from slora.gates.values import set_gates
from slora.io.plain import plain
from slora.layers import LoRABlocks, adapted_layers
from slora.module_tree.modes import evaluating
from slora.module_tree.sharded import full


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
        A, B = full(layer.lora_A.detach()), full(layer.lora_B.detach())
        squared = ((B.mT @ B) * (A @ A.mT)).sum((1, 2))
        # Rounding can leave a minus before a zero.
        norm = layer.scaling * squared.clamp(min=0).sqrt().float()
        device = norm.device if device is None else device
        norms.append(norm.to(device))
    return torch.cat(norms)


# On the demo a block of the first layer costs 200 times as many letters as one of the last, and layers between lie near
# a geometric line.
FIRST_OVER_LAST = 200.0


class SoloGain:
    """Ranks by what each block gains by itself, over a price for what it is likely to make the model forget.

    The gain is the loss of the base minus the loss with only that block active. It costs one forward pass per block and
    one for the base, without gradients and in evaluation mode, once. Of the rankings tried on the demo it predicts best
    which blocks are worth their place.

    What a block makes the model forget is predicted best by its depth: early layers cost most. By default a gain is
    divided by `(200 ** (1 - depth)) ** depth_price`, with depth 0 for the first layer and 1 for the last. Where old
    samples hold the features in place (`slora.retention`), a price by what blocks do to features serves better:
    `drift ** price`, with drift the mean squared distance that the block by itself moves them.

    Args:
        loss: runs the model on a fixed sample (128 training images serve well) and returns the loss, a scalar:
            `lambda: F.cross_entropy(model(images), labels)`.
        features: the same for final features, `[n, d]`, of samples of what is to be kept, or of anything.
        price: the exponent of the drift; 0.5 with `features`.
        depth_price: the exponent by depth; by default 0.75, and 0 with `features`. 0 ranks by the gain alone.
    """

    once = True

    def __init__(
        self,
        loss: Callable[[], Tensor],
        features: Callable[[], Tensor] | None = None,
        price: float = 0.5,
        depth_price: float | None = None,
    ) -> None:
        if not callable(loss):
            raise ConfigError(f"loss={loss!r} is not a function; write SoloGain(lambda: criterion(model(x), y))")
        if features is not None and not callable(features):
            raise ConfigError(f"features={features!r} is not a function that returns features [n, d]")
        if depth_price is None:
            depth_price = DEPTH_PRICE if features is None else 0.0
        price, depth_price = plain(price), plain(depth_price)
        for name, value in (("price", price), ("depth_price", depth_price)):
            if not isinstance(value, (int, float)) or not value >= 0:
                raise ConfigError(f"{name}={value!r} is negative or not a number; use 0 or more")
        self.loss, self.features, self.price, self.depth_price = loss, features, price, depth_price

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Tensor:
        """Return the gains, in the unit of the loss, divided by the prices."""
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
        prices = torch.ones_like(scores)
        if drifts:
            prices *= torch.stack(drifts).clamp(min=1e-12) ** self.price
        if self.depth_price:
            prices *= FIRST_OVER_LAST ** (self.depth_price * (1 - scores.new_tensor(depths(model))))
        # Only the gain of a block that gains is divided: a loss must not become small by its price.
        return torch.where(scores > 0, scores / prices, scores)

    def _loss(self) -> Tensor:
        loss: Any = self.loss()
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ConfigError(f"the loss of SoloGain returned {found}; it has to be a scalar, such as a mean")
        return loss.float().reshape(())


def depths(model: nn.Module) -> list[float]:
    """Return how deep each block lies, from 0 to 1, by the numbers in the names of its layers.

    Layers whose names agree up to the first number are one stack, counted by itself: each tower of a CLIP has its own
    first and last layer. Without any number the order of the layers counts; beside stacks a layer without a number lies
    at the end that it is nearer to.
    """
    found = [(name, layer.blocks) for name, layer in adapted_layers(model)]
    places = {name: tuple(int(part) for part in name.split(".") if part.isdigit()) for name, _ in found}
    if not any(places.values()):
        places = {name: (i,) for i, (name, _) in enumerate(found)}
    stacks: dict[str, set[tuple[int, ...]]] = {}
    for name, place in places.items():
        stacks.setdefault(_stack(name), set()).add(place)
    result: list[float] = []
    for i, (name, blocks) in enumerate(found):
        levels = sorted(stacks[_stack(name)])
        if places[name]:
            share = levels.index(places[name]) / (len(levels) - 1) if len(levels) > 1 else 1.0
        else:
            share = 0.0 if 2 * i < len(found) else 1.0
        result += [share] * blocks
    return result


def _stack(name: str) -> str:
    """The name up to its first number; all of a model without numbers."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if first is None else ".".join(parts[:first])


@contextlib.contextmanager
def _only(layers: list[LoRABlocks]) -> Iterator[Callable[[tuple[LoRABlocks, int] | None], None]]:
    """Yield a function that switches on one block and all others off; afterwards the gates are what they were."""
    values = iter(torch.cat([full(layer.gate_parameter.detach()).cpu() for layer in layers]).tolist())
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
