"""A process that ends or hangs costs its own task alone. Nothing here imports torch, nor do the processes."""

from __future__ import annotations

import os
import time
from typing import Any

from benchmarks import workers


def work(task: str) -> dict[str, Any]:
    """What a process of the test does."""
    if task == "ends":
        os._exit(7)
    if task == "hangs":
        time.sleep(60)
    if task == "raises":
        raise ValueError("of all things\nand more")
    return {"state": "right"}


def test_a_process_that_ends_or_hangs_costs_its_own_task_alone() -> None:
    tasks = ["ends", "hangs", "raises", "right"]
    assert dict(workers.run(work, tasks, 2, time.monotonic() + 300, 8.0)) == {
        "ends": {"state": "failed", "reason": "its process ended with exit code 7"},
        "hangs": {"state": "failed", "reason": "it did not end in 8 s"},
        "raises": {"state": "failed", "reason": "ValueError: of all things"},
        "right": {"state": "right"},
    }
    found = dict(workers.run(work, ["hangs", "right"], 1, time.monotonic() + 1, 8.0))
    assert found == {"hangs": {"state": "no time"}, "right": {"state": "no time"}}
