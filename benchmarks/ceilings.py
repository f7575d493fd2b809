"""What the device reaches, measured in the same run: a large matrix product and a large copy.

Percentages beside the times are of these, not of a data sheet. Predictions for a GPU that is not there are of those on
record.
"""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks.record import RESULTS, read_result, source
from benchmarks.settings import DTYPES, Settings
from benchmarks.timing import Call, interleaved

# Edge of the square product, and bytes of the copy, by grid.
SIZES = {
    "cpu": {"tiny": (64, 2**16), "quick": (1024, 2**27), "default": (2048, 2**28), "full": (2048, 2**28)},
    "cuda": {"tiny": (256, 2**20), "quick": (8192, 2**31), "default": (8192, 2**32), "full": (8192, 2**32)},
}


class Ceilings(NamedTuple):
    """What an H200 reaches in a large bf16 product and in a large copy."""

    flops_per_s: float = 790e12
    bytes_per_s: float = 4.3e12
    source: str = "stated, not measured here"


def on_record(folder: Path = RESULTS / "nvidia-h200") -> Ceilings:
    """Return the ceilings that a run of `linear` has left in `folder`, or those that are stated."""
    path = folder / "linear.json"
    if not path.exists():
        return Ceilings()
    result = read_result(path)
    found = result["ceilings"]
    return Ceilings(
        found["gemm_flops_per_s"]["bf16"], found["copy_bytes_per_s"], f"measured, {source(result['environment'])}"
    )


def measure(settings: Settings, dtypes: Sequence[str] = ("fp32", "bf16")) -> dict[str, Any]:
    """Return `{"gemm_flops_per_s": {dtype: ...}, "copy_bytes_per_s": ..., ...}`, at the 20th percentile of the times.

    The product is of random numbers, because zeros run faster; the copy counts bytes read and bytes written.
    """
    edge, size = SIZES[settings.device][settings.grid]
    rounds = settings.repetitions(7)
    rates: dict[str, float] = {}
    for dtype in dtypes:
        a, b = (torch.randn(edge, edge, device=settings.device).to(DTYPES[dtype]) for _ in range(2))
        out = torch.empty_like(a)
        calls: dict[str, list[Call]] = {"gemm": [partial(torch.mm, a, b, out=out)]}
        rates[dtype] = 2 * edge**3 / short(interleaved(calls, settings.device, rounds)["gemm"][0])
        del a, b, out
    source = torch.randint(0, 255, (size,), dtype=torch.uint8, device=settings.device)
    target = torch.empty_like(source)
    seconds = short(interleaved({"copy": [lambda: target.copy_(source)]}, settings.device, rounds)["copy"][0])
    return {
        "gemm_flops_per_s": rates,
        "copy_bytes_per_s": 2 * size / seconds,
        "gemm_edge": edge,
        "copy_bytes": size,
        "statistic": "20th percentile of the times",
    }


def short(times: Sequence[float]) -> float:
    """The 20th percentile: below the median, since a ceiling is what is reached; the minimum would be an outlier."""
    return statistics.quantiles(times, n=5, method="inclusive")[0]
