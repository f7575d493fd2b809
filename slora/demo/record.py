"""`demo.json` as text, and what it says of the machine."""

from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

import slora

Result = dict[str, Any]


def as_json(result: Result) -> str:
    """The result as JSON with one line per run, for readable diffs."""
    # Runs are put in after the rest was written: json indents all or nothing.
    text = json.dumps(result | {"clip": result["clip"] | {"runs": []}, "runs": []}, indent=1)
    clip, _, main = text.rpartition('"runs": []')
    clip = clip.replace('"runs": []', f'"runs": {_lines(result["clip"]["runs"], 2)}')
    return f'{clip}"runs": {_lines(result["runs"], 1)}{main}\n'


def _lines(runs: Sequence[Result], indent: int) -> str:
    space = " " * indent
    return "[\n" + ",\n".join(f"{space} {json.dumps(run)}" for run in runs) + f"\n{space}]"


def environment(jobs: int) -> dict[str, Any]:
    """Return the versions of packages, the processor and the number of processes."""
    packages = ("torch", "timm", "open_clip_torch", "scikit-learn")
    return {
        "slora": slora.__version__,
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "processor": _processor(),
        "processes": jobs,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()
