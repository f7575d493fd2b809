"""Peaks of memory in MiB: of a GPU what PyTorch has allocated, of the CPU what is resident of this process."""

from __future__ import annotations

import ctypes
import re
from pathlib import Path

import torch


def begin(device: str) -> float:
    """Forget the peak so far and return what is in use."""
    if device != "cpu":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    # What earlier calls have freed but the allocator has kept would hide what comes.
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    return _resident("VmRSS")


def peak(device: str) -> float:
    """The most that was in use since `begin`."""
    if device != "cpu":
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() / 2**20
    return _resident("VmHWM")


def _resident(field: str) -> float:
    found = re.search(rf"^{field}:\s+(\d+)", Path("/proc/self/status").read_text(), re.M)
    assert found is not None, f"/proc/self/status has no {field} line; peak memory can be measured on Linux only"
    return int(found[1]) / 1024
