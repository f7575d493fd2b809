"""Peak memory of a training step on the CPU: of a process of its own per contender, libraries included."""

from __future__ import annotations

import multiprocessing
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from benchmarks.cases import train_step
from benchmarks.contenders.model import CONTENDERS, RANK, Step, dtype_of
from benchmarks.contenders.peers import Missing
from benchmarks.models import find
from benchmarks.record import BenchmarkError
from benchmarks.settings import Settings


def grid(settings: Settings) -> list[tuple[str, int, str]]:
    """`(model, batch, precision)`."""
    if settings.grid in ("tiny", "quick"):
        return [("tiny" if settings.grid == "tiny" else "vit-s", 2, "fp32")]
    return [("vit-s", 16, precision) for precision in (("fp32", "bf16") if settings.grid == "full" else ("fp32",))]


def run(settings: Settings, ceilings: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Yield one row per contender."""
    for name, batch, precision in grid(settings):
        train_step.check_outputs(find(name), "cpu")
        for contender in train_step.USUAL:
            if settings.stop():
                return
            if not settings.wanted(contender):
                continue
            point = {"model": find(name).name, "batch": batch, "r": RANK, "precision": precision}
            row: dict[str, Any] = {"point": point, "contender": contender}
            peak = in_a_process(contender, name, batch, precision)
            row.update({"skipped": peak} if isinstance(peak, str) else {"peak_memory_mib": peak})
            print(f"  {precision} {contender}", file=sys.stderr, flush=True)
            yield row


def in_a_process(contender: str, model: str, batch: int, precision: str) -> float | str:
    """Peak resident memory of three steps in a process of their own, in MiB, or why there is none."""
    context = multiprocessing.get_context("spawn")
    receiver, sender = context.Pipe(duplex=False)
    arguments = (sender, contender, model, batch, precision, torch.get_num_threads())
    process = context.Process(target=_measure, args=arguments)
    process.start()
    sender.close()
    try:
        answer: float | str = receiver.recv()
    except EOFError:
        process.join()
        raise BenchmarkError(f"{contender}: the process that measures memory ended with {process.exitcode}") from None
    process.join()
    return answer


def _measure(sender: Any, contender: str, model: str, batch: int, precision: str, threads: int) -> None:
    torch.set_num_threads(threads)
    try:
        inputs = find(model).inputs(batch, "cpu", dtype_of(precision))
        step = Step(CONTENDERS[contender], find(model), inputs, precision, "cpu")
    except Missing as reason:
        sender.send(str(reason))
        return
    for _ in range(3 if step.count == 1 else 1):
        step()
    sender.send(_peak_resident_mib())


def _peak_resident_mib() -> float:
    # Not getrusage: its maximum survives exec, so a child would report its parent's.
    status = Path("/proc/self/status")
    for line in status.read_text().splitlines() if status.exists() else ():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) / 1024
    raise BenchmarkError("/proc/self/status has no VmHWM line; peak memory can be measured on Linux only")
