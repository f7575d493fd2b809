"""Rows, blocks and columns of `x [..., K]`, `y [..., N]` and of tensors `[blocks, ...]`."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def rows(x: Tensor) -> Tensor:
    """Return `x [..., K]` as `[M, K]`."""
    if x.dim() == 2:
        return x
    # Not -1, which is ambiguous where another size is 0.
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def fp32_gate(gate: Tensor, threshold: float) -> tuple[Tensor, float]:
    """Return gates in fp32, and their threshold. Gates of another dtype become ones and zeros, with threshold 0.5:
    rounded to fp32, a score next to the threshold could change sides."""
    if gate.dtype == torch.float32:
        return gate.contiguous(), threshold
    return (gate >= threshold).float(), 0.5


def zero_inactive(values: Tensor, on: Tensor) -> Tensor:
    """Return `values [blocks, ...]` with 0 in place of the blocks that are not `on [blocks]`, whatever they hold."""
    return torch.where(on.view(-1, *(1,) * (values.dim() - 1)), values, 0)


def select_blocks(matrices: Tensor, active: Sequence[int]) -> Tensor:
    """Return the matrices of the active blocks, `[len(active), ...]`."""
    if len(active) == matrices.shape[0]:
        return matrices
    # Indexing with a list would copy it to the device, which is not allowed during capture of a CUDA graph.
    return torch.stack([matrices[i] for i in active]) if active else matrices[:0]


def scatter_blocks(values: Tensor, blocks: int, active: Sequence[int]) -> Tensor:
    """Return `[blocks, ...]` with `values [len(active), ...]` at the active blocks, 0 elsewhere."""
    if len(active) == blocks:
        return values
    result = values.new_zeros(blocks, *values.shape[1:])
    for value, i in zip(values, active, strict=True):
        result[i] = value
    return result


def block_columns(y: Tensor, n: int, active: Sequence[int]) -> list[Tensor]:
    """Return the n columns of `y [M, N]` that belong to each active block, as views."""
    return [y[:, i * n : (i + 1) * n] for i in active]
