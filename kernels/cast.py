"""A and B in the dtype of x, by one launch: to cast them one after the other takes the host twice as long."""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from slora.kernels import launch
from slora.kernels.launch import Launch

# Elements that a program casts of each.
CHUNK = 1024


@triton.jit
def _copy(source, target, i, size):
    """Write the elements `i` below `size` of source to target, rounded to its dtype."""
    tl.store(target + i, tl.load(source + i, mask=i < size).to(target.dtype.element_ty), mask=i < size)


@triton.jit(do_not_specialize=["size_A", "size_B"])
def cast_both(A, B, low_A, low_B, size_A, size_B, CHUNK: tl.constexpr):
    """Program p: CHUNK elements of A from `p * CHUNK` on, and of B."""
    i = tl.program_id(0).to(tl.int64) * CHUNK + tl.arange(0, CHUNK)
    _copy(A, low_A, i, size_A)
    _copy(B, low_B, i, size_B)


def cast(A: Tensor, B: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Return A and B in `dtype`, rounded to nearest; both are contiguous fp32 at multiples of 16 bytes."""
    low_A, low_B = torch.empty_like(A, dtype=dtype), torch.empty_like(B, dtype=dtype)
    _cast(A.device, dtype, A.numel(), B.numel())(A, B, low_A, low_B)
    return low_A, low_B


@functools.lru_cache(maxsize=1024)
def _cast(device: torch.device, dtype: torch.dtype, size_A: int, size_B: int) -> Launch:
    grid = launch.cdiv(max(size_A, size_B), CHUNK), 1, 1
    return Launch(cast_both, device, grid, (dtype,), [size_A, size_B], {"CHUNK": CHUNK})
