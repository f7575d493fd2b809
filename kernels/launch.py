"""What every launcher asks: the properties of the device, and how a tensor is handed to a kernel."""

from __future__ import annotations

import functools
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from slora.kernels import configs

# What the interpreter pretends to have: few enough that small tensors fill it, so that tests see several programs.
_INTERPRETED_SMS = 3


@functools.cache
def sms(device: torch.device) -> int:
    """Return how many SMs `device` has."""
    if device.type != "cuda":
        return _INTERPRETED_SMS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def arch(device: torch.device) -> int:
    """Return the entry of `configs.ARCHS` whose tile sizes `device` uses; the interpreter counts as 90."""
    if device.type != "cuda":
        return 90
    return configs.arch_of(torch.cuda.get_device_capability(device)[0])


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` the one that kernels are launched on; Triton launches on the current device, not the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def aligned(matrix: Tensor) -> Tensor:
    """Return `matrix [rows, columns]` as the GEMM kernels read it, copied only where it is laid out otherwise.

    Columns have unit stride, every row starts at a multiple of 16 bytes, and rows do not overlap (as expanded ones do).
    The number of columns has to be a multiple of 16 bytes.
    """
    stride, size = matrix.stride(0), matrix.element_size()
    if matrix.stride(1) == 1 and stride * size % 16 == 0 and stride >= matrix.shape[1] and matrix.data_ptr() % 16 == 0:
        return matrix
    return matrix.clone(memory_format=torch.contiguous_format)


def described(device: torch.device) -> bool:
    """Return whether TMA moves tiles on `device`; elsewhere kernels form their addresses."""
    return arch(device) >= 90


def boxed(matrix: Tensor, *box: int) -> Any:
    """Return what a kernel takes tiles of the shape `box` from: a descriptor for TMA, or the matrix."""
    if not described(matrix.device):
        return matrix
    return TensorDescriptor(matrix, list(matrix.shape), list(matrix.stride()), list(box))


def cdiv(a: int, b: int) -> int:
    """Return `a / b` rounded up. Triton's own is made for kernels and takes ten times as long on the host."""
    return -(-a // b)


def persistent(device: torch.device, tile: configs.Gemm, rows: int, columns: int, blocks: int) -> tuple[int]:
    """Return the grid of a persistent kernel over the tiles of `[rows, columns]` of each block."""
    tiles = cdiv(rows, tile.BM) * cdiv(columns, tile.BN) * blocks
    return (min(tiles, tile.programs * sms(device)),)
