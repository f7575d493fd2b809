"""`Sensitivity`: squared gradients of the base weights, over a few batches before training, choose the blocks."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterable, Iterator
from typing import Any, ClassVar

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from slora.config import Unit
from slora.errors import ConfigError, StateError
from slora.io.plain import nonnegative
from slora.layers import LoRABlocks, adapted_layers
from slora.module_tree.modes import evaluating
from slora.module_tree.sharded import refuse
from slora.selection.one_shot import OneShot
from slora.selection.ranking import block_scores
from slora.selection.solo_gain import FIRST_OVER_LAST, depths


class Sensitivity(OneShot):
    """Keeps the blocks whose base weights have the largest squared gradients on a few batches before training.

        few = [next(batches) for _ in range(8)]
        selection = slora.selection.Sensitivity(
            model, 4, steps=300, batches=few, loss=lambda x, y: criterion(model(x), y)
        )

    From Sensitivity-Aware Visual Parameter-Efficient Fine-Tuning (SPT, arXiv 2303.08566): the sensitivity of a weight w
    is the loss reduction `|L(w) - L(w - eps g)| ~ eps g^2` of one gradient step on it alone, with g its gradient,
    summed over batches: `s = sum_b g_b^2`. SPT takes the weights with the highest s of the whole model, as many as the
    budget has parameters, counts them in each weight matrix, adapts a matrix with enough of them by LoRA and trains the
    others one weight at a time.

    Here only blocks are trained, so a block has the sum over its rows of the weight,

        s_i = sum_b ||dL_b/dW_i||_F^2,      W_i [N / blocks, K],

    the first-order loss reduction of a gradient step on all of it, and blocks are taken in the order of s_i, each that
    still fits the budget. Our choices are the sum in place of the count, the base model in evaluation mode (SPT leaves
    dropout on), and a budget in blocks. In the demo the highest eight by sum and by count share at least six. Most are
    of the first layer, where gradients are largest, and where training costs the most old knowledge. The gradients of A
    and B would say less: with B = 0 that of A is zero, and that of B is dL/dW_i projected on r random directions.

    It costs a forward and a backward pass with the gradients of all base weights per batch, as in full fine-tuning, and
    the memory of one such gradient at a time. The gradients that parameters have are left as they are. With a head of
    zeros no gradient reaches any block: train the head first (`slora.training.train_head`), or with `now=False` call
    `begin` when it is trained. In several processes scores are averaged over all.

    Args:
        batches: the arguments of `loss`, a tuple for each batch; 8 in SPT's code.
        loss: runs the model on a batch and returns the loss, a scalar.
        depth_price: divides s_i by `(200 ** (1 - depth)) ** depth_price`, as `SoloGain` does; 0 is SPT's rule, 0.75
            keeps far more old knowledge in the demo.
        model, budget, steps, unit, forward, now: see `OneShot`; for the unit "flops" the batches are enough.

    Raises:
        ConfigError: there is no batch, or a loss is not a finite scalar; besides those of `OneShot`.
        StateError: every gradient is zero, or the model is sharded by `fully_shard`.
    """

    name: ClassVar[str] = "sensitivity"

    def __init__(
        self,
        model: nn.Module,
        budget: int | float,
        steps: int,
        *,
        batches: Iterable[Any],
        loss: Callable[..., Tensor],
        depth_price: float = 0.0,
        unit: Unit = "blocks",
        forward: Callable[[], object] | None = None,
        now: bool = True,
    ) -> None:
        if not callable(loss):
            raise ConfigError(f"loss={loss!r} is not a function; write lambda x, y: criterion(model(x), y)")
        if not isinstance(batches, Iterable) or isinstance(batches, Tensor):
            raise ConfigError(f"batches is a {type(batches).__name__}; pass a list of batches, such as [(x, y)]")
        self.depth_price = nonnegative("depth_price", depth_price)
        refuse(model, "create Sensitivity before fully_shard: it needs the whole gradient of a weight")
        self.batches, self.loss = batches, loss
        super().__init__(model, budget, steps, unit=unit, forward=forward, now=now)

    def order(self) -> list[int]:
        """See `OneShot.order`."""
        scores = block_scores(self._priced, self.model, self.n)
        return sorted(range(self.n), key=lambda i: -scores[i])

    def _priced(self, model: nn.Module) -> Tensor:
        scores = sensitivity(model, self.batches, self.loss)
        prices: Tensor = FIRST_OVER_LAST ** (self.depth_price * (1 - scores.new_tensor(depths(model))))
        return scores / prices

    def state_dict(self) -> dict[str, Any]:
        """Return what a resumed run needs, as JSON values."""
        return super().state_dict() | {"depth_price": self.depth_price}


def sensitivity(model: nn.Module, batches: Iterable[Any], loss: Callable[..., Tensor]) -> Tensor:
    """Return the sensitivity `[blocks of the model]`, fp32, of each block; see `Sensitivity`.

    Raises:
        ConfigError: there is no batch, or a loss is not a finite scalar.
        StateError: every gradient is zero.
    """
    layers = [layer for _, layer in adapted_layers(model)]
    weights = {layer.base_weight: layer.base_weight.new_zeros(layer.blocks, dtype=torch.float64) for layer in layers}
    count = 0
    with evaluating(model), _squares(model, layers, weights), torch.enable_grad():
        for batch in batches:
            value: Any = loss(*batch) if isinstance(batch, (tuple, list)) else loss(batch)
            _check_loss(value, count)
            value.backward(inputs=list(weights))
            count += 1
    if not count:
        raise ConfigError("batches is empty, so no gradient can be computed; pass a few training batches")
    scores = torch.cat([weights[layer.base_weight].cpu() for layer in layers])
    if not scores.any():
        raise StateError(
            "the gradient of every base weight is zero: train the head first (head_first, or "
            "slora.training.train_head), as a head of zeros passes no gradient on"
        )
    return scores.float()


def _check_loss(value: Any, number: int) -> None:
    if isinstance(value, Tensor) and value.numel() == 1:
        if not value.requires_grad:
            raise StateError(f"the loss of batch {number} does not depend on an adapted weight; run the adapted model")
        if bool(value.isfinite()):
            return
        found = str(value.item())
    else:
        found = f"a tensor {list(value.shape)}" if isinstance(value, Tensor) else type(value).__name__
    raise ConfigError(f"the loss of batch {number} is {found}; expected a finite scalar, such as a mean")


@contextlib.contextmanager
def _squares(model: nn.Module, layers: list[LoRABlocks], weights: dict[Tensor, Tensor]) -> Iterator[None]:
    """Run the base model; a backward pass adds the squared gradients of its adapted weights, by block, to `weights`."""
    enabled = [layer.enabled for layer in layers]
    before = [(weight.requires_grad, weight.grad) for weight in weights]
    hooks = []
    with contextlib.ExitStack() as stack:
        if isinstance(model, DistributedDataParallel):
            # Else it would wait for the gradients of all its parameters.
            stack.enter_context(model.no_sync())
        try:
            for layer in layers:
                layer.enabled = False
            for weight, total in weights.items():
                weight.requires_grad_(True)
                weight.grad = None
                hooks.append(weight.register_post_accumulate_grad_hook(_adder(total)))
            yield
        finally:
            for hook in hooks:
                hook.remove()
            for layer, value in zip(layers, enabled, strict=True):
                layer.enabled = value
            for weight, (learns, grad) in zip(weights, before, strict=True):
                weight.requires_grad_(learns)
                weight.grad = grad


def _adder(total: Tensor) -> Callable[[Tensor], None]:
    def add(weight: Tensor) -> None:
        assert weight.grad is not None
        rows = weight.grad.reshape(len(total), -1)
        dtype = torch.promote_types(rows.dtype, torch.float32)
        total.add_(torch.linalg.vector_norm(rows, dim=1, dtype=dtype).double().square())
        weight.grad = None

    return add
