"""One result file: what was measured, on what, from which state of the source."""

from __future__ import annotations

import datetime
import platform
import statistics
import subprocess
from collections.abc import Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from slora.files import write_json

RESULTS = Path(__file__).parent / "results"
SCHEMA = 1


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and 20th and 80th percentile of `values`, with their number."""
    cuts = statistics.quantiles(values, n=5, method="inclusive")
    return {"median": statistics.median(values), "p20": cuts[0], "p80": cuts[3], "n": len(values)}


def environment() -> dict[str, Any]:
    """Commit, versions, processor and threads of this run."""
    packages = {}
    for name in ("torch", "triton", "timm", "peft", "transformers", "open_clip_torch"):
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    return {
        "commit": _git("rev-parse", "HEAD"),
        "dirty": bool(_git("status", "--porcelain", "--untracked-files=no")),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": packages,
        "device": device_name(),
        "threads": torch.get_num_threads(),
    }


def device_name() -> str:
    """The GPU's name, or the processor's."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()} ({torch.get_num_threads()} threads)"
    return f"{platform.processor() or platform.machine()} ({torch.get_num_threads()} threads)"


def write_result(case: str, device: str, payload: dict[str, Any]) -> Path:
    """Write `results/<device>/<case>.json`, atomically, and return its path."""
    path = RESULTS / device / f"{case}.json"
    write_json(path, {"schema": SCHEMA, "case": case, "environment": environment(), **payload})
    return path


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parent, capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()
