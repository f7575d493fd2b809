"""LoRA dropout from a counter: whether an element of `x` is dropped is a function of (seed, row, column) alone.

No mask is stored and no generator has a state: forward, input gradient and weight gradients of every backend compute
the same mask again. Two neighbouring columns share one 32-bit hash, 16 bits each, so that a kernel can afford to draw
it inside the main loop of a matrix product. With `mix` a bijection of 32-bit words (Wellons' lowbias32) and a
64-bit seed whose halves are `low` and `high`:

    key0 = mix(low + mix(high ^ C0)),  key1 = mix(high + mix(key0 ^ C1)),  key2 = mix(key0 ^ (key1 + C2))
    row key    a = mix(row ^ key0),  b = mix(row + key1)
    column key c = mix(column // 2 + key2)
    z = a ^ c;  z = (z ^ z >> 16) * D0;  z = (z ^ z >> 15 ^ b) * D1
    kept:  z >> 16 >= drop  in even columns,  (z ^ z << 16) >> 16 >= drop  in odd ones

All arithmetic is modulo 2^32. The keys are negligible, one per row or column; an element costs about six integer
instructions. `drop` is the probability in units of 2^-16, and kept elements are scaled by `1 / (1 - drop / 2^16)`: the
mean is exact, the probability off by at most 2^-17.

`kernels/dropout.py` computes the same numbers in Triton.
"""

from __future__ import annotations

import torch
from torch import Tensor

UNITS = 1 << 16
C0, C1, C2 = 0x9E3779B9, 0x85EBCA6B, 0xC2B2AE35
D0, D1 = 0x21F0AAAD, 0x735A2D97
_WORD = 0xFFFFFFFF
# Pairs hashed at a time: int64 temporaries of 2 MB stay in a CPU's cache (3.6 ns per element against 8.7 with 32 MB
# ones and 15.8 of torch.rand); a GPU wants fewer launches.
_AT_ONCE = {"cpu": 1 << 18}
_AT_ONCE_ELSEWHERE = 1 << 24


def drop_units(dropout: float) -> int:
    """Return the probability `dropout` in units of 2^-16, rounded, below 1."""
    return min(round(dropout * UNITS), UNITS - 1)


def rescaling(dropout: float) -> float:
    """Return the factor that kept elements are scaled by: one over the probability that an element is kept."""
    return UNITS / (UNITS - drop_units(dropout))


def keep_mask(M: int, K: int, dropout: float, seed: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the mask `[M, K]` in `dtype` on the device of `seed`: 1 where an element is kept, 0 where it is dropped.

    `seed` is an int64 scalar. The host does not read it, so a CUDA graph that draws the seed has a new mask per replay.
    """
    device = seed.device
    low, high = seed & _WORD, seed >> 32 & _WORD
    key0 = mix(low + mix(high ^ C0))
    key1 = mix(high + mix(key0 ^ C1))
    key2 = mix(key0 ^ (key1 + C2 & _WORD))
    pairs = (K + 1) // 2
    c = mix(torch.arange(pairs, device=device) + key2)
    drop = drop_units(dropout)
    mask = torch.empty(M, pairs, 2, dtype=dtype, device=device)
    step = max(1, _AT_ONCE.get(device.type, _AT_ONCE_ELSEWHERE) // max(1, pairs))
    for start in range(0, M, step):
        rows = torch.arange(start, min(start + step, M), device=device)[:, None]
        z = mix(rows ^ key0) ^ c
        z ^= z >> 16
        z.mul_(D0).bitwise_and_(_WORD)
        z ^= z >> 15
        z ^= mix(rows + key1)
        z.mul_(D1).bitwise_and_(_WORD)
        high_half = z >> 16
        part = mask[start : start + step]
        part[..., 0] = high_half >= drop
        part[..., 1] = (high_half ^ (z & 0xFFFF)) >= drop
    return mask.view(M, 2 * pairs)[:, :K]


def mix(z: Tensor) -> Tensor:
    """Return Wellons' lowbias32 of the low 32 bits of int64 `z`: every bit depends on every bit of `z`."""
    z = z & _WORD
    z = (z ^ z >> 16) * D0 & _WORD
    z = (z ^ z >> 15) * D1 & _WORD
    return z ^ z >> 15
