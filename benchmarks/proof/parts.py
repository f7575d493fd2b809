"""The parts of the proof. Each gets the proof and the seconds it has, and returns its state.

A state has "state" ("ok", "failed", "cut" at its limit, or "skipped" with a reason) and what the part has to say.
"left_out" has what the part did not do, and why.
"""

from __future__ import annotations

import csv
import json
import os
import re
import sys
import time
from collections import Counter
from collections.abc import Callable, Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from benchmarks.proof import process
from benchmarks.proof.process import Proof, State, state_of
from benchmarks.results import read_result
from slora.merging.batched import serves

# Of the time of a case: what is left to it to end the point that it is in before it is killed.
GRACE = 6.0
# With less than this nothing is begun.
LEAST = 3.0
TIME_UP = "the time was up"
# How pytest ends where it could not begin.
USAGE_ERROR = 4
# What is tested first, because a cut loses what is at the end: every kernel's values, the operator, and the merge.
FIRST = ("tests/kernels/test_forms.py", "tests/kernels/test_operator.py", "tests/merging/test_batched_cuda.py")
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
    """Build the extension in place, for this GPU only, and say what it is. It has failed where it is of no use here."""
    until = time.monotonic() + limit
    environ = {"SLORA_SKIP_EXT": "1"} if proof.dry else {"TORCH_CUDA_ARCH_LIST": architecture()}
    code, text = proof.call([sys.executable, "setup.py", "build_ext", "--inplace"], limit, **environ)
    state = state_of(code, text)
    ask = "import json, slora; print(json.dumps(slora.merging.extension_info()))"
    left = until - time.monotonic()
    asked, answer = (None, "") if left < LEAST else proof.call([sys.executable, "-c", ask], left)
    if asked == 0:
        state["extension"] = json.loads(answer.splitlines()[-1])
        fault = None if proof.dry else no_use(state["extension"])
    else:
        reason = TIME_UP if asked is None else f"slora could not be asked: {(answer.splitlines() or [''])[-1]}"
        state["left_out"] = {"what was built": reason}
        fault = None if proof.dry else "what was built is not known"
    if fault and state["state"] == "ok":
        said = [line for line in text.splitlines() if line.startswith("slora: extension")]
        state.update(state="failed", reason="; ".join([fault, *said[-1:]]))
    return state


def no_use(extension: Mapping[str, Any]) -> str | None:
    """Why this GPU cannot merge with what was built, None where it can. `extension`: what `extension_info` says."""
    if not extension["available"]:
        return f"slora._C cannot be used: {extension['reason']}"
    if extension["cuda"] is None:
        return "slora._C was built without CUDA"
    known = " ".join(extension["architectures"])
    return None if serves(torch.cuda.get_device_capability(), known) else f"slora._C has code for {known} alone"


def architecture() -> str:
    """This GPU's, as torch spells it."""
    major, minor = torch.cuda.get_device_capability()
    return f"{major}.{minor}"


def tests(proof: Proof, limit: float) -> State:
    """The tests marked `gpu`; counts and the names of those that failed are read from what was printed.

    Only files that hold such tests are collected. Those that need a package which is not here are left out, by name.
    """
    if find_spec("pytest") is None:
        return {"state": "skipped", "reason": "pytest is not installed"}
    until = time.monotonic() + limit
    several = ["-n", str(min(8, os.cpu_count() or 1))] if find_spec("xdist") and not proof.dry else []
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-v", "--no-header", "-p", "no:cacheprovider",
               "--continue-on-collection-errors", *several]  # fmt: skip
    asked = gpu_files()
    left_out: dict[str, str] = {}
    while True:
        code, text = proof.call([*command, *asked], until - time.monotonic())
        # A conftest.py that cannot be imported is the end of all tests, not of its folder's.
        folder = broken_folder(text) if code == USAGE_ERROR else None
        package = missing_package(text)
        rest = [path for path in asked if not path.startswith(f"{folder}/")]
        if folder is None or package is None or not rest or until - time.monotonic() < LEAST:
            break
        left_out[folder], asked = f"{package} is not installed", rest
    state = state_of(code, text)
    errors = collection_errors(text)
    lacking = {
        path: f"{package} is not installed" for path, said in errors.items() if (package := missing_package(said))
    }
    broken = sorted(errors.keys() - lacking.keys())
    if code == 1 and lacking and ended_with_errors(text) == len(lacking):
        state = {"state": "ok"}
    found = {word: set(outcomes(text, word)) for word in ("PASSED", "FAILED", "ERROR", "SKIPPED")}
    found["ERROR"].update(broken)
    state["counts"] = {word.lower(): len(names) for word, names in found.items()}
    state["failed"] = sorted(found["FAILED"] | found["ERROR"])[:40]
    if left_out | lacking:
        state["left_out"] = left_out | lacking
    if state["state"] == "ok" and not found["PASSED"] and not proof.dry:
        state.update(state="failed", reason="no test passed")
    return state


def gpu_files() -> list[str]:
    """Test files in which a test may be marked `gpu`: by themselves, or by parameters of a conftest.py above them."""
    mark = re.compile(r"\bmark\.gpu\b")
    files = sorted((process.ROOT / "tests").rglob("*.py"))
    marking = {file for file in files if mark.search(file.read_text(encoding="utf-8"))}
    folders = {file.parent for file in marking if file.name == "conftest.py"}
    found = [
        file.relative_to(process.ROOT).as_posix()
        for file in files
        if file.name.startswith(("test_", "bench_")) and (file in marking or folders & {*file.parents})
    ]
    return [*FIRST, *(file for file in found if file not in FIRST)]


def missing_package(text: str) -> str | None:
    """The package that an import did not find; None where there was none, or it is here and lacks a module."""
    name = re.search(r"^E +.*No module named '(\w+)", text, re.M)
    return name[1] if name and find_spec(name[1]) is None else None


def broken_folder(text: str) -> str | None:
    """The folder of tests whose conftest.py pytest could not load."""
    path = re.search(r"^ImportError while loading conftest '(?:.*/)?(tests\b.*)/conftest\.py'", text, re.M)
    return path[1] if path else None


def collection_errors(text: str) -> dict[str, str]:
    """Test files that pytest could not collect, and what it says of each."""
    found = dict.fromkeys(re.findall(r"^ERROR (\S+\.py)(?: - .*)?$", text, re.M), "")
    for part in re.split(r"^(?=_{3,} |={3,} )", text, flags=re.M):
        path = re.match(r"_+ ERROR collecting (\S+) _+\n", part)
        if path:
            found[path[1]] = part
    return found


def ended_with_errors(text: str) -> int | None:
    """How many errors pytest's last line counts, None where it counts failures as well."""
    last = (text.strip().splitlines() or [""])[-1]
    errors = re.search(r"\b(\d+) errors?\b", last)
    return int(errors[1]) if errors and " failed" not in last else None


def outcomes(text: str, word: str) -> list[str]:
    """Names of tests that ended with `word`, in pytest's verbose output, in one process or in several."""
    one = re.findall(rf"^(\S+\.py\S*(?: \S+)*?) {word}\b", text, re.M)
    return one + re.findall(rf"^\[gw\d+\](?: \[ *\d+%\])? {word} (\S+\.py.*?)\s*$", text, re.M)


def case(name: str) -> Run:
    """A part that runs one case; what it has measured when it is cut is in its file."""

    def run(proof: Proof, limit: float) -> State:
        grid = ["--grid", "tiny"] if proof.dry else ["--quick"] if proof.stage else []
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


def candidates(proof: Proof, limit: float) -> State:
    """Every candidate of every form, compiled on all cores, checked and timed; what is done at a cut is in the file.

    About 150 candidates of some 60 kernels, each compiled in 2 to 10 s on one core: a minute on 16 cores. Checks and
    times take 20 s, most of them for the large point: 30 candidates, 27 calls of 6 ms.
    """
    seconds = f"{max(1.0, limit - GRACE):.0f}"
    path = proof.out / "candidates.json"
    before = written(path)
    code, text = proof.call([sys.executable, "-m", "benchmarks.candidates", proof.out, "--device", proof.device,
                             "--seconds", seconds], limit)  # fmt: skip
    state = state_of(code, text)
    if written(path) in (None, before):
        return state
    content = json.loads(path.read_text(encoding="utf-8"))
    state["counts"] = dict(Counter(entry["state"] for entry in content["candidates"]))
    wrong = [entry for entry in content["candidates"] if entry["state"] in ("wrong", "failed")]
    state["failed"] = [
        f"{entry['operation']}, {entry['form']} at {entry['point']}: {entry['reason']}"[:300] for entry in wrong[:40]
    ]
    if not content["complete"]:
        state["left_out"] = {"the rest of the candidates": TIME_UP}
    return state


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
    reason = {"reason": TIME_UP} if state == "skipped" else {}
    return {"state": state, **reason, "runs": runs, **({"left_out": left_out} if left_out else {})}


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
    said = [line for line in text.splitlines() if "ERROR" in line]
    denied = [line for line in said if "ERR_NVGPUCTRPERM" in line]
    if denied and not kernels:
        # A machine that lets only its administrator read the counters, whichever way ncu ends then.
        return {**state, "state": "skipped", "reason": denied[-1]}
    state.update(state_of(code, text), kernels=kernels)
    if code == 0 and not kernels:
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
