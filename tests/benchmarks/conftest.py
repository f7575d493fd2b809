"""Fixtures of the tests of benchmarks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

from benchmarks import candidates, workers


@pytest.fixture
def no_processes(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Candidates are examined in this process, where torch is imported once and a test can break the kernels."""

    def run(work: Any, tasks: Any, *_: Any) -> Iterator[Any]:
        for task in tasks:
            try:
                yield task, work(task)
            except ValueError as error:
                yield task, {"state": "failed", "reason": str(error)}

    monkeypatch.setattr(workers, "run", run)
    yield
    candidates.prepared.cache_clear()
