"""FLOPs by counting, bytes by formula, and what part of the ceilings a time is.

FLOPs come from PyTorch's counter, which knows slora's operator by the formulas of `slora.flops`. Bytes are the least
that a form of the computation has to move through memory, in elements of the activations' dtype, with `x [M, K]`,
`dy [M, N]` and everything of size r left out:

    frozen       forward x + W + y, backward dy + W + dx
    eager        one kernel per step, as PEFT computes       + 6 MK + 10 MN
    addmm        added in place to y and dx                  + 4 MK +  4 MN
    accumulate   added to the GEMM's accumulator             + 2 MK +    MN
    fused        S and T in the main loops, too              +   MK +    MN
    full         the dense weight gradient                   +   MK +    MN + NK
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import torch

from slora.flops import count_flops


class Extra(NamedTuple):
    """Elements moved beyond a frozen layer: multiples of MK and MN in the forward and in the backward."""

    forward_MK: int
    forward_MN: int
    backward_MK: int
    backward_MN: int


FORMS = {
    "frozen": Extra(0, 0, 0, 0),
    "eager": Extra(1, 6, 5, 4),
    "addmm": Extra(1, 2, 3, 2),
    "accumulate": Extra(1, 0, 1, 1),
    "fused": Extra(0, 0, 1, 1),
    "full": Extra(0, 0, 1, 1),
}


def flops(call: Callable[[], Any]) -> int:
    """FLOPs of the matrix products of one call, backward included where it runs one."""
    _count_in_place()
    return count_flops(call)


@functools.cache
def _count_in_place() -> None:
    """Teach PyTorch's counter `addmm_`, which it leaves out."""
    from torch.utils.flop_counter import flop_registry, register_flop_formula

    if torch.ops.aten.addmm_ in flop_registry:
        return

    @register_flop_formula(torch.ops.aten.addmm_)
    def addmm_(y: Any, a: Any, b: Any, *args: Any, **kwargs: Any) -> int:
        return 2 * int(a[0]) * int(a[1]) * int(b[1])


def bytes_moved(form: str, M: int, N: int, K: int, element: int, share: float = 1.0, backward: bool = True) -> int:
    """Bytes that `form` has to move; `share` is the active share of the blocks, which scales what touches N."""
    extra = FORMS[form]
    on = share > 0
    elements = (M * K + N * K + M * N) + on * extra.forward_MK * M * K + share * extra.forward_MN * M * N
    if backward:
        elements += (M * K + N * K + M * N) + on * extra.backward_MK * M * K + share * extra.backward_MN * M * N
        elements += N * K if form == "full" else 0
    return round(elements * element)


def lora_flops(M: int, N: int, K: int, r: int, active: float, share: float, backward: bool = True) -> float:
    """FLOPs of the low-rank update: `active` products of width r with K, and the `share` of N that they cover.

    S and its update in the forward; T, dx, dA and dB in the backward.
    """
    products = 3 if backward else 1
    return 2.0 * M * r * products * (active * K + share * N)


def percent(ceilings: dict[str, Any], dtype: str, seconds: float, flops: int, moved: int) -> dict[str, float]:
    """What part of the measured GEMM and copy ceilings this is, in percent."""
    gemm = ceilings["gemm_flops_per_s"].get(dtype)
    return {
        **({"percent_of_gemm": 100 * flops / seconds / gemm} if gemm else {}),
        "percent_of_copy": 100 * moved / seconds / ceilings["copy_bytes_per_s"],
    }


def predicted_seconds(
    frozen: float, form: str, M: int, N: int, K: int, r: int, active: int, share: float, dtype: str, element: int,
    ceilings: dict[str, Any],
) -> float:  # fmt: skip
    """Forward and backward by the model of costs: the frozen layer's measured time, then the update's bytes at the
    copy ceiling and its FLOPs at the GEMM ceiling, one after the other."""
    extra = bytes_moved(form, M, N, K, element, share) - bytes_moved("frozen", M, N, K, element)
    return (
        frozen
        + extra / ceilings["copy_bytes_per_s"]
        + lora_flops(M, N, K, r, active, share) / ceilings["gemm_flops_per_s"][dtype]
    )
