"""Calls of a function in two processes at once, as torchrun would start them, without an import of torch in each."""

from __future__ import annotations

import multiprocessing
import os
import socket
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from typing import Any

import torch


class TwoProcesses:
    """Processes are forked from a server that has imported what a training needs."""

    def __init__(self) -> None:
        self.context = multiprocessing.get_context("forkserver")
        self.context.set_forkserver_preload(
            [
                "torch.distributed.fsdp",
                "accelerate",
                "slora.demo.run",
                "slora.training.finetune_run",
                "tests.two_processes",
            ]
        )

    def __call__(self, function: Callable[..., Any], *arguments: Any) -> list[Any]:
        """Return what `function(rank, *arguments)` returns in each process.

        The function is found by its module; arguments and results are pickled.
        """
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        with ProcessPoolExecutor(2, self.context) as pool:
            calls = [pool.submit(_call, rank, port, function, *arguments) for rank in (0, 1)]
            return [call.result(timeout=300) for call in calls]


def _call(rank: int, port: int, function: Callable[..., Any], *arguments: Any) -> Any:
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), OMP_NUM_THREADS="1")
    try:
        return function(rank, *arguments)
    finally:
        if torch.distributed.is_initialized():
            torch.distributed.destroy_process_group()
