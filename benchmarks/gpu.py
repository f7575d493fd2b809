"""The proof on a GPU, in one command: build, tests, cases, sanitizer, profile, and which bars are met.

    python -m benchmarks gpu [--quick] [--out FOLDER] [--parts NAME ...]

Every part is a process of its own with an end of its own: part i has to end when the shares of parts 1 to i are used
up, so what one part leaves is the next one's. A part that fails or is cut costs the others nothing. The order is that
of importance. Written are at most eight files: one per case, `proof.json` (the state of every part) and `gpu.log`.
Nothing is written elsewhere but the extension that is built in place, and temporary files that are removed.
"""

from __future__ import annotations

import argparse
import contextlib
import csv
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks import bars
from benchmarks.record import RESULTS, BenchmarkError, environment, folder_name, read_result, write_result

ROOT = Path(__file__).parents[1]
SECONDS, QUICK_SECONDS, DRY_SECONDS = 530.0, 88.0, 900.0
# Of the time of a case: what its start takes, and what is left to it to end in order before it is killed.
START, GRACE = 12.0, 6.0
METRICS = {
    "gpu__time_duration.sum": "duration",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "compute_percent",
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed": "memory_percent",
    "dram__bytes_read.sum": "bytes_read",
    "dram__bytes_write.sum": "bytes_written",
    "launch__registers_per_thread": "registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
}


@dataclass
class Proof:
    """One run: where it writes, how it was asked for, and what the parts have said so far."""

    out: Path
    dry: bool
    quick: bool
    ends: float
    environ: dict[str, str]
    parts: dict[str, dict[str, Any]] = field(default_factory=dict)
    about: dict[str, Any] = field(default_factory=dict)

    @property
    def device(self) -> str:
        """What the cases run on."""
        return "cpu" if self.dry else "cuda"

    def call(self, command: Sequence[str | Path], limit: float, **environ: str) -> tuple[int | None, str]:
        """Run a command and return its exit code, None where it was cut at `limit`, and what it printed.

        Its output goes to `gpu.log` as it comes.
        """
        log = self.out / "gpu.log"
        with open(log, "ab") as file:
            file.write(f"\n$ {' '.join(map(str, command))}\n".encode())
            file.flush()
            start = file.tell()
            process = subprocess.Popen(
                [str(word) for word in command], cwd=ROOT, env={**self.environ, **environ}, stdin=subprocess.DEVNULL,
                stdout=file, stderr=subprocess.STDOUT, start_new_session=True,
            )  # fmt: skip
            try:
                code: int | None = process.wait(timeout=max(0.1, limit))
            except subprocess.TimeoutExpired:
                code = None
            finally:
                # The whole group: a case has compilers and processes of its own.
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)
                process.wait()
        return code, log.read_bytes()[start:].decode(errors="replace")

    def write(self) -> None:
        """Write the state of all parts."""
        rows = {"environment": self.about, "parts": self.parts, "time": "wall clock of each part, in seconds"}
        write_result("proof", folder_name(self.device), rows, self.out)


State = dict[str, Any]
Run = Callable[[Proof, float], State]


def state_of(code: int | None, text: str) -> State:
    """How a command ended, with its last lines where that was not well."""
    if code == 0:
        return {"state": "ok"}
    last = [line for line in text.splitlines() if line.strip()][-8:]
    return {"state": "cut" if code is None else "failed", "exit_code": code, "last_lines": last}


def build(proof: Proof, limit: float) -> State:
    """Build the extension in place, for this GPU only, and say what it is."""
    environ = {"SLORA_SKIP_EXT": "1"} if proof.dry else {"TORCH_CUDA_ARCH_LIST": architecture()}
    code, text = proof.call([sys.executable, "setup.py", "build_ext", "--inplace"], limit, **environ)
    state = state_of(code, text)
    ask = "import json, slora; print(json.dumps(slora.merging.extension_info()))"
    asked, answer = proof.call([sys.executable, "-c", ask], 60.0)
    if asked == 0:
        state["extension"] = json.loads(answer.splitlines()[-1])
    return state


def architecture() -> str:
    """This GPU's, as torch spells it."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def tests(proof: Proof, limit: float) -> State:
    """The tests marked `gpu`; counts and the names of those that failed are read from what was printed."""
    several = ["-n", "4"] if find_spec("xdist") and not proof.dry else []
    where = ["tests/benchmarks/test_timing.py"] if proof.dry else []
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--no-header", "-p", "no:cacheprovider",
               "--continue-on-collection-errors", *several, *where]  # fmt: skip
    code, text = proof.call(command, limit)
    # 5: nothing was collected, which a dry run may do.
    state = state_of(0 if code == 5 and proof.dry else code, text)
    state["counts"] = {
        word.lower(): len(set(outcomes(text, word))) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")
    }
    state["failed"] = sorted({*outcomes(text, "FAILED"), *outcomes(text, "ERROR")})[:40]
    return state


def outcomes(text: str, word: str) -> list[str]:
    """Names of tests that ended with `word`, in pytest's verbose output, in one process or in several."""
    one = re.findall(rf"^(\S+\.py\S*(?: \S+)*?) {word}\b", text, re.M)
    return one + re.findall(rf"^\[gw\d+\](?: \[ *\d+%\])? {word} (\S+\.py.*?)\s*$", text, re.M)


def case(name: str) -> Run:
    """A part that runs one case; what it has measured when it is cut is in its file."""

    def run(proof: Proof, limit: float) -> State:
        grid = ["--grid", "tiny"] if proof.dry else ["--quick"] if proof.quick else []
        seconds = f"{max(1.0, limit - GRACE - START):.0f}"
        command = [sys.executable, "-m", "benchmarks", "run", "--case", name, "--device", proof.device,
                   "--keep-partial", "--seconds", seconds, "--out", proof.out, *grid]  # fmt: skip
        code, text = proof.call(command, limit)
        state = state_of(code, text)
        path = proof.out / f"{name}.json"
        if path.exists():
            result = read_result(path)
            state["complete"] = result["complete"]
            state["rows"] = len(result["rows"])
            for word in ("skipped", "failed", "refused"):
                reasons = sorted({f"{row['contender']}: {row[word]}" for row in result["rows"] if word in row})
                if reasons:
                    state[word] = reasons
        return state

    return run


def sanitizer(proof: Proof, limit: float) -> State:
    """compute-sanitizer on small runs of the merge and the kernels: memcheck, then racecheck."""
    tool = found("compute-sanitizer")
    if tool is None:
        return {"state": "skipped", "reason": "compute-sanitizer was not found"}
    runs: dict[str, Any] = {}
    until = time.monotonic() + limit
    for check, share in (("memcheck", 0.5), ("racecheck", 1.0)):
        left = (until - time.monotonic()) * share
        if left < 3:
            runs[check] = {"state": "skipped", "reason": "the time was up"}
            continue
        # One process for both: its start under the tool takes longer than what it checks.
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.small", "all"]
        # Without the allocator's own pools an access past a tensor is one past an allocation.
        runs[check] = state_of(*proof.call(command, left, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))
    states = [run["state"] for run in runs.values()]
    return {"state": next((s for s in ("failed", "cut", "skipped") if s in states), "ok"), "runs": runs}


def profile(proof: Proof, limit: float) -> State:
    """The choices that measurement made, and what ncu says of the main kernels."""
    cache = Path(proof.environ["SLORA_CACHE"])
    state: State = {"choices": {file.name: json.loads(file.read_text()) for file in sorted(cache.glob("*.json"))}}
    tool = found("ncu")
    if tool is None:
        return {**state, "state": "skipped", "reason": "ncu was not found; the choices are here all the same"}
    # From the program's own start of the profiler on: neither random numbers nor what warms up is of interest.
    command = [tool, "--clock-control", "none", "--profile-from-start", "off", "--launch-count", "40",
               "--csv", "--page", "raw", "--metrics", ",".join(METRICS),
               sys.executable, "-m", "benchmarks.small", "profile"]  # fmt: skip
    code, text = proof.call(command, limit)
    return {**state, **state_of(code, text), "kernels": profiled(text)}


def profiled(text: str) -> list[dict[str, str]]:
    """ncu's CSV: one entry per kernel, each metric with its unit."""
    lines = [line for line in text.splitlines() if line.startswith('"')]
    if not lines or not lines[0].startswith('"ID"'):
        return []
    rows = list(csv.DictReader(lines))
    units = rows[0] if rows and not rows[0].get("ID") else {}
    return [
        {"kernel": row.get("Kernel Name", ""), "grid": row.get("Grid Size", ""), "block": row.get("Block Size", "")}
        | {short: f"{row[name]} {units.get(name, '')}".strip() for name, short in METRICS.items() if row.get(name)}
        for row in rows
        if row.get("ID")
    ]


def found(tool: str) -> str | None:
    """A tool of the CUDA toolkit, on PATH or where the toolkit usually is."""
    homes = [os.environ.get("CUDA_HOME"), "/usr/local/cuda"]
    folders = [os.environ.get("PATH", ""), *(f"{home}/bin" for home in homes if home)]
    return shutil.which(tool, path=os.pathsep.join(folders))


@dataclass(frozen=True)
class Part:
    """A part, what it is for, and its share of the time: of the whole proof, and of the quick one (0: left out)."""

    name: str
    run: Run
    seconds: float
    quick: float


PARTS = (
    Part("build", build, 60, 34),
    Part("tests", tests, 85, 12),
    Part("linear", case("linear"), 105, 18),
    Part("train_step", case("train_step"), 75, 12),
    Part("merge", case("merge"), 40, 12),
    Part("inference", case("inference"), 20, 0),
    Part("sanitizer", sanitizer, 80, 0),
    Part("profile", profile, 30, 0),
    Part("scaling", case("scaling"), 20, 0),
    Part("gates", case("gates"), 15, 0),
)


def chosen(args: argparse.Namespace) -> list[Part]:
    """The parts that are asked for, in their order.

    Raises:
        BenchmarkError: there is no such part.
    """
    names = [part.name for part in PARTS]
    unknown = [name for name in args.parts or () if name not in names]
    if unknown:
        raise BenchmarkError(f"part {unknown[0]!r} is unknown; there are {', '.join(names)}")
    if args.parts:
        return [part for part in PARTS if part.name in args.parts]
    return [part for part in PARTS if part.quick or not args.quick]


def prove(args: argparse.Namespace) -> int:
    """Run the parts, write what they say, print the table; 1 where a part failed or was cut, else 0.

    Raises:
        BenchmarkError: there is no GPU, or no such part.
    """
    began = time.monotonic()
    if not args.dry_run and not torch.cuda.is_available():
        raise BenchmarkError("no CUDA GPU is visible (torch.cuda.is_available() is False); --dry-run needs none")
    if args.dry_run and args.out is None:
        raise BenchmarkError("--dry-run measures nothing worth keeping; name a folder with --out")
    parts = chosen(args)
    shares = [part.quick if args.quick and not args.parts else part.seconds for part in parts]
    whole = args.seconds or (DRY_SECONDS if args.dry_run else QUICK_SECONDS if args.quick else SECONDS)
    device = "cpu" if args.dry_run else "cuda"
    out = (args.out or RESULTS / folder_name(device)).resolve()
    out.mkdir(parents=True, exist_ok=True)
    (out / "gpu.log").write_bytes(b"")
    with tempfile.TemporaryDirectory(prefix="slora-proof-") as scratch:
        proof = Proof(out, args.dry_run, args.quick, began + whole, environ_of(args.dry_run, Path(scratch)))
        proof.about = {**environment(device), **machine()}
        proof.write()
        # A `timeout` around the proof must not leave a part running.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            for i, part in enumerate(parts):
                end = began + whole * sum(shares[: i + 1]) / sum(shares)
                run_part(proof, part, end - time.monotonic())
        except KeyboardInterrupt:
            print("\nbenchmarks: interrupted; what was measured so far is kept", file=sys.stderr)
            proof.write()
            return 2
    finish(proof, time.monotonic() - began)
    return int(any(state["state"] in ("failed", "cut") for state in proof.parts.values()))


def run_part(proof: Proof, part: Part, limit: float) -> None:
    """Run one part, whatever happens in it, and write what it says."""
    print(f"{part.name}: at most {max(limit, 0):.0f} s", flush=True)
    start = time.monotonic()
    if limit < 3:
        state: State = {"state": "skipped", "reason": "the time was up"}
    else:
        try:
            state = part.run(proof, limit)
        except Exception as error:
            state = {"state": "failed", "reason": f"{type(error).__name__}: {error}"}
    proof.parts[part.name] = {**state, "seconds": round(time.monotonic() - start, 1)}
    proof.write()
    print(f"{part.name}: {state['state']} after {time.monotonic() - start:.0f} s {state.get('reason', '')}", flush=True)
    for line in state.get("last_lines", ())[-4:]:
        print(f"    {line[:200]}", flush=True)


def environ_of(dry: bool, scratch: Path) -> dict[str, str]:
    """The environment of every part: caches in a folder that is removed."""
    environ = {
        **os.environ,
        "PYTHONUNBUFFERED": "1",
        "PYTHONDONTWRITEBYTECODE": "1",
        "SLORA_CACHE": str(scratch / "choices"),
        "TRITON_CACHE_DIR": str(scratch / "triton"),
        "TORCHINDUCTOR_CACHE_DIR": str(scratch / "inductor"),
        "HF_HUB_OFFLINE": "1",
    }
    # The parts choose the backend themselves.
    environ.pop("SLORA_BACKEND", None)
    if not environ.get("CUDA_HOME") and Path("/usr/local/cuda").exists():
        environ["CUDA_HOME"] = "/usr/local/cuda"
    if dry:
        environ.update(TRITON_INTERPRET="1", TORCH_COMPILE_DISABLE="1", CUDA_VISIBLE_DEVICES="", OMP_NUM_THREADS="1")
    return environ


def machine() -> dict[str, Any]:
    """The driver, the compiler and the tools that are there."""

    def said(*command: str) -> str | None:
        tool = found(command[0])
        if tool is None:
            return None
        try:
            done = subprocess.run([tool, *command[1:]], capture_output=True, text=True, timeout=20)
        except (OSError, subprocess.TimeoutExpired):
            return None
        lines = done.stdout.strip().splitlines()
        return lines[-1] if lines and done.returncode == 0 else None

    return {
        "driver": said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
        "nvcc": said("nvcc", "--version"),
        "tools": {tool: found(tool) for tool in ("nvcc", "compute-sanitizer", "ncu", "cuobjdump")},
    }


def finish(proof: Proof, took: float) -> None:
    """Print the parts and the bars."""
    print(f"\n{'part':12} {'state':8} seconds")
    for name, state in proof.parts.items():
        counts = state.get("counts")
        note = ", ".join(f"{number} {word}" for word, number in counts.items()) if counts else state.get("reason", "")
        note = note or ("" if state.get("complete", True) else "incomplete")
        print(f"{name:12} {state['state']:8} {state['seconds']:7.1f}  {note}")
    try:
        table = bars.lines(proof.out)
    except BenchmarkError as error:
        table = [str(error)]
    print(f"\n{proof.about['device']}, in {took:.0f} s; results in {proof.out}\n")
    print("\n".join(table), flush=True)
