"""Result files: written, read, and what they say of the machine and of the state of the source (form: `schema.py`)."""

from __future__ import annotations

import datetime
import json
import os
import platform
import re
import statistics
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from benchmarks.schema import SCHEMA, fault
from slora.files import write_json

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
# What `run` and `report` write; everything else under these folders is source, a new file too.
OUTPUTS = ("README.md", "docs/compatibility.md", "benchmarks/README.md", "benchmarks/figures", "benchmarks/results")
SOURCES = ("slora", "kernels", "csrc", "benchmarks")
NOT_MEASURED = "not measured"
PACKAGES = ("torch", "torchvision", "triton", "timm", "peft", "transformers", "open_clip_torch")


class BenchmarkError(Exception):
    """What the user can mend: printed as one sentence, exit code 2."""


def spread(values: Sequence[float]) -> dict[str, Any]:
    """Median and 20th and 80th percentile of `values`, their number, and themselves in their order."""
    cuts = statistics.quantiles(values, n=5, method="inclusive") if len(values) > 1 else [values[0]] * 4
    return {
        "median": statistics.median(values), "p20": cuts[0], "p80": cuts[3], "n": len(values), "values": list(values)
    }  # fmt: skip


def median(measure: Any) -> float | None:
    """The number of a measure, whether it is one or a spread; None of None."""
    if isinstance(measure, Mapping):
        return float(measure["median"])
    return None if measure is None else float(measure)


def environment(device: str | None = None) -> dict[str, Any]:
    """Commit, versions, device and threads of this run. `device`: "cpu" or "cuda"; default: a GPU where there is one.

    Where the source is no git repository the commit is what SLORA_COMMIT says, with "-dirty" behind it if it was.
    """
    packages: dict[str, str | None] = {}
    for name in PACKAGES:
        try:
            packages[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            packages[name] = None
    commit, dirty = _commit()
    return {
        "commit": commit,
        "dirty": dirty,
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "python": platform.python_version(),
        "packages": packages,
        "cuda": torch.version.cuda,
        "device": device_name(device),
        "threads": torch.get_num_threads(),
    }


def source(environment: Mapping[str, Any]) -> str:
    """The commit that was measured, in words."""
    commit, dirty = environment["commit"], environment["dirty"]
    if not commit:
        return "unknown commit" + " with changes" * bool(dirty)
    return f"commit {commit[:10]}" + (", perhaps with changes" if dirty is None else " with changes" * dirty)


def device_name(device: str | None = None) -> str:
    """The GPU's name, or the processor's. `device`: "cpu" or "cuda"; default: a GPU where there is one."""
    if device != "cpu" and torch.cuda.is_available():
        return torch.cuda.get_device_name()
    for line in Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else ():
        if line.startswith("model name"):
            return f"{line.split(':', 1)[1].strip()} ({torch.get_num_threads()} threads)"
    return f"{platform.processor() or platform.machine()} ({torch.get_num_threads()} threads)"


def folder_name(device: str) -> str:
    """The folder of results for `device`: "cpu", or the GPU's name in lower case, such as "nvidia-h200"."""
    if device == "cpu":
        return "cpu"
    return re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def write_result(case: str, device: str, payload: dict[str, Any], folder: Path | None = None) -> Path:
    """Write `<case>.json` into `folder`, by default `results/<device>`, atomically, and return its path."""
    path = (RESULTS / device if folder is None else folder) / f"{case}.json"
    header = {"schema": SCHEMA, "case": case, "device": device}
    given = {} if "environment" in payload else {"environment": environment("cpu" if device == "cpu" else None)}
    write_json(path, {**header, **given, **payload})
    return path


def read_result(path: Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        BenchmarkError: it is missing, no JSON, of another schema, or not of the form above.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise BenchmarkError(f"{path} does not exist; `python -m benchmarks run` writes result files") from None
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{path} is not readable JSON ({error}); run the case again") from error
    if not isinstance(content, dict) or not {"schema", "case"} <= content.keys():
        raise BenchmarkError(f"{path} is no result file: it has no schema number; run the case again")
    if content["schema"] != SCHEMA:
        raise BenchmarkError(
            f"{path} has schema {content['schema']!r}, this version reads {SCHEMA!r}; "
            f"run the case {content['case']!r} again"
        )
    missing = fault(content)
    if missing:
        raise BenchmarkError(f"{path} is damaged: {missing}; run the case {content['case']!r} again")
    return content


def require_writable(folder: Path) -> None:
    """Find out before anything is measured whether files can be written into `folder`, which need not exist yet.

    Raises:
        BenchmarkError: they cannot.
    """
    there = folder.absolute()
    while not there.exists():
        there = there.parent
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        reason = error.strerror if there.is_dir() else f"{there} is no folder"
        raise BenchmarkError(f"{folder} cannot be written into ({reason}); choose another folder") from error


def results_in(folder: Path) -> dict[str, dict[str, Any]]:
    """The cases that `folder` holds, by name. Files without rows are another program's, such as the static audit's.

    Raises:
        BenchmarkError: a file is of another schema.
    """
    found = {}
    for path in sorted(folder.glob("*.json")):
        result = read_result(path)
        if "rows" in result:
            found[str(result["case"])] = result
    return found


def _commit() -> tuple[str | None, bool | None]:
    """The commit, and whether the source was another; None for what is not known."""
    told = os.environ.get("SLORA_COMMIT", "").strip()
    if told:
        return told.removesuffix("-dirty"), told.endswith("-dirty")
    found = (_git("rev-parse", "--show-toplevel", "HEAD") or "").splitlines()
    # The commit of a repository that a copy of the source merely lies in says nothing.
    if len(found) != 2 or Path(found[0]).resolve() != ROOT:
        return None, None
    besides = [f":(exclude){path}" for path in OUTPUTS]
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", *besides)
    new = _git("ls-files", "--others", "--exclude-standard", "--", *SOURCES, *besides)
    return found[1], None if changed is None or new is None else bool(changed or new)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
