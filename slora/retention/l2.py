"""`L2`: a loss term that keeps the weights close to those of the base model."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from slora.layers import adapted_layers
from slora.retention.term import Term, refuse_sharded
from slora.selection.ranking import squared_norms


class L2(Term):
    """A loss term: `weight * sum_i ||c B_i A_i||_F^2` over the active blocks, the squared distance to the base weights.

    L2-SP (arXiv 1802.01483) for adapted layers. Weight decay of A and B alone bounds their product only loosely.

    Costs `tr((B^T B) (A A^T))`, products of `r x r` and two skinny ones per active block; no samples, no memory.

    Args:
        model: adapted by `slora.inject`; not a wrapper around it.
        weight: of the loss term.
        every: only every so many steps have the term, with a weight `every` times as large.

    Raises:
        ConfigError: a value is out of range, or the model has no adapted layer.
        StateError: the model is sharded.
    """

    name = "l2"

    def __init__(self, model: nn.Module, weight: float = 1e-3, *, every: int = 1) -> None:
        super().__init__(model, weight, every)
        refuse_sharded(model, self.name)

    def value(self, draw: int) -> Tensor:
        """Return the sum over the active blocks; `draw` does not matter."""
        terms = []
        for _, layer in adapted_layers(self.model):
            active = layer.activity().active
            if active:
                with torch.autocast(layer.lora_A.device.type, enabled=False):
                    norms = squared_norms(layer.lora_A[list(active)], layer.effective_B[list(active)])
                    terms.append(layer.scaling**2 * norms.sum())
        return torch.stack(terms).sum() if terms else next(self.model.parameters()).new_zeros(())
