"""Two processes on the CPU, each with one thread, that find each other through a file."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

Both = Callable[..., list[Any]]


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory: pytest.TempPathFactory) -> Both:
    """Return `run(script, *arguments)`: what each of two processes of a script in this folder prints, read as JSON.

    A script gets the URL of a store, its rank and the arguments.
    """

    def run(script: str, *arguments: object) -> list[Any]:
        store = (tmp_path_factory.mktemp("store") / "store").as_uri()
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        processes = [
            subprocess.Popen(
                [sys.executable, str(Path(__file__).with_name(script)), store, str(rank), *map(str, arguments)],
                env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
            )
            for rank in (0, 1)
        ]  # fmt: skip
        try:
            outputs = [process.communicate(timeout=300) for process in processes]
        finally:
            for process in processes:
                process.kill()
        assert [process.returncode for process in processes] == [0, 0], outputs
        return [json.loads(out) for out, _ in outputs]

    return run
