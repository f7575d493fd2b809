"""Processes that work off tasks, so that one that hangs, or leaves its CUDA context broken, costs one task alone."""

from __future__ import annotations

import multiprocessing
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

import torch

Outcome = dict[str, Any]
Task = TypeVar("Task")
NO_TIME = "no time"


class Worker(NamedTuple):
    """A process and the line to it."""

    process: BaseProcess
    line: Connection

    def end(self) -> None:
        """End the process."""
        self.line.close()
        self.process.kill()
        self.process.join()


class Workers:
    """Processes that call `work`, a function of a module, with one task after the other. They start when needed.

    What `work` returns is a dictionary with "state"; what it raises is a task "failed", with the reason.
    """

    def __init__(self, work: Callable[[Any], Outcome]) -> None:
        self.work, self.idle = work, list[Worker]()
        self.busy: dict[Worker, tuple[Any, float]] = {}

    def __enter__(self) -> Workers:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for worker in (*self.idle, *self.busy):
            worker.end()

    def run(self, tasks: Sequence[Task], count: int, until: float, each: float) -> Iterator[tuple[Task, Outcome]]:
        """Yield every task and what became of it, in the order in which they end.

        Args:
            tasks: what `work` is called with.
            count: how many processes work side by side.
            until: when to end on the clock of `time.monotonic`; what is not done then has the state "no time".
            each: the most seconds that a task may take, the start of its process included.
        """
        waiting = deque(tasks)
        while waiting or self.busy:
            while waiting and len(self.busy) < count and time.monotonic() < until:
                worker, task = self.idle.pop() if self.idle else self._begun(), waiting.popleft()
                worker.line.send(task)
                self.busy[worker] = task, time.monotonic() + each
            if not self.busy:
                break
            first = min(until, *(end for _, end in self.busy.values()))
            ready = wait([worker.line for worker in self.busy], max(0.0, first - time.monotonic()))
            for worker, (task, end) in list(self.busy.items()):
                if worker.line in ready:
                    outcome, lives = _answer(worker)
                elif time.monotonic() >= min(end, until):
                    late = {"state": "failed", "reason": f"it did not end within {each:g} s"}
                    outcome, lives = (late if end <= until else {"state": NO_TIME}), False
                else:
                    continue
                del self.busy[worker]
                if lives:
                    self.idle.append(worker)
                else:
                    worker.end()
                yield task, outcome
        for task in waiting:
            yield task, {"state": NO_TIME}

    def _begun(self) -> Worker:
        # A fork would share the CUDA context of its parent, which CUDA does not allow.
        context = multiprocessing.get_context("spawn")
        ours, theirs = context.Pipe()
        process = context.Process(target=_serve, args=(self.work, theirs), daemon=True)
        process.start()
        theirs.close()
        return Worker(process, ours)


def _answer(worker: Worker) -> tuple[Outcome, bool]:
    """What became of a task, and whether its process can take another one."""
    try:
        outcome, lives = worker.line.recv()
        return outcome, lives
    except EOFError:
        worker.process.join()
        return {"state": "failed", "reason": f"its process ended with exit code {worker.process.exitcode}"}, False


def _serve(work: Callable[[Any], Outcome], line: Connection) -> None:
    lives = True
    while lives:
        try:
            task = line.recv()
        except EOFError:
            return
        try:
            outcome = work(task)
        except Exception as error:
            first = str(error).splitlines()[:1] or ["no message"]
            outcome = {"state": "failed", "reason": f"{type(error).__name__}: {first[0]}"}
        lives = _usable()
        line.send((outcome, lives))


def _usable() -> bool:
    """Whether the CUDA context, where there is one, has survived: after an illegal access every call fails."""
    if not torch.cuda.is_initialized():
        return True
    try:
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
    except Exception:
        return False
    return True
