"""The steps of the GPU validation: each runs a command of its own and returns its state.

A state has "state" ("ok", "failed", "cut" at its limit, "skipped"), "reason" where something is wrong or left out,
"last_lines" of what failed, and what the step found, such as "counts" of tests and candidates.
"""

from __future__ import annotations

import contextlib
import csv
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import torch

from benchmarks.results import ROOT, folder_name, read_result, write_result

State = dict[str, Any]
# What a case, or pytest after an interrupt, has to end by itself before it is killed.
GRACE = 6.0
# With less than this nothing is begun.
LEAST = 3.0
TIME_UP = "the time was up"
# Of ncu: time, throughput of the SMs and of memory, bytes, registers, occupancy.
METRICS = """gpu__time_duration.sum sm__throughput.avg.pct_of_peak_sustained_elapsed
gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed dram__bytes_read.sum dram__bytes_write.sum
launch__registers_per_thread sm__warps_active.avg.pct_of_peak_sustained_active""".split()


@dataclass
class Validation:
    """One run: where it writes, how it was asked for, and what the steps have found so far."""

    out: Path
    scratch: Path
    dry: bool
    stage: str
    about: dict[str, Any] = field(default_factory=dict)
    states: dict[str, State] = field(default_factory=dict)
    results: dict[str, dict[str, Any]] = field(default_factory=dict)
    """The result files that this run has written, by case."""

    @property
    def name(self) -> str:
        """Of the files that each stage has for itself, <name>.json and <name>.log."""
        return f"gpu-{self.stage}"

    @property
    def log(self) -> Path:
        """What every command prints."""
        return self.out / f"{self.name}.log"

    @property
    def device(self) -> str:
        """What the cases run on."""
        return "cpu" if self.dry else "cuda"

    @property
    def choices(self) -> Path:
        """The folder in which slora remembers which kernels were the fastest."""
        return self.scratch / "choices"

    @property
    def environ(self) -> dict[str, str]:
        """The environment of every command: caches in a folder that is removed."""
        # The steps choose the backend themselves. Bytecode of what torch imports takes seconds to compile: once.
        left_out = ("SLORA_BACKEND", "PYTHONDONTWRITEBYTECODE")
        environ = {name: value for name, value in os.environ.items() if name not in left_out}
        folders = {"PYTHONPYCACHEPREFIX": "pyc", "TRITON_CACHE_DIR": "triton", "TORCHINDUCTOR_CACHE_DIR": "inductor"}
        environ |= {name: str(self.scratch / folder) for name, folder in folders.items()}
        environ |= {"SLORA_CACHE": str(self.choices), "PYTHONUNBUFFERED": "1", "HF_HUB_OFFLINE": "1"}
        if Path("/usr/local/cuda").exists():
            environ.setdefault("CUDA_HOME", "/usr/local/cuda")
        if self.dry:
            environ |= {"TRITON_INTERPRET": "1", "TORCH_COMPILE_DISABLE": "1", "CUDA_VISIBLE_DEVICES": "",
                        "OMP_NUM_THREADS": "1"}  # fmt: skip
        return environ

    def call(
        self, command: Sequence[str | Path], limit: float, grace: float = 0.0, environ: Mapping[str, str] | None = None
    ) -> tuple[int | None, str]:
        """Run a command and return its exit code, None where it was cut at `limit`, and what it printed.

        Its output goes to the log as it comes. It is interrupted `grace` seconds before it is killed.
        """
        with open(self.log, "ab") as file:
            file.write(f"\n$ {' '.join(map(str, command))}\n".encode())
            file.flush()
            start = file.tell()
            process = subprocess.Popen(
                [str(word) for word in command], cwd=ROOT, env={**self.environ, **(environ or {})},
                stdin=subprocess.DEVNULL, stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                code: int | None = process.wait(max(0.1, limit - grace))
            except subprocess.TimeoutExpired:
                code = None
                with contextlib.suppress(subprocess.TimeoutExpired, ProcessLookupError):
                    if grace:
                        os.killpg(process.pid, signal.SIGINT)
                        process.wait(grace)
            finally:
                # The whole group: a case has compilers and processes of its own.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return code, self.log.read_bytes()[start:].decode(errors="replace")

    def write(self) -> None:
        """Write the state of every step, and the measured choices of kernels."""
        content = {"environment": self.about, "parts": self.states}
        with contextlib.suppress(OSError, ValueError):
            content["choices"] = {file.name: json.loads(file.read_text()) for file in self.choices.glob("*.json")}
        write_result(self.name, folder_name(self.device), content, self.out)


Run = Callable[[Validation, float], State]


def state_of(code: int | None, text: str) -> State:
    """How a command ended, with its last lines where that was not well."""
    if code == 0:
        return {"state": "ok"}
    last = [line for line in text.splitlines() if line.strip()][-8:]
    return {"state": "cut" if code is None else "failed", "exit_code": code, "last_lines": last}


def build(run: Validation, limit: float) -> State:
    """Build the extension in place for this GPU, and say what it is; "failed" where it cannot merge on one."""
    until = time.monotonic() + limit
    environ = {"SLORA_SKIP_EXT": "1"}
    if not run.dry:
        environ = {"TORCH_CUDA_ARCH_LIST": "{}.{}".format(*torch.cuda.get_device_capability())}
    code, text = run.call([sys.executable, "setup.py", "build_ext", "--inplace"], limit, environ=environ)
    state = state_of(code, text)
    ask = "import json, slora; print(json.dumps(slora.merging.extension_info()))"
    code, text = run.call([sys.executable, "-c", ask], max(LEAST, until - time.monotonic()))
    extension = json.loads(text.splitlines()[-1]) if code == 0 else {"reason": "what was built is not known"}
    if not run.dry and not extension.get("cuda"):
        state |= {"state": "failed", "reason": extension.get("reason") or "slora._C was built without CUDA"}
    return state | {"extension": extension}


def candidates(run: Validation, limit: float) -> State:
    """Check every candidate of the kernels.

    On an H200 that is about 150 candidates of some 60 kernels, each compiled in 2 to 10 s on one core: a minute on 16
    cores.
    """
    command = [sys.executable, "-m", "benchmarks.candidates", run.out, "--device", run.device]
    state, content = written(run, "candidates", [*command, "--seconds", f"{max(1.0, limit - GRACE):.0f}"], limit)
    entries = content["candidates"] if content else []
    state["counts"] = dict(Counter(entry["state"] for entry in entries))
    return state


def case(name: str) -> Run:
    """A step that runs one case; what it has measured when it is cut is in its file."""

    def run_case(run: Validation, limit: float) -> State:
        # Without GPU the first point shows that it runs.
        grid, seconds = ("tiny", 0.0) if run.dry else ("quick", max(1.0, limit - GRACE))
        command = [sys.executable, "-m", "benchmarks", "run", "--case", name, "--device", run.device, "--grid", grid]
        command += ["--seconds", f"{seconds:.0f}", "--out", str(run.out)]
        state, result = written(run, name, command, limit)
        if result:
            run.results[name] = result
            if not result["complete"]:
                state["reason"] = f"without the rest of its grid: {TIME_UP}"
        return state

    return run_case


def written(run: Validation, name: str, command: Sequence[Any], limit: float) -> tuple[State, dict[str, Any] | None]:
    """How a command ended, and the result file that it has written; one that was there before is another run's."""
    path = run.out / f"{name}.json"
    before = path.stat().st_mtime_ns if path.exists() else None
    state = state_of(*run.call(command, limit))
    new = path.exists() and path.stat().st_mtime_ns != before
    return state, read_result(path) if new else None


def tests(run: Validation, limit: float) -> State:
    """The tests marked `gpu`. Only files that hold such tests are collected."""
    report = run.scratch / "tests.xml"
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--no-header", "-p", "no:cacheprovider",
               "--continue-on-collection-errors", f"--junitxml={report}"]  # fmt: skip
    if find_spec("xdist") and not run.dry:
        command += ["-n", str(min(8, os.cpu_count() or 1))]
    # Wide enough for what a failed test says in its last lines.
    state = state_of(*run.call([*command, *gpu_files()], limit, GRACE, {"COLUMNS": "300"}))
    if not report.exists():
        return state | {"reason": "pytest has written no report"}
    suite = next(ElementTree.parse(report).iter("testsuite"))
    counts = {kind: int(suite.get(kind, 0)) for kind in ("failures", "errors", "skipped")}
    state["counts"] = {"passed": int(suite.get("tests", 0)) - sum(counts.values()), **counts}
    if state["state"] == "ok" and not state["counts"]["passed"] and not run.dry:
        state |= {"state": "failed", "reason": "no test passed"}
    return state


def gpu_files() -> list[str]:
    """Test files that mark a test `gpu`, by themselves or by parameters in the conftest.py beside them."""
    marking = [path for path in (ROOT / "tests").rglob("*.py") if "mark.gpu" in path.read_text(encoding="utf-8")]
    files = {
        file for path in marking for file in (path.parent.glob("test_*.py") if path.stem == "conftest" else [path])
    }
    return sorted(file.relative_to(ROOT).as_posix() for file in files)


def profile(run: Validation, limit: float) -> State:
    """What ncu says of the main kernels."""
    tool = find_tool("ncu")
    if tool is None:
        return {"state": "skipped", "reason": "ncu was not found"}
    # From the program's own start of the profiler on: neither random numbers nor what warms up is of interest.
    command = [tool, "--clock-control", "none", "--profile-from-start", "off", "--launch-count", "40",
               "--csv", "--page", "raw", "--metrics", ",".join(METRICS),
               sys.executable, "-m", "benchmarks.sanitizer_runs", "profile"]  # fmt: skip
    code, text = run.call(command, limit)
    kernels = profiled(text)
    seen = len(kernels) > 1
    said = [line for line in text.splitlines() if "ERROR" in line][-1:]
    if not seen and said and "ERR_NVGPUCTRPERM" in said[0]:
        return {"state": "skipped", "reason": f"this machine lets only its administrator profile: {said[0]}"}
    state = state_of(code, text) | {"kernels": kernels}
    return state if seen else state | {"state": "failed", "reason": (said or ["ncu saw no kernel"])[0]}


def profiled(text: str) -> list[dict[str, str]]:
    """ncu's CSV: an entry of units, then one per kernel."""
    _, head, table = text.partition('"ID"')
    rows = [row for row in csv.DictReader((head + table).splitlines()) if not row["ID"].startswith("==")]
    return [{name: row.get(name, "") for name in ("Kernel Name", "Grid Size", "Block Size", *METRICS)} for row in rows]


def find_tool(name: str) -> str | None:
    """A tool of the CUDA toolkit, on PATH or where the toolkit usually is."""
    return shutil.which(name) or shutil.which(name, path=f"{os.environ.get('CUDA_HOME', '/usr/local/cuda')}/bin")


STEPS: dict[str, Run] = {
    "build": build,
    "candidates": candidates,
    "tests": tests,
    "profile": profile,
    **{name: case(name) for name in ("linear", "merge", "train_step")},
}
