"""Memory is measured in a process of its own, which imports what all of them import and answers whatever happens."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.contenders import memory
from benchmarks.contenders.peers import Missing
from benchmarks.record import BenchmarkError


def _allocates(mib: int) -> float:
    if not all(library in sys.modules for library in memory.LIBRARIES):
        raise RuntimeError("not all libraries are imported")
    before = memory.peak_begins()
    block = torch.zeros(mib * 2**18)
    del block
    return memory.peak() - before


def _dies() -> float:
    os._exit(7)


def _raises(error: Exception) -> float:
    raise error


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory of a process is read on Linux only")
def test_memory_is_what_a_call_adds_in_a_process_that_has_imported_what_all_import() -> None:
    pytest.importorskip("peft")
    assert memory.in_a_process(_allocates, 64) == pytest.approx(64, rel=0.05)


@pytest.mark.slow
def test_a_process_that_dies_is_named_with_its_exit_code() -> None:
    with pytest.raises(BenchmarkError, match="exit code 7: it has ended without an answer"):
        memory.in_a_process(_dies)


@pytest.mark.slow
@pytest.mark.parametrize("error", [Missing("no such package"), RuntimeError("a reason")], ids=str)
def test_what_is_raised_in_the_process_is_raised_here(error: Any) -> None:
    with pytest.raises(type(error) if isinstance(error, Missing) else BenchmarkError, match=str(error)):
        memory.in_a_process(_raises, error)
