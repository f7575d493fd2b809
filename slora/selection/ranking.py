"""Rankings: functions that return a score for each block of a model; blocks with the highest scores stay.

`Budget` and `keep_blocks` choose by them.
"""

from __future__ import annotations

import warnings
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from slora.errors import ConfigError
from slora.layers import adapted_layers
from slora.module_tree.sharded import full


class Ranking(Protocol):
    """Scores for the blocks of a model: `[blocks of the model]`, in the order of `slora.active_blocks`.

    A ranking with an attribute `once = True` is called once, when selection begins; any other one whenever blocks are
    switched off, and then only the scores of active blocks count.
    """

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the scores, fp32 on any device."""
        ...


@torch.no_grad()
def update_norm(model: nn.Module) -> Tensor:
    """Return `c * ||B_i A_i||_F` of every block, the norm of its update. Costs r x r products only.

    `||B A||_F^2 = tr((B.T B) (A A.T))`, so the `[N / blocks, K]` product is never formed.
    """
    norms = []
    device = None
    for _, layer in adapted_layers(model):
        A, B = full(layer.lora_A.detach()), full(layer.effective_B.detach())
        # Rounding can make a zero slightly negative.
        norm = layer.scaling * squared_norms(A, B).clamp(min=0).sqrt().float()
        device = norm.device if device is None else device
        norms.append(norm.to(device))
    return torch.cat(norms)


def squared_norms(A: Tensor, B: Tensor) -> Tensor:
    """Return `||B_i A_i||_F^2`, `[blocks]`, of `A [blocks, r, K]` and `B [blocks, n, r]`."""
    return ((B.mT @ B) * (A @ A.mT)).sum((1, 2))


def process_mean(values: Tensor) -> Tensor:
    """Return the mean of `values` over all processes: itself where there is one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return values
    # A copy: the collective works in place.
    total = values.clone()
    torch.distributed.all_reduce(total)
    return total / torch.distributed.get_world_size()


def block_scores(ranking: Ranking, model: nn.Module, n: int) -> list[float]:
    """Return the scores of `ranking` for the `n` blocks of `model`, averaged over processes; all finite, NaN lowest.

    Raises:
        ConfigError: the ranking returns something other than `[n]` scores, or NaN for every block.
    """
    scores: Any = ranking(model)
    if not isinstance(scores, Tensor) or scores.shape != (n,):
        found = f"shape {list(scores.shape)}" if isinstance(scores, Tensor) else type(scores).__name__
        raise ConfigError(f"the ranking returned {found}; expected a tensor with one score for each of {n} blocks")
    scores = scores.detach().float()
    scores = process_mean(scores)
    if n and bool(scores.isnan().all()):
        raise ConfigError(
            "the ranking returned NaN for every block; check that the loss and the sample that it uses are finite"
        )
    # Finite, because checkpoints store them as JSON.
    values: list[float] = scores.nan_to_num(nan=torch.finfo(torch.float32).min).tolist()
    if n > 1 and min(values) == max(values):
        warnings.warn(
            f"the ranking gives every block the same score, {values[0]:g}, so the first blocks of the model stay: rank "
            f"after training (B is zero before), or use another ranking",
            stacklevel=3,
        )
    return values
