"""What a batched merge must compute: in fp32 in the stated order, bit for bit, and by hand in fp64 with the bound."""

from __future__ import annotations

import sys
from collections.abc import Iterable
from types import ModuleType
from typing import NamedTuple

import pytest
import torch
from torch import Tensor


class Update(NamedTuple):
    """`scale * B @ A` on the rows from `first` on."""

    A: Tensor
    B: Tensor
    scale: float
    first: int = 0


def fma32(a: Tensor, b: Tensor, c: Tensor) -> Tensor:
    """Round `a * b + c` to fp32 once; fp32 values in fp64 tensors.

    The product is exact in fp64. Its sum with c is rounded to odd, which makes the second rounding the only one.
    """
    p = a * b
    s = p + c
    other = s - p
    error = (p - (s - other)) + (c - other)
    bits = s.view(torch.int64)
    to_odd = (error != 0) & (bits & 1 == 0)
    bits = bits + torch.where(to_odd, torch.where((error > 0) == (s > 0), 1, -1), 0)
    return bits.view(torch.float64).float().double()


def merged_in_order(W: Tensor, updates: Iterable[Update]) -> Tensor:
    """The documented order of operations in fp32, then one rounding to the dtype of `W`."""
    delta = torch.zeros(W.shape, dtype=torch.float64)
    touched = torch.zeros(W.shape[0], dtype=torch.bool)
    for A, B, scale, first in updates:
        if scale == 0 or not A.shape[0]:
            continue
        rows = slice(first, first + B.shape[0])
        scaled = (B.float() * torch.tensor(scale, dtype=torch.float32)).double()
        for j in range(A.shape[0]):
            delta[rows] = fma32(scaled[:, j : j + 1], A[j].float().double(), delta[rows])
        touched[rows] = True
    result = (W.float() + delta.float()).to(W.dtype)
    return torch.where(touched[:, None], result, W)


def bound(W: Tensor, updates: Iterable[Update], more: int = 2) -> tuple[Tensor, Tensor]:
    """Return `W + sum c B A` in fp64, and one fp32 unit in the last place of `|W| + (R + more) sum |c B A|`."""
    exact, magnitude = W.double().clone(), torch.zeros(W.shape, dtype=torch.float64)
    R = torch.zeros(W.shape[0], 1, dtype=torch.float64)
    for A, B, scale, first in updates:
        rows = slice(first, first + B.shape[0])
        exact[rows] += scale * (B.double() @ A.double())
        magnitude[rows] += abs(scale) * (B.double().abs() @ A.double().abs())
        R[rows] += A.shape[0]
    accumulate = W.double().abs() + (R + more) * magnitude
    return exact, torch.exp2(torch.floor(torch.log2(accumulate.clamp_min(2.0**-126)))) * 2.0**-23


def rounding_interval(exact: Tensor, error: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """What values within `error` of `exact` may round to in `dtype`: lowest and highest."""
    low, high = ((exact + sign * error).float().to(dtype) for sign in (-1, 1))
    return low, high


@pytest.fixture(scope="session")
def exact() -> ModuleType:
    """The functions of this file, for the tests beside it."""
    return sys.modules[__name__]
