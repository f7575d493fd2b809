"""What every launcher asks: the properties of the device, and how a tensor is handed to a kernel."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from slora.kernels import configs

# What the interpreter pretends to have: few enough that small tensors fill it, so that tests see several programs.
_INTERPRETED_MULTIPROCESSORS = 3


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Return how many multiprocessors `device` has."""
    if device.type != "cuda":
        return _INTERPRETED_MULTIPROCESSORS
    return int(torch.cuda.get_device_properties(device).multi_processor_count)


@functools.cache
def capability(device: torch.device) -> int:
    """Return the compute capability of `device` as `10 * major + minor`; the interpreter counts as 90."""
    if device.type != "cuda":
        return 90
    major, minor = torch.cuda.get_device_capability(device)
    return 10 * major + minor


def part(device: torch.device) -> int:
    """Return the entry of `configs.PARTS` whose tile sizes `device` uses."""
    return configs.part_of(capability(device))


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Make `device` the one that kernels are launched on; Triton launches on the current device, not the tensors'."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def describable(rows: Tensor) -> bool:
    """Return whether the kernels let the GPU's copy engine read `rows [M, columns]`: where their configurations are
    made for it, aligned to 16 bytes, unit column stride, not empty."""
    return (
        part(rows.device) >= 90
        and rows.numel() > 0
        and rows.stride(1) == 1
        and rows.data_ptr() % 16 == 0
        and rows.stride(0) * rows.element_size() % 16 == 0
        # A row stride below the width (expanded rows) is no matrix that the engine knows.
        and rows.stride(0) >= rows.shape[1]
    )


def in_vectors(rows: Tensor) -> bool:
    """Return whether threads can read `rows [M, columns]` 16 bytes at a time, by what Triton knows of its numbers."""
    return (
        rows.stride(1) == 1
        and rows.data_ptr() % 16 == 0
        and all(number % 16 == 0 for number in (rows.stride(0), rows.shape[1]))
    )


def access(*matrices: Tensor, multiple: int, others: bool = True) -> tuple[configs.Access, configs.Precision]:
    """Return how tiles of `matrices`, all of one dtype, are read and what their products multiply.

    `multiple` is a number of columns after which a block of them ends. The copy engine reads them where it can read
    them all and `others` says that nothing else is against it. Exact products of fp32, which are not fast anyway, have
    one code for all matrices, and on GPUs that have the engine so have TF32 products that it does not serve.
    """
    first = matrices[0]
    multiplied = kind(first.dtype)
    if multiplied == "ieee":
        return "elements", multiplied
    if part(first.device) < 90:
        if others and multiple % 16 == 0 and all(in_vectors(matrix) for matrix in matrices):
            return "vectors", multiplied
        return "elements", multiplied
    aligned = multiple * first.element_size() % 16 == 0
    if others and aligned and all(describable(matrix) for matrix in matrices):
        return "bulk", multiplied
    return "elements", "16-bit" if multiplied == "16-bit" else "ieee"


def descriptor(rows: Tensor, block: Sequence[int]) -> Any:
    """Return the descriptor through which a kernel copies tiles of shape `block` of `rows`."""
    return TensorDescriptor(rows, list(rows.shape), list(rows.stride()), list(block))


def precision(dtype: torch.dtype) -> str:
    """Return how a product of two tiles of `dtype` is computed: in TF32 where PyTorch's own fp32 products are."""
    return "tf32" if dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32" else "ieee"


def kind(dtype: torch.dtype) -> configs.Precision:
    """Return what a product of two tiles of `dtype` multiplies, if both are aligned."""
    if dtype != torch.float32:
        return "16-bit"
    return "tf32" if precision(dtype) == "tf32" else "ieee"
