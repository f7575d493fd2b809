"""Folding LoRA into all linear layers of a ViT-L/16: slora, PEFT, and what copying as many bytes once costs.

Putting the adapters on is not timed. `device_seconds` is the time between two events on a GPU's stream,
`added_memory_mib` what one call adds at its peak. `flops` and `bytes` are by formula, the least that the result takes.

All calls work on one set of weights, which is larger than the last cache.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

import torch

import slora
from benchmarks import counting
from benchmarks.contenders import memory, merge
from benchmarks.results import BenchmarkError, Missing, Settings, reason_in, spread
from benchmarks.roofline import DTYPES
from benchmarks.timing import COMPARABLE_ROUNDS, ORDER_SEED, first_line, release

CONTENDERS = merge.NAMES
Result = TypeVar("Result")


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
        BenchmarkError: the extension is not there; nothing was timed.
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
    """Check every contender, then time those that are right in turns."""
    point = {"model": model, "dtype": dtype, "r": rank}
    rows: dict[str, dict[str, Any]] = {
        name: {"point": point, "contender": name} for name in CONTENDERS if settings.wanted(name)
    }
    with reason_in(*rows.values()):
        contest = Contest(settings, model, dtype, rank, rows)
        contest.check()
        contest.time()
        for row in contest.running():
            seconds = row.get("device_seconds", row["seconds"])["median"]
            # Merging computes in fp32, whatever the weights' dtype.
            row.update(counting.beside_time(ceilings, "fp32", seconds, row["flops"], row["bytes"]))
        if settings.on_gpu:
            contest.weigh_on_gpu()
        else:
            contest.weigh()
    print(f"  merge {model} {dtype} r={rank}", file=sys.stderr, flush=True)
    return list(rows.values())


class Contest:
    """The contenders at one point, with their rows. One that fails or is wrong leaves it; its row has the reason."""

    def __init__(self, settings: Settings, model: str, dtype: str, rank: int, rows: dict[str, dict[str, Any]]) -> None:
        self.settings, self.what, self.rows = settings, (model, dtype, rank), rows
        self.case = self.fresh()
        for name, row in rows.items():
            row.update(flops=self.case.flops(name), bytes=self.case.bytes(name))

    def fresh(self) -> merge.Case:
        """The model as it is at first."""
        model, dtype, rank = self.what
        return merge.Case(model, DTYPES[dtype], rank, self.settings.device)

    def running(self) -> list[dict[str, Any]]:
        """The rows of those that have not left."""
        return [row for row in self.rows.values() if "flops" in row]

    def tried(self, name: str, act: Callable[[merge.Case, str], Result]) -> Result | None:
        """What `act` gives for the model; where it raises, `name` leaves."""
        try:
            return act(self.case, name)
        except Missing as error:
            state, reason = "skipped", str(error)
        except Exception as error:
            state, reason = "failed", first_line(error)
        self.leave(name, state, reason)
        return None

    def without_times(self, name: str, state: str, reason: str) -> dict[str, Any]:
        """The row of a contender that has left."""
        return {"point": self.rows[name]["point"], "contender": name, state: reason}

    def leave(self, name: str, state: str, reason: str) -> None:
        """Take a contender out."""
        self.rows[name] = self.without_times(name, state, reason)
        # It may have left the model half adapted.
        del self.case
        release(self.settings.device)
        self.case = self.fresh()

    def check(self) -> None:
        """Refuse who merges wrongly."""
        for name in list(self.rows):
            wrong = self.tried(name, merge.Case.mistake)
            if wrong:
                self.leave(name, "refused", wrong)

    def time(self) -> None:
        """Time everyone in turns."""
        taken: dict[str, dict[str, list[float]]] = {row["contender"]: {} for row in self.running()}
        start, orders = time.monotonic(), random.Random(ORDER_SEED)
        most = 30 if self.settings.on_gpu else 45
        for done in range(self.settings.repetitions(15) + 1):
            # A round puts PEFT on a whole model, which takes far longer than the merge.
            if done > COMPARABLE_ROUNDS and (self.settings.over() or time.monotonic() - start > most):
                break
            names = [row["contender"] for row in self.running()]
            for name in orders.sample(names, len(names)):
                found = self.tried(name, merge.Case.run)
                for kind, value in (found or {}).items():
                    if done:  # the first round warms up
                        taken[name].setdefault(kind, []).append(value)
        for row in self.running():
            row.update({kind: spread(values) for kind, values in taken[row["contender"]].items()})

    def weigh(self) -> None:
        """Measure the memory that a call adds on the CPU, by a process per contender."""
        # Without the model: both would have to fit.
        del self.case
        release(self.settings.device)
        # A process takes far longer than a tiny merge.
        for row in self.running()[: 1 if self.settings.grid == "tiny" else None]:
            try:
                row["added_memory_mib"] = memory.in_a_process(merge.added_memory, row["contender"], *self.what)
            except BenchmarkError as error:
                self.rows[row["contender"]] = self.without_times(row["contender"], "failed", str(error))

    def weigh_on_gpu(self) -> None:
        """Measure the memory that a call adds on a GPU, and count the launches of the operator."""
        for row in self.running():
            name = row["contender"]
            peak = self.tried(name, added_memory)
            if peak is not None:
                row["added_memory_mib"] = peak
            if peak is not None and name == "slora batched_merge_":
                launches = self.tried(name, merge.launches)
                if launches is not None:
                    row["launches"] = launches
        del self.case
        release(self.settings.device)


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
