"""The one check of results.

A result may be twice as far from the exact one, computed in a wider dtype (fp64 for fp32, fp32 for 16 bits), as plain
PyTorch in the dtype that is measured, plus one unit of that dtype for what happens to be exact there; in the Frobenius
norm.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import NamedTuple

import torch
from torch import Tensor


class Expected(NamedTuple):
    """What a result is compared with."""

    exact: Tensor
    """In the wider dtype."""
    own: Tensor
    """The same by plain PyTorch in the dtype that is measured."""
    magnitude: float
    """What roundings are relative to: the norm, or more where a sum may cancel."""
    unit: float
    """Of the dtype that is measured."""


def expected(exact: Mapping[str, Tensor], own: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Expected]:
    """Pair the results by name; `dtype` is the one that is measured."""
    unit = torch.finfo(dtype).eps
    return {name: Expected(t, own[name], float(t.norm()), unit) for name, t in exact.items()}


def errors(found: Mapping[str, Tensor], against: Mapping[str, Expected]) -> dict[str, tuple[float, float]]:
    """The error of each result and what is allowed."""
    both = {}
    for name, value in found.items():
        exact, own, magnitude, unit = against[name]
        allowed = 2 * float((own.to(exact.dtype) - exact).norm()) + unit * magnitude
        both[name] = float((value.to(exact.dtype).view_as(exact) - exact).norm()), allowed
    return both


def mismatch(
    found: Mapping[str, Tensor], against: Mapping[str, Expected], wanted: Collection[str] | None = None
) -> str | None:
    """What is wrong with results, None where nothing is. Everything `wanted` has to be there (default: all)."""
    missing = sorted(set(against if wanted is None else wanted) - found.keys())
    if missing:
        return f"{' and '.join(missing)} {'was' if len(missing) == 1 else 'were'} not computed"
    for name, (error, allowed) in errors(found, against).items():
        if not error <= allowed:
            norm = against[name].magnitude
            return f"{name} is off by {error:.3g} where {allowed:.3g} is allowed and its norm is {norm:.3g}"
    return None
