"""`SoloGain`: ranks blocks by the loss reduction of each alone, divided by a price for forgetting."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from slora.config import DEPTH_PRICE
from slora.errors import ConfigError, StateError
from slora.gates.values import set_gates
from slora.io.plain import nonnegative
from slora.layers import LoRABlocks, adapted_layers
from slora.module_tree.modes import evaluating
from slora.module_tree.sharded import full

# In the demo a block of the first layer makes the model forget 200 times as many letters as one of the last layer, with
# about geometric steps between.
FIRST_OVER_LAST = 200.0


class SoloGain:
    """Ranks by the loss reduction of each block alone, divided by a price for how much it is likely to forget.

    The gain is the loss of the base model minus the loss with only that block active. It costs one forward pass per
    block and one for the base model, once, without gradients and in evaluation mode. Of the rankings tried in the demo
    it predicts best which blocks are useful.

    Depth predicts best how much a block forgets: early layers forget most. By default a gain is divided by
    `(200 ** (1 - depth)) ** depth_price`, with depth 0 for the first layer and 1 for the last. With distillation on old
    samples (`slora.retention`) another price works better: `drift ** price`, where drift is the mean squared distance
    by which the block alone moves the features.

    Args:
        loss: runs the model on a fixed sample (about 128 training images) and returns the loss, a scalar:
            `lambda: F.cross_entropy(model(images), labels)`.
        features: runs the model on a fixed sample, best of the old data, and returns its final features `[n, d]`.
        price: exponent of the drift, used with `features`.
        depth_price: exponent of the price by depth; by default 0.75, and 0 with `features`. 0 ranks by the gain alone.
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
        self.loss, self.features = loss, features
        self.price, self.depth_price = nonnegative("price", price), nonnegative("depth_price", depth_price)

    @torch.no_grad()
    def __call__(self, model: nn.Module) -> Tensor:
        """Return the gains, in the unit of the loss, divided by the prices."""
        layers = [layer for _, layer in adapted_layers(model)]
        if any(layer.merged for layer in layers):
            raise StateError("the model is merged, so no block can be evaluated alone; call slora.unmerge(model) first")
        with evaluating(model), one_block(layers) as switch:
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
        # Negative gains are not divided: a price must not make a harmful block look better.
        return torch.where(scores > 0, scores / prices, scores)

    def _loss(self) -> Tensor:
        loss: Any = self.loss()
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"a tensor {list(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise ConfigError(f"the loss of SoloGain returned {found}; expected a scalar, such as a mean")
        return loss.float().reshape(())


def depths(model: nn.Module) -> list[float]:
    """Return the depth of each block, 0 for the first layer to 1 for the last, by the numbers in the layers' names.

    Layers whose names agree up to the first number form a stack of its own: each tower of a CLIP has a first and a last
    layer. If no name has a number, the order of the layers decides; otherwise a layer without a number is at depth 0 or
    1, whichever end of the model it is nearer to.
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
    """The name up to its first number; empty for a name without one."""
    parts = name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), None)
    return "" if first is None else ".".join(parts[:first])


@contextlib.contextmanager
def one_block(layers: Sequence[LoRABlocks]) -> Iterator[Callable[[tuple[LoRABlocks, int] | None], None]]:
    """Yield a function that switches one block on, or None, and all others off; the gates are restored afterwards."""
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
