"""`EWC`: a loss term that keeps those weights of the base model which its features depend on most."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor, nn

from slora.errors import ConfigError
from slora.layers import LoRABlocks, adapted_layers
from slora.models.disabled import disabled
from slora.module_tree.modes import evaluating
from slora.retention.distillation import base_features, features_of
from slora.retention.term import Term, at_least_fp32, checked_samples, refuse_sharded


class EWC(Term):
    """A loss term: `weight * sum_i <F_i, (c B_i A_i)^2>` over the active blocks, with a diagonal Fisher matrix F.

    Elastic weight consolidation (arXiv 1612.00796) of the base weights, in the full space of `B A`, as EWC-LoRA does it
    (arXiv 2602.17559, where penalties on A and on B alone are found worse). `weight` stands for lambda / 2. A new head
    has no likelihood for old data; F is therefore that of a Gaussian around the features,

        F = mean_z E_v (d v^T f(z) / d W)^2 / variance of the features,    v of independent signs,

    so that the term is the diagonal part of `Distillation` to second order in the update. One v is drawn per sample.

    Costs, once, a forward and a backward pass over each sample, one by one, with gradients of all adapted weights. In a
    step, of each active block, `B A` and its gradients, three products of `N / blocks x K x r`: as much as the base
    product takes for 3 r rows. Memory: F is as large as the adapted weights in fp32, and autograd holds as much again.

    Args:
        model: adapted by `slora.inject`; not a wrapper around it.
        samples: unlabelled inputs of the old data, or proxies, `[n, ...]`, n at least 2.
        weight: of the loss term.
        features: `samples -> [n, d]`, such as the logits of the old head; by default the final features.
        every: only every so many steps have the term, with a weight `every` times as large.
        seed: of the signs.

    Raises:
        ConfigError: a value is out of range, or the features do not depend on the adapted weights.
        StateError: the model is merged or sharded.
    """

    name = "ewc"

    def __init__(
        self,
        model: nn.Module,
        samples: Tensor,
        weight: float = 1.0,
        *,
        features: Callable[[Tensor], Tensor] | None = None,
        every: int = 1,
        seed: int = 0,
    ) -> None:
        super().__init__(model, weight, every)
        refuse_sharded(model, self.name)
        samples = checked_samples(samples, model)
        features = features_of(model, features)
        _, scale = base_features(model, features, samples)
        self.layers = [layer for _, layer in adapted_layers(model)]
        self.fisher = _fisher(model, self.layers, features, samples, scale, seed)

    def value(self, draw: int) -> Tensor:
        """Return the sum over the active blocks; `draw` does not matter."""
        terms = []
        for layer, fisher in zip(self.layers, self.fisher, strict=True):
            for i in layer.activity().active:
                with torch.autocast(fisher.device.type, enabled=False):
                    update = layer.scaling * (layer.effective_B[i] @ layer.lora_A[i])
                    terms.append((fisher.unflatten(0, (layer.blocks, -1))[i] * update.square()).sum())
        return torch.stack(terms).sum() if terms else next(self.model.parameters()).new_zeros(())


def _fisher(
    model: nn.Module, layers: Sequence[LoRABlocks], features: Callable[[Tensor], Tensor], samples: Tensor,
    scale: Tensor, seed: int,
) -> list[Tensor]:  # fmt: skip
    """The diagonal F of each layer, `[N, K]`."""
    generator = torch.Generator().manual_seed(seed)
    weights = [layer.base_weight for layer in layers]
    fisher = [torch.zeros_like(at_least_fp32(weight.detach())) for weight in weights]
    reached = False
    with evaluating(model), disabled(model), _trainable(weights), torch.enable_grad():
        for sample in samples.split(1):
            out = features(sample)
            signs = torch.randint(2, out.shape, generator=generator).to(out) * 2 - 1
            if not out.requires_grad:
                break
            grads = torch.autograd.grad((out * signs).sum(), weights, allow_unused=True)
            for total, grad in zip(fisher, grads, strict=True):
                if grad is not None:
                    reached = True
                    total += grad.to(total.dtype).square() / (len(samples) * scale)
    if not reached:
        raise ConfigError("the features do not depend on any adapted weight; give a function that runs the model")
    return fisher


@contextlib.contextmanager
def _trainable(weights: Sequence[Tensor]) -> Iterator[None]:
    """Let the base weights require gradients inside the context."""
    before = [weight.requires_grad for weight in weights]
    for weight in weights:
        weight.requires_grad_()
    try:
        yield
    finally:
        for weight, learns in zip(weights, before, strict=True):
            weight.requires_grad_(learns)
