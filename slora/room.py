"""Rows with room behind them, for the form that multiplies `[x, c S]` with `[W, B]` in one product of the vendor.

A producer of activations that allocates its output by `empty` spares that form a copy of x: S is written behind every
row, and one wider matrix is multiplied. The room is scratch memory of whichever adapted layer runs next on these rows,
so that layers which share an input may share its room, but not on two streams at once.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# What a row of bf16 takes to begin at a multiple of 16 bytes.
_ALIGNMENT = 8
_MARK = "_slora_room"


def columns(products: int) -> int:
    """Return how much room `products` columns of S take, in elements: a multiple of 8."""
    return -(-products // _ALIGNMENT) * _ALIGNMENT


def empty(*size: int, room: int, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> Tensor:
    """Return an uninitialised tensor `[..., K]` whose rows have `room` elements behind them, at least.

    Args:
        size: `..., K`.
        room: elements behind each row: the sum of the ranks of the blocks of the widest layer that takes these rows,
            three times the rank for a fused qkv.
        dtype: of the tensor; torch's default if None.
        device: of the tensor; torch's default if None.
    """
    *leading, K = size
    width = K + columns(room)
    storage = torch.empty(math.prod(leading), width, dtype=dtype, device=device)
    # The storage carries the mark, because views of the tensor have the same room and copies have none.
    setattr(storage.untyped_storage(), _MARK, (K, width))
    return storage.view(*leading, width)[..., :K]


def widened(x: Tensor, products: int) -> Tensor | None:
    """Return `x [M, K]` with the columns behind it, `[M, K + columns(products)]`, or None where there is no room."""
    K, width = getattr(x.untyped_storage(), _MARK, (0, 0))
    wanted = K + columns(products)
    if x.dim() != 2 or x.shape[1] != K or wanted > width:
        return None
    if x.stride() != (width, 1) or x.storage_offset() % width:
        return None
    return x.as_strided((x.shape[0], wanted), (width, 1))
