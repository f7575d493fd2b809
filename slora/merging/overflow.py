"""Refuse a merge that would write NaN or infinity, by a bound from the matrices, before anything is written."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from slora.errors import StateError
from slora.layers.base import Update
from slora.merging.batched import batched_merge


@torch.no_grad()
def refuse_overflow(weights: Mapping[str, Tensor], updates: Mapping[str, Sequence[Update]]) -> None:
    """Raise where adding `updates` to finite weights gives values that are not.

    An element changes by at most `|c| r max|A| max|B|`. A change below a quarter of a unit in the last place of the
    largest number of the dtype (8 for fp16, 1.7e35 for bf16) cannot make any finite weight overflow; only the weights
    whose bound is above that are merged on trial.

    Raises:
        StateError: names the layer, and the matrix or the dtype.
    """
    largest = _largest([matrix for terms in updates.values() for A, B, _, _ in terms for matrix in (A, B)])
    for name, terms in updates.items():
        weight, bound = weights[name], 0.0
        for A, B, c, row in terms:
            a, b = largest[id(A)], largest[id(B)]
            for part, value in (("lora_A", a), ("lora_B", b)):
                if not math.isfinite(value):
                    raise StateError(
                        f"{part} of {name!r} holds NaN or infinity in the block from row {row} on, which merging would "
                        f"write into the weight; go back to an earlier checkpoint"
                    )
            bound = max(bound, abs(c) * A.shape[0] * a * b)
        if bound < _harmless(weight.dtype):
            continue
        As, Bs, scales, rows = ([term[i] for term in terms] for i in range(4))
        (merged,) = batched_merge([weight], [As], [Bs], [scales], rows=[rows], names=[name])  # type: ignore[list-item]
        if not merged.isfinite().all():
            raise StateError(
                f"merging {name!r} gives values that are not finite in {weight.dtype}, whose largest number is "
                f"{torch.finfo(weight.dtype).max:g}; lower scale, or cast the model to torch.bfloat16 or torch.float32"
            )


def _largest(matrices: Sequence[Tensor]) -> dict[int, float]:
    """`{id: largest magnitude, NaN included}`, by one copy from each device."""
    groups: dict[tuple[torch.device, torch.dtype], list[Tensor]] = {}
    for matrix in matrices:
        if matrix.numel():
            groups.setdefault((matrix.device, matrix.dtype), []).append(matrix)
    found = {id(matrix): 0.0 for matrix in matrices}
    for (device, _), members in groups.items():
        if device.type == "cpu":
            # Ten times as fast on a CPU as _foreach_norm, which is a few launches for all matrices on a GPU.
            ends = torch.stack([end for matrix in members for end in torch.aminmax(matrix)])
            norms = ends.abs().reshape(-1, 2).amax(1)
        else:
            norms = torch.stack(tuple(torch._foreach_norm(members, math.inf)))
        found |= zip(map(id, members), norms.tolist(), strict=True)
    return found


def _harmless(dtype: torch.dtype) -> float:
    """A quarter of a unit in the last place of the largest number of `dtype`."""
    info = torch.finfo(dtype)
    # The largest number is just below twice the power of two of which eps is the unit.
    return float(info.max * info.eps / 8)
