"""What the device reaches, measured in the same run: a large matrix product and a large copy.

Percentages beside the times are of these, not of a data sheet.
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
