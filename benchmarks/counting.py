"""Bytes and FLOPs of one layer by formula, what a time is beside the roofline, and the cost model.

Bytes are the least that an algorithm has to move through memory, in elements of the activations' dtype, with
`x [M, K]`, `dy [M, N]` and everything of size r left out:

    frozen         forward x + W + y, backward dy + W + dx
    eager          one kernel per step, as PEFT computes        + 6 MK + 10 MN
    addmm          added in place to y and dx                   + 4 MK +  4 MN
    cublas_after   the same
    cublas_before  the same, but y and dx are read by the GEMM  + 4 MK +  4 MN
    precomputed    S and T first, then added to the accumulator + 2 MK +  2 MN
    split          x and dy by two launches                     + 2 MK +  2 MN
    fused          S and T in the main loops, too               +   MK +    MN
    full           the dense weight gradient                    +   MK +    MN + NK

Two algorithms, as in "fused/split", are those of the forward and of the backward. FLOPs of real calls are counted by
PyTorch (`slora.ops.flops.count_flops`).
"""

from __future__ import annotations

from typing import Any

from benchmarks.results import Row

# Elements moved beyond a frozen layer: multiples of MK and MN in the forward, of MK, MN and NK in the backward.
ALGORITHMS = {
    "frozen": (0, 0, 0, 0, 0),
    "eager": (1, 6, 5, 4, 0),
    "addmm": (1, 2, 3, 2, 0),
    "cublas_after": (1, 2, 3, 2, 0),
    "cublas_before": (1, 2, 3, 2, 0),
    "precomputed": (1, 0, 1, 2, 0),
    "split": (1, 0, 1, 2, 0),
    "fused": (0, 0, 1, 1, 0),
    "full": (0, 0, 1, 1, 1),
}


def bytes_moved(algorithm: str, M: int, N: int, K: int, element: int, share: float = 1.0) -> int:
    """Bytes that forward and backward have to move; `share` is the active share of the blocks, which scales MN."""
    first, last = (ALGORITHMS[name] for name in (algorithm.split("/") * 2)[:2])
    (forward_MK, forward_MN), (backward_MK, backward_MN, backward_NK) = first[:2], last[2:]
    on = share > 0
    elements = 2 * (M * K + N * K + M * N) + on * ((forward_MK + backward_MK) * M * K + backward_NK * N * K)
    return round((elements + share * (forward_MN + backward_MN) * M * N) * element)


def lora_flops(M: int, N: int, K: int, r: int, active: float, share: float) -> float:
    """FLOPs of the update: S and its update; T, dx, dA and dB. `active` blocks cover the `share` of N."""
    return 2.0 * M * r * 3 * (active * K + share * N)


def predicted_seconds(frozen: float, algorithm: str, point: Row, roofline: dict[str, Any]) -> float:
    """Forward and backward by the cost model: the frozen layer's measured time, then the update's bytes at the
    measured copy rate and its FLOPs at the measured GEMM rate, one after the other. Of the algorithm "fused" it is the
    floor: x and dy have to be read once more, for dA and dB, when T is complete."""
    M, N, K, dtype = point["M"], point["N"], point["K"], point["dtype"]
    active, _, blocks = (point["active"] if "/" in point["active"] else f"{point['active']}/1").partition("/")
    share, element = int(active) / int(blocks), 4 if dtype == "fp32" else 2
    extra = bytes_moved(algorithm, M, N, K, element, share) - bytes_moved("frozen", M, N, K, element)
    flops = lora_flops(M, N, K, point["r"], int(active), share)
    seconds: float = frozen + extra / roofline["copy_bytes_per_s"] + flops / roofline["gemm_flops_per_s"][dtype]
    return seconds


def beside_roofline(roofline: dict[str, Any], dtype: str, seconds: float, flops: float, moved: float | None) -> Row:
    """The rate, and `flops` and `moved` bytes (None: unknown) in percent of the measured GEMM and copy rates."""
    gemm = roofline["gemm_flops_per_s"].get(dtype)
    return {
        "flops_per_s": flops / seconds,
        **({"percent_of_gemm": 100 * flops / seconds / gemm} if gemm else {}),
        **({"percent_of_copy": 100 * moved / seconds / roofline["copy_bytes_per_s"]} if moved is not None else {}),
    }
