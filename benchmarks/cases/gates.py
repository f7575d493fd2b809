"""A training step under each policy for inactive blocks, few of them active: exact, probe, frozen.

The limits beside them: the head alone, and frozen weights with dx everywhere, which any gate gradient of the first
layers needs.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from benchmarks.cases import train_step
from benchmarks.results import Settings

CONTENDERS = [
    "head only",
    "frozen, dx everywhere",
    "slora, few active, frozen",
    "slora, few active, probe",
    "slora, few active, exact",
]


def run(settings: Settings, ceilings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield one row per policy and limit."""
    model, batch = ("vit-b", 256) if settings.on_gpu else ("vit-s", 2 if settings.grid == "quick" else 16)
    if settings.grid == "tiny":
        model, batch = "tiny", 2
    precisions = ["bf16" if settings.on_gpu else "fp32"] + ["amp"] * (settings.grid == "full")
    for precision in precisions:
        if settings.stop():
            return
        yield from train_step.measure(settings, ceilings, model, batch, precision, "eager", CONTENDERS)
