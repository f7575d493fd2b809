"""One result file: what was measured, on what, from which state of the source.

    {"schema": 2, "case": ..., "device": ..., "complete": true, "environment": {...}, "settings": {...},
     "ceilings": {...}, "rows": [{"point": {...}, "contender": ..., <measures>}, ...]}

A row is one contender at one point of the case's grid. A measure is a number, or the spread of repetitions:
{"median", "p20", "p80", "n", "values"}, of which older files lack "values". A contender that could not run has
"skipped" and the reason, one that raised "failed", one whose result was wrong "refused"; none of these has times.
`complete` is false where a run met the end of its time before the end of its grid.
"""

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

from slora.files import write_json

RESULTS = Path(__file__).parent / "results"
SCHEMA = 2
# Measures that are spreads or numbers, wherever they occur.
TIMES = {"seconds", "device_seconds", "forward", "forward_backward", "eager"}
MEASURES = TIMES | {
    "peak_memory_mib", "added_memory_mib", "flops", "bytes", "compulsory_bytes", "flops_per_s", "peak_over_outputs",
    "launches", "deterministic", "percent_of_gemm", "percent_of_copy", "predicted", "deviation", "update_deviation",
    "images_per_second", "tokens_per_second",
}  # fmt: skip
NOT_MEASURED = "not measured"
PACKAGES = ("torch", "triton", "timm", "peft", "transformers", "open_clip_torch")


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
    commit = environment["commit"]
    return (f"commit {commit[:10]}" if commit else "unknown commit") + " with changes" * bool(environment["dirty"])


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
            f"{path} has schema {content['schema']}, this version reads {SCHEMA}; "
            f"run the case {content['case']!r} again"
        )
    missing = fault(content)
    if missing:
        raise BenchmarkError(f"{path} is damaged: {missing}; run the case {content['case']!r} again")
    return content


def fault(content: Mapping[str, Any]) -> str | None:
    """What is wrong with a file of measurements or of the proof's parts, None where nothing is."""
    if "rows" not in content and "parts" not in content:
        return None
    about = content.get("environment")
    known = {"commit", "dirty", "date", "device", "packages"}
    if not isinstance(about, dict) or not isinstance(about.get("packages", {}), dict) or not known <= about.keys():
        return f"its environment lacks one of {', '.join(sorted(known))}"
    if not isinstance(content["case"], str):
        return "its case is no text"
    for name, allowed in (("commit", str | None), ("date", str), ("device", str)):
        if not isinstance(about[name], allowed):
            return f"{name} in its environment is no text"
    if not _are_ceilings(content.get("ceilings", {})):
        return "its ceilings are no numbers under copy_bytes_per_s and gemm_flops_per_s"
    if "rows" not in content:
        parts = content["parts"]
        whole = isinstance(parts, dict) and all(
            isinstance(part, dict) and "state" in part and _is_number(part.get("seconds")) for part in parts.values()
        )
        return None if whole else "a part has no state or no seconds"
    return _fault_of_rows(content["rows"])


def _are_ceilings(ceilings: Any) -> bool:
    """Whether a file has the rates of its run, or none at all."""
    if not isinstance(ceilings, dict) or not isinstance(ceilings.get("gemm_flops_per_s", {}), dict):
        return False
    rates = [ceilings.get("copy_bytes_per_s"), *ceilings.get("gemm_flops_per_s", {None: None}).values()]
    return not ceilings or all(map(_is_number, rates))


def _fault_of_rows(rows: Any) -> str | None:
    if not isinstance(rows, list):
        return "its rows are no list"
    for i, row in enumerate(rows):
        if (
            not isinstance(row, dict)
            or not isinstance(row.get("point"), dict)
            or not isinstance(row.get("contender"), str)
        ):
            return f"row {i} has no point or no contender"
        if not isinstance(row.get("form", ""), str):
            return f"row {i} has no text in 'form'"
        for name in sorted(row.keys() & MEASURES):
            if not all(map(_is_number, _numbers(row[name]))):
                return f"row {i} has no numbers in {name!r}"
    return None


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float)


def _numbers(measure: Any) -> list[Any]:
    """What has to be numbers in a measure."""
    if not isinstance(measure, dict):
        return [measure]
    values = measure.get("values", [measure.get("median")])
    return [
        *(measure.get(key) for key in ("median", "p20", "p80", "n")),
        *(values if isinstance(values, list) else [None]),
    ]


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
    told = os.environ.get("SLORA_COMMIT", "").strip()
    if told:
        return told.removesuffix("-dirty"), told.endswith("-dirty")
    commit = _git("rev-parse", "HEAD")
    if commit is None:
        return None, None
    # Results that this very run has written do not change what was measured.
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":(exclude)benchmarks/results")
    return commit, bool(changed)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(
            ["git", *arguments], cwd=Path(__file__).parents[1], capture_output=True, text=True, timeout=20
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None
