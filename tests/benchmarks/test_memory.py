"""Memory is measured in a process of its own, which imports what all of them import and answers whatever happens."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.contenders import memory
from benchmarks.results import ROOT, BenchmarkError, Missing

# Processes that are started: once is enough.
pytestmark = pytest.mark.once


def _allocates(mib: int) -> float:
    if not all(library in sys.modules for library in memory.LIBRARIES):
        raise RuntimeError("not all libraries are imported")
    before = memory.peak_begins()
    block = torch.zeros(mib * 2**18)
    del block
    return memory.peak() - before


def _dies() -> float:
    os._exit(7)


def _is_interrupted() -> float:
    os.kill(os.getpid(), signal.SIGINT)
    return 1.0


def _raises(error: Exception) -> float:
    raise error


@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory of a process is read on Linux only")
def test_memory_is_what_a_call_adds_in_a_process_that_has_imported_what_all_import() -> None:
    pytest.importorskip("peft")
    assert memory.in_a_process(_allocates, 64) == pytest.approx(64, rel=0.05)


@pytest.mark.once
def test_a_process_that_dies_is_named_with_its_exit_code() -> None:
    with pytest.raises(BenchmarkError, match="exit code 7: it has ended without an answer"):
        memory.in_a_process(_dies)


def test_the_process_leaves_an_interrupt_to_the_one_that_waits() -> None:
    assert memory.in_a_process(_is_interrupted) == 1.0


def test_an_interrupt_ends_the_process_without_a_word_of_its_own() -> None:
    program = (
        "import sys, time\nfrom benchmarks.contenders import memory\nprint('here', flush=True)\n"
        "try: memory.in_a_process(time.sleep, 300)\nexcept KeyboardInterrupt: sys.exit('interrupted')"
    )
    run = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, start_new_session=True, text=True, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )  # fmt: skip
    with run:
        assert run.stdout is not None
        assert run.stdout.readline() == "here\n"
        # Time to begin its imports, or to be asleep: it ends alike.
        time.sleep(3.0)
        os.killpg(run.pid, signal.SIGINT)
        assert run.communicate(timeout=60)[1] == "interrupted\n"
    assert run.returncode == 1


@pytest.mark.once
@pytest.mark.parametrize("error", [Missing("no such package"), RuntimeError("a reason")], ids=str)
def test_what_is_raised_in_the_process_is_raised_here(error: Any) -> None:
    with pytest.raises(type(error) if isinstance(error, Missing) else BenchmarkError, match=str(error)):
        memory.in_a_process(_raises, error)
