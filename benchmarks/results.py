"""Result files: what a run measured, on what device, from which source; and running one case into one file.

    {"schema": 2, "case": ..., "device": ..., "complete": true, "environment": {...}, "settings": {...},
     "ceilings": {...}, "rows": [{"point": {...}, "contender": ..., <measures>}, ...]}

A row is one implementation at one point of the case's grid. A measure is a number, or the spread of repetitions:
{"median", "p20", "p80", "n", "values"}, of which older files lack "values". Times are in seconds. A row without times
has a reason: "skipped" (it cannot run here), "failed" (it raised), or "refused" (its result was wrong). "ceilings" is
the roofline that the run measured. `complete` is false where a run stopped before the end of its grid.
"""

from __future__ import annotations

import datetime
import importlib
import json
import math
import os
import platform
import re
import statistics
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import torch

from benchmarks import roofline
from benchmarks.timing import FEWEST_ROUNDS, ORDER_SEED, first_line, ieee_fp32, release
from slora.io.atomic import write_json

SCHEMA = 2
ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results"
# What decides a measurement; of these folders the outputs of `run` and `report` are left out.
SOURCES = ("slora", "kernels", "csrc", "benchmarks", "setup.py", "pyproject.toml")
OUTPUTS = ("benchmarks/README.md", "benchmarks/figures", "benchmarks/results")
PACKAGES = ("torch", "torchvision", "triton", "timm", "peft", "transformers", "open_clip_torch")
NOT_MEASURED = "not measured"
# Measures in seconds.
TIMES = {"seconds", "device_seconds", "forward", "forward_backward", "eager"}
# A row with one of these has no times: it has the reason.
NO_TIMES = ("skipped", "failed", "refused")

Row = dict[str, Any]


class BenchmarkError(Exception):
    """What the user can change: printed as one sentence, exit code 2."""


class Missing(BenchmarkError):
    """An implementation cannot run here; its rows are "skipped" with the reason."""


class Wrong(Exception):
    """An implementation computes something else; its rows are "refused" with the reason, and have no times."""


def need(package: str, remedy: str = "install it, or leave out what needs it") -> Any:
    """Import `package`.

    Raises:
        Missing: it is not installed, or does not import.
    """
    try:
        return importlib.import_module(package)
    except Exception as error:
        # Not only ImportError: a package that does not fit this torch fails in many ways.
        raise Missing(f"{package} cannot be imported ({first_line(error)}); {remedy}") from error


@contextmanager
def reason_in(*rows: Row) -> Iterator[None]:
    """Catch what is raised inside, and put it as the reason into those of `rows` without a time or a reason."""
    try:
        yield
    except Exception as error:
        state = {Missing: "skipped", Wrong: "refused"}.get(type(error), "failed")
        for row in rows:
            if not row.keys() & {*NO_TIMES, "seconds", "forward_backward"}:
                row[state] = first_line(error) if state == "failed" else str(error)


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


def environment(device: str) -> dict[str, Any]:
    """Commit, versions, device ("cpu" or "cuda") and threads of this run.

    Where the source is no git repository the commit is what SLORA_COMMIT says, followed by "-dirty" if it was changed.
    """
    packages = {}
    for name in PACKAGES:
        with suppress(metadata.PackageNotFoundError):
            packages[name] = metadata.version(name)
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


def device_name(device: str) -> str:
    """The name of the GPU ("cuda") or of the processor ("cpu")."""
    if device != "cpu":
        return torch.cuda.get_device_name()
    cpuinfo = Path("/proc/cpuinfo")
    found = re.search(r"^model name\s*: (.*)$", cpuinfo.read_text() if cpuinfo.exists() else "", re.MULTILINE)
    name = found[1].strip() if found else platform.processor() or platform.machine()
    return f"{name} ({torch.get_num_threads()} threads)"


def folder_name(device: str) -> str:
    """The folder of results for `device`: "cpu", or the GPU's name in lower case, such as "nvidia-h200"."""
    return "cpu" if device == "cpu" else re.sub(r"[^a-z0-9]+", "-", device_name(device).lower()).strip("-")


def write_result(case: str, device: str, payload: dict[str, Any], folder: Path) -> Path:
    """Write `<case>.json` into `folder`, atomically, and return its path."""
    path = folder / f"{case}.json"
    write_json(path, {"schema": SCHEMA, "case": case, "device": device, **payload})
    return path


def read_result(path: Path) -> dict[str, Any]:
    """Read a result file.

    Raises:
        BenchmarkError: it is missing, no JSON, or of another schema.
    """
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (FileNotFoundError, IsADirectoryError):
        what = "is a folder" if path.is_dir() else "does not exist"
        raise BenchmarkError(f"{path} {what}; `python -m benchmarks run` writes result files") from None
    except (OSError, ValueError) as error:
        raise BenchmarkError(f"{path} is not readable JSON ({error}); run the case again") from error
    schema = content.get("schema") if isinstance(content, dict) else None
    if schema != SCHEMA:
        raise BenchmarkError(f"{path} has schema {schema!r}, this version reads {SCHEMA}; run the case again")
    result: dict[str, Any] = content
    return result


def results_in(folder: Path) -> dict[str, dict[str, Any]]:
    """The result files with rows in `folder`, by the name of the case; raises as `read_result`."""
    results = map(read_result, sorted(folder.glob("*.json")))
    return {str(result["case"]): result for result in results if "rows" in result}


def made(folder: Path) -> Path:
    """Create `folder` before anything is measured, and return it.

    Raises:
        BenchmarkError: it cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise BenchmarkError(f"{folder} cannot be created ({error.strerror}); choose another folder") from error
    return folder


def _commit() -> tuple[str | None, bool | None]:
    """The commit, and whether the source differs from it; None for what is not known."""
    stated = os.environ.get("SLORA_COMMIT", "").strip()
    if stated:
        return stated.removesuffix("-dirty"), stated.endswith("-dirty")
    found = (_git("rev-parse", "--show-toplevel", "HEAD") or "").splitlines()
    # The commit of a repository that merely contains a copy of the source says nothing.
    if len(found) != 2 or Path(found[0]).resolve() != ROOT:
        return None, None
    changes = _git("status", "--porcelain", "--", *SOURCES, *(f":(exclude){path}" for path in OUTPUTS))
    return found[1], None if changes is None else bool(changes)


def _git(*arguments: str) -> str | None:
    try:
        done = subprocess.run(["git", *arguments], cwd=ROOT, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def process_began() -> float:
    """When this process started, imports included, on the clock of `time.monotonic`; now where that is not known."""
    stat = Path("/proc/self/stat")
    if not stat.exists():
        return time.monotonic()
    # Field 22 of the line, counted from after the program's name, which may have blanks: ticks since boot.
    ticks = int(stat.read_text().rpartition(")")[2].split()[19])
    return time.monotonic() - (time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK"))


class Settings(NamedTuple):
    """What the command line asks for.

    Attributes:
        grid: "tiny" only shows that the code runs, "quick" touches every kind of point, "default" covers the targets.
        only: parts of the names of implementations; empty: all.
        until: when to begin no new point, on the clock of `time.monotonic`.
    """

    device: str = "cpu"
    grid: str = "default"
    only: tuple[str, ...] = ()
    until: float = math.inf

    @property
    def on_gpu(self) -> bool:
        """Whether a GPU is measured."""
        return self.device == "cuda"

    def repetitions(self, usual: int) -> int:
        """How many rounds to take where `usual` would do."""
        return max(FEWEST_ROUNDS, {"tiny": 0, "quick": usual // 2}.get(self.grid, usual))

    def wanted(self, implementation: str) -> bool:
        """Whether this implementation takes part."""
        return not self.only or any(part in implementation for part in self.only)

    def left(self) -> float:
        """Seconds that are left."""
        return max(0.0, self.until - time.monotonic())


class Case(NamedTuple):
    """A case. `benchmarks/cases/<module>.py` has its `grid(settings, name)` and how a point is measured."""

    module: str
    summary: str
    devices: tuple[str, ...] = ("cpu", "cuda")


CASES = {
    "linear": Case("linear", "one linear layer: forward, and forward with backward, per shape, beside every peer"),
    "train_step": Case("model", "one training step of a whole model, beside PEFT, full and frozen"),
    "merge": Case("merge", "folding LoRA into all linear layers of a ViT-L/16, beside PEFT and a copy"),
    "inference": Case("model", "a forward: base, merged, unmerged, PEFT merged and unmerged"),
    "gates": Case("model", "a training step under each policy for inactive blocks"),
    "host": Case("host", "host time per layer: tiny tensors on one thread of the CPU", ("cpu",)),
}


def run_case(name: str, settings: Settings, folder: Path | None = None) -> Path:
    """Run a case and write `<name>.json` into `folder`, by default the device's under `results/`; return its path.

    An interrupted run leaves the file that was there. Where time is limited, the file is written after every point,
    marked incomplete until the end; the first point is measured in any case.

    Raises:
        BenchmarkError: it is not measured on the device, the folder cannot be created, or nothing was measured; or the
            file is written, and an implementation in it failed or was wrong.
    """
    if settings.device not in CASES[name].devices:
        raise BenchmarkError(f"case {name!r} is not measured on {settings.device}; leave it out")
    if settings.on_gpu and not torch.cuda.is_available():
        raise BenchmarkError("no CUDA GPU is visible (torch.cuda.is_available() is False); use --device cpu")
    device, case = folder_name(settings.device), importlib.import_module(f"benchmarks.cases.{CASES[name].module}")
    folder = made(RESULTS / device if folder is None else folder)
    # What a case that failed before this one has left.
    release(settings.device)
    ieee_fp32()
    rates, rows = roofline.measure(settings.device, settings.grid, settings.repetitions(7)), list[Row]()
    asked = {"grid": settings.grid, "only": list(settings.only), "order_seed": ORDER_SEED}
    payload = {"environment": environment(settings.device), "settings": asked, "ceilings": rates, "rows": rows}
    complete = True
    for i, point in enumerate(case.grid(settings, name)):
        complete = i == 0 or settings.left() > 0
        if not complete:
            break
        rows += case.measure(point, settings, rates, name)
        if settings.until < math.inf:
            write_result(name, device, {"complete": False, **payload}, folder)
    if not rows:
        raise BenchmarkError(f"case {name!r} measured nothing: no implementation has {settings.only} in its name")
    path = write_result(name, device, {"complete": complete, **payload}, folder)
    words = {"refused": "a wrong result was not timed", "failed": "an implementation failed"}
    errors = [f"{words[state]}: {row['contender']} at {row['point']}: {row[state]}"
              for state in words for row in rows if state in row]  # fmt: skip
    if errors:
        raise BenchmarkError(f"{path}: {'; '.join(errors)}")
    return path
