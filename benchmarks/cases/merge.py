"""Folding LoRA into all linear layers of a ViT-L/16: slora, PEFT, and what copying those weights once costs.

Putting the adapters on is not timed. `device_seconds` is the time between two events on a GPU's stream,
`added_memory_mib` what one call adds at its peak. `flops` and `bytes` are by formula, the least that the result takes.

All calls work on one set of weights, which is larger than the last cache.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Iterator
from typing import Any

import torch

import slora
from benchmarks import counting
from benchmarks.contenders import merge
from benchmarks.record import BenchmarkError, spread
from benchmarks.settings import DTYPES, FEWEST_ROUNDS, Settings


def grid(settings: Settings) -> list[tuple[str, str, int]]:
    """`(model, dtype, rank)` in the order in which they matter."""
    if settings.grid == "tiny":
        return [("vit_tiny_patch16_224", "fp32", 4)]
    model = "vit_large_patch16_224"
    if settings.grid == "quick":
        return [(model, "bf16", 16)]
    points = [(model, "bf16", 16), (model, "fp32", 16)]
    if settings.on_gpu or settings.grid == "full":
        points.insert(1, (model, "bf16", 128))
    if settings.grid == "full":
        points += [(model, dtype, rank) for dtype in ("bf16", "fp32", "fp16") for rank in (4, 64)]
    return points


def run(settings: Settings, ceilings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield the rows of every point; stops between two points when the time is up.

    Raises:
        BenchmarkError: the extension is not there, or a merge is wrong; nothing was timed.
    """
    extension = slora.merging.extension_info()
    if not extension["available"]:
        raise BenchmarkError(f"slora._C cannot be used: {extension['reason']}; nothing was timed")
    if settings.on_gpu and extension["cuda"] is None:
        raise BenchmarkError("slora._C was built without CUDA; nothing was timed")
    for model, dtype, rank in grid(settings):
        if settings.stop():
            return
        yield from measure(settings, ceilings, model, dtype, rank)


def measure(settings: Settings, ceilings: dict[str, Any], model: str, dtype: str, rank: int) -> list[dict[str, Any]]:
    """Check, then time all contenders in turns."""
    case = merge.Case(model, DTYPES[dtype], rank, settings.device)
    merge.check(case)
    wanted = [name for name in case.contenders if settings.wanted(name)]
    taken: dict[str, dict[str, list[float]]] = {name: {} for name in wanted}
    start = time.monotonic()
    for done in range(settings.repetitions(15) + 1):
        # A round puts PEFT on a whole model, which takes far longer than the merge.
        if done > FEWEST_ROUNDS and (settings.over() or time.monotonic() - start > (30 if settings.on_gpu else 45)):
            break
        for name in wanted:
            for kind, value in case.run(name).items():
                if done:  # the first round warms up
                    taken[name].setdefault(kind, []).append(value)
    rows = []
    for name in wanted:
        row: dict[str, Any] = {
            "point": {"model": model, "dtype": dtype, "r": rank},
            "contender": name,
            **{kind: spread(values) for kind, values in taken[name].items()},
        }
        seconds = row.get("device_seconds", row["seconds"])["median"]
        row.update(flops=case.flops(name), bytes=case.bytes(name))
        # Merging computes in fp32, whatever the weights' dtype.
        row.update(counting.beside_time(ceilings, "fp32", seconds, row["flops"], row["bytes"]))
        if settings.on_gpu:
            row["added_memory_mib"] = added_memory(case, name)
            if name == "slora batched_merge_":
                row["launches"] = merge.launches(case)
        rows.append(row)
    del case
    gc.collect()
    if settings.on_gpu:
        torch.cuda.empty_cache()
    else:
        # A process per contender, which takes far longer than a tiny merge.
        for row in rows[:1] if settings.grid == "tiny" else rows:
            row["added_memory_mib"] = merge.added_memory(row["contender"], model, dtype, rank)
    print(f"  merge {model} {dtype} r={rank}", file=sys.stderr, flush=True)
    return rows


def added_memory(case: merge.Case, name: str) -> float:
    """MiB of a GPU that one call adds at its peak."""
    prepare, call = case.contenders[name]
    with torch.no_grad(), prepare():
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
