"""Processes that work through tasks, so that one that hangs or breaks its CUDA context costs only its own task."""

from __future__ import annotations

import multiprocessing
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from multiprocessing.connection import Connection
from typing import Any, TypeVar

Outcome = dict[str, Any]
Task = TypeVar("Task")
NO_TIME = "no time"


class Worker:
    """A process that calls `work` with what it is sent, and the connection to it."""

    def __init__(self, work: Callable[[Any], Outcome]) -> None:
        # A fork would share the CUDA context of its parent, which CUDA does not allow.
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_serve, args=(work, theirs), daemon=True)
        self.process.start()
        theirs.close()


def _serve(work: Callable[[Any], Outcome], connection: Connection) -> None:
    outcome: Outcome = {}
    # What raises may have broken the CUDA context, and every later call would fail: another process goes on.
    while outcome.get("state") != "failed":
        task = connection.recv()
        try:
            outcome = work(task)
        except Exception as error:
            outcome = {"state": "failed", "reason": f"{type(error).__name__}: {error}".partition("\n")[0]}
        connection.send(outcome)


def run(
    work: Callable[[Any], Outcome], tasks: Sequence[Task], count: int, until: float, each: float
) -> Iterator[tuple[Task, Outcome]]:
    """Yield every task and what became of it, in the order in which they end.

    Args:
        work: a function of a module; returns a dictionary with "state". If it raises, the task has "failed".
        tasks: what `work` is called with.
        count: how many processes work side by side; each takes one task after the other.
        until: when to end, on the clock of `time.monotonic`; what is not done by then has the state "no time".
        each: the most seconds that a task may take, the start of its process included.
    """
    started: list[Worker] = []
    own = threading.local()

    def outcome(task: Task) -> Outcome:
        left = min(each, until - time.monotonic())
        if left <= 0:
            return {"state": NO_TIME}
        worker: Worker | None = getattr(own, "worker", None)
        own.worker = None
        if worker is None:
            worker = Worker(work)
            started.append(worker)
        try:
            worker.connection.send(task)
            if worker.connection.poll(left):
                found: Outcome = worker.connection.recv()
                own.worker = None if found.get("state") == "failed" else worker
                return found
        except (EOFError, OSError):
            worker.process.join()
            return {"state": "failed", "reason": f"its process ended with exit code {worker.process.exitcode}"}
        worker.process.kill()
        return {"state": NO_TIME} if left < each else {"state": "failed", "reason": f"it did not end in {each:g} s"}

    threads = ThreadPoolExecutor(count)
    try:
        futures = {threads.submit(outcome, task): task for task in tasks}
        for future in as_completed(futures):
            yield futures[future], future.result()
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        for worker in started:
            worker.process.kill()
