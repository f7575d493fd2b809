"""The parts of the proof. Each gets the proof and the seconds it has, and returns its state.

A state has "state" ("ok", "failed", "cut" at its limit, or "skipped" with a reason) and what the part has to say.
"left_out" has what the part did not do, and why.
"""

from __future__ import annotations

import csv
import json
import re
import sys
import time
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.proof import process
from benchmarks.proof.process import Proof, State, state_of
from benchmarks.record import read_result

# Of the time of a case: what is left to it to end the point that it is in before it is killed.
GRACE = 6.0
# With less than this nothing is begun.
LEAST = 3.0
TIME_UP = "the time was up"
METRICS = {
    "gpu__time_duration.sum": "duration",
    "sm__throughput.avg.pct_of_peak_sustained_elapsed": "compute_percent",
    "gpu__compute_memory_throughput.avg.pct_of_peak_sustained_elapsed": "memory_percent",
    "dram__bytes_read.sum": "bytes_read",
    "dram__bytes_write.sum": "bytes_written",
    "launch__registers_per_thread": "registers",
    "sm__warps_active.avg.pct_of_peak_sustained_active": "occupancy_percent",
}
Run = Callable[[Proof, float], State]


def build(proof: Proof, limit: float) -> State:
    """Build the extension in place, for this GPU only, and say what it is."""
    until = time.monotonic() + limit
    environ = {"SLORA_SKIP_EXT": "1"} if proof.dry else {"TORCH_CUDA_ARCH_LIST": architecture()}
    code, text = proof.call([sys.executable, "setup.py", "build_ext", "--inplace"], limit, **environ)
    state = state_of(code, text)
    ask = "import json, slora; print(json.dumps(slora.merging.extension_info()))"
    left = until - time.monotonic()
    asked, answer = (None, "") if left < LEAST else proof.call([sys.executable, "-c", ask], left)
    if asked == 0:
        state["extension"] = json.loads(answer.splitlines()[-1])
    else:
        reason = TIME_UP if asked is None else f"slora could not be asked: {(answer.splitlines() or [''])[-1]}"
        state["left_out"] = {"what was built": reason}
    return state


def architecture() -> str:
    """This GPU's, as torch spells it."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def tests(proof: Proof, limit: float) -> State:
    """The tests marked `gpu`; counts and the names of those that failed are read from what was printed.

    Files that need a package which is not here are left out, by name.
    """
    if find_spec("pytest") is None:
        return {"state": "skipped", "reason": "pytest is not installed"}
    left_out = needing_hypothesis() if find_spec("hypothesis") is None else []
    several = ["-n", "4"] if find_spec("xdist") and not proof.dry else []
    where = ["tests/benchmarks/test_timing.py"] if proof.dry else []
    ignored = [f"--ignore={path}" for path in left_out]
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--no-header", "-p", "no:cacheprovider",
               "--continue-on-collection-errors", *several, *where, *ignored]  # fmt: skip
    code, text = proof.call(command, limit)
    # 5: nothing was collected, which a dry run may do.
    state = state_of(0 if code == 5 and proof.dry else code, text)
    state["counts"] = {
        word.lower(): len(set(outcomes(text, word))) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")
    }
    state["failed"] = sorted({*outcomes(text, "FAILED"), *outcomes(text, "ERROR")})[:40]
    if left_out:
        state["left_out"] = dict.fromkeys(left_out, "hypothesis is not installed")
    return state


def needing_hypothesis() -> list[str]:
    """Test files that import hypothesis."""
    imports = re.compile(r"^(?:from|import) hypothesis\b", re.M)
    files = sorted((process.ROOT / "tests").rglob("test_*.py"))
    return [str(file.relative_to(process.ROOT)) for file in files if imports.search(file.read_text(encoding="utf-8"))]


def outcomes(text: str, word: str) -> list[str]:
    """Names of tests that ended with `word`, in pytest's verbose output, in one process or in several."""
    one = re.findall(rf"^(\S+\.py\S*(?: \S+)*?) {word}\b", text, re.M)
    return one + re.findall(rf"^\[gw\d+\](?: \[ *\d+%\])? {word} (\S+\.py.*?)\s*$", text, re.M)


def case(name: str) -> Run:
    """A part that runs one case; what it has measured when it is cut is in its file."""

    def run(proof: Proof, limit: float) -> State:
        grid = ["--grid", "tiny"] if proof.dry else ["--quick"] if proof.quick else []
        seconds = f"{max(1.0, limit - GRACE):.0f}"
        command = [sys.executable, "-m", "benchmarks", "run", "--case", name, "--device", proof.device,
                   "--keep-partial", "--seconds", seconds, "--out", str(proof.out), *grid]  # fmt: skip
        path = proof.out / f"{name}.json"
        before = written(path)
        code, text = proof.call(command, limit)
        state = state_of(code, text)
        # A file that was there already is another run's.
        if written(path) not in (None, before):
            proof.measured.add(name)
            result = read_result(path)
            if not result["complete"]:
                state["left_out"] = {"the rest of its grid": TIME_UP if code == 0 else "it did not end by itself"}
            state["rows"] = len(result["rows"])
            for word in ("skipped", "failed", "refused"):
                reasons = sorted({f"{row['contender']}: {row[word]}" for row in result["rows"] if word in row})
                if reasons:
                    state[word] = reasons
        return state

    return run


def written(path: Path) -> tuple[int, int] | None:
    """What differs after a file was written anew, None where there is none."""
    return (path.stat().st_ino, path.stat().st_mtime_ns) if path.exists() else None


def sanitizer(proof: Proof, limit: float) -> State:
    """compute-sanitizer on small runs of the merge and the kernels: memcheck, then racecheck."""
    tool = process.found("compute-sanitizer")
    if tool is None:
        return {"state": "skipped", "reason": "compute-sanitizer was not found"}
    runs: dict[str, Any] = {}
    until = time.monotonic() + limit
    for check, share in (("memcheck", 0.5), ("racecheck", 1.0)):
        left = (until - time.monotonic()) * share
        if left < LEAST:
            runs[check] = {"state": "skipped", "reason": TIME_UP}
            continue
        # One process for both: its start under the tool takes longer than what it checks.
        command = [tool, "--tool", check, "--error-exitcode", "9", sys.executable, "-m", "benchmarks.small", "all"]
        # Without the allocator's own pools an access past a tensor is one past an allocation.
        runs[check] = state_of(*proof.call(command, left, PYTORCH_NO_CUDA_MEMORY_CACHING="1"))
    states = [run["state"] for run in runs.values()]
    left_out = {check: run["reason"] for check, run in runs.items() if run["state"] == "skipped"}
    state = next((s for s in ("failed", "cut", "skipped") if s in states), "ok")
    return {"state": state, "runs": runs, **({"left_out": left_out} if left_out else {})}


def profile(proof: Proof, limit: float) -> State:
    """The choices that measurement made, and what ncu says of the main kernels."""
    cache = Path(proof.environ["SLORA_CACHE"])
    state: State = {"choices": {file.name: json.loads(file.read_text()) for file in sorted(cache.glob("*.json"))}}
    tool = process.found("ncu")
    if tool is None:
        return {**state, "state": "skipped", "reason": "ncu was not found; the choices are here all the same"}
    # From the program's own start of the profiler on: neither random numbers nor what warms up is of interest.
    command = [tool, "--clock-control", "none", "--profile-from-start", "off", "--launch-count", "40",
               "--csv", "--page", "raw", "--metrics", ",".join(METRICS),
               sys.executable, "-m", "benchmarks.small", "profile"]  # fmt: skip
    code, text = proof.call(command, limit)
    kernels = profiled(text)
    state.update(state_of(code, text), kernels=kernels)
    if code == 0 and not kernels:
        # Without permission to read the counters it ends well all the same.
        said = [line for line in text.splitlines() if "ERROR" in line]
        state.update(state="failed", reason=said[-1] if said else "ncu saw no kernel")
    return state


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
