"""What an H200 reaches, as measured or as stated: what predictions for a GPU that is not there are made of."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from benchmarks.results import RESULTS, read_result, source


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
