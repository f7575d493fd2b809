"""What the device reaches, measured in the same run, and what that allows.

Percentages beside the times are of a large matrix product, not of a data sheet. The floor of one layer, forward and
backward, is the frozen layer's measured time with what every low-rank update costs beyond it: its FLOPs (six products)
at the rate of the product, and x and dy once more, for dA and dB, at the rate of a large copy.
"""

from __future__ import annotations

import statistics
from functools import partial
from typing import Any

import torch

from benchmarks.timing import Call, Sampler

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
# Edge of the square product, and bytes of the copy, by grid.
SIZES = {
    "cpu": {"tiny": (64, 2**16), "quick": (1024, 2**27), "default": (2048, 2**28)},
    "cuda": {"tiny": (256, 2**20), "quick": (8192, 2**31), "default": (8192, 2**32)},
}
Roofline = dict[str, Any]


def measure(device: str, grid: str, rounds: int) -> Roofline:
    """Return `{"gemm_flops_per_s": {dtype: ...}, "copy_bytes_per_s": ...}`, at the 20th percentile of the times.

    The product is of random numbers, because zeros run faster; the copy counts bytes read and bytes written.
    """
    edge, size = SIZES[device][grid]

    def seconds(call: Call) -> float:
        sampler = Sampler([call], device)
        # Below the median, since a roofline is what can be reached; the minimum would be an outlier.
        return statistics.quantiles([sampler() for _ in range(rounds)], n=5, method="inclusive")[0]

    rates: dict[str, float] = {}
    for dtype in ("fp32", "bf16"):
        a, b = (torch.randn(edge, edge, device=device).to(DTYPES[dtype]) for _ in range(2))
        rates[dtype] = 2 * edge**3 / seconds(partial(torch.mm, a, b, out=torch.empty_like(a)))
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return {"gemm_flops_per_s": rates, "copy_bytes_per_s": 2 * size / seconds(lambda: target.copy_(source))}


def percent_of_gemm(roofline: Roofline, dtype: str, seconds: float, flops: float) -> float:
    """The rate of `flops` in `seconds`, in percent of the measured product's."""
    return float(100 * flops / seconds / roofline["gemm_flops_per_s"][dtype])


def lora_flops(M: int, N: int, K: int, r: int, active: float, share: float) -> float:
    """FLOPs of the update: S and its update; T, dx, dA and dB. `active` blocks cover the `share` of N."""
    return 2.0 * M * r * 3 * (active * K + share * N)


def floor_seconds(roofline: Roofline, frozen: float, point: dict[str, Any]) -> float:
    """The floor at a point of the case `linear`; `frozen` is the frozen layer's time there."""
    M, N, K, r, dtype = (point[key] for key in ("M", "N", "K", "r", "dtype"))
    active, _, blocks = point["active"].partition("/")
    share = int(active) / int(blocks or 1)
    moved = DTYPES[dtype].itemsize * M * (K + share * N)
    flops = lora_flops(M, N, K, r, int(active), share)
    return float(frozen + moved / roofline["copy_bytes_per_s"] + flops / roofline["gemm_flops_per_s"][dtype])
