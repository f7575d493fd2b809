"""Validation on a GPU, in stages that stand alone: is it right, how fast is it, and which targets are met.

    python -m benchmarks gpu [first|second] [--parts NAME ...] [--seconds S] [--out FOLDER]

`first`: are the kernels right, how fast are one layer and the merge; `second`: how fast does a model train, and what do
the tests and the profiler say. Without a stage all steps run; of these or of a stage, `--parts` names those to run.
Other cases: `python -m benchmarks run --case inference gates --device cuda`.

Every step is a process of its own. Step i has to end when the shares of steps 1 to i are used up, so the time that one
leaves is the next one's. A step that fails or is cut costs the others nothing; the most important come first. A stage
writes into one folder: a file per case, `candidates.json`, `gpu-<stage>.json` (the state of every step) and
`gpu-<stage>.log`. Nothing else is written but the extension, which is built in place, and temporary files.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import torch

from benchmarks import gpu_steps as steps
from benchmarks import targets
from benchmarks.results import RESULTS, BenchmarkError, environment, folder_name, made, process_began

DRY_SECONDS = 900.0
# Seconds: an H200 took 27, 29, 55 and 24, and 22, 24, more than 98, more than 59, and 13. In the second stage the
# candidates fill Triton's cache: train steps would compile one kernel after the other.
STAGES = {
    "first": {"build": 35.0, "candidates": 45.0, "linear": 75.0, "merge": 35.0},
    "second": {"build": 30.0, "candidates": 40.0, "train_step": 170.0, "tests": 130.0, "profile": 20.0},
}
STAGES["all"] = STAGES["first"] | STAGES["second"]


def validate(args: argparse.Namespace) -> int:
    """Run the steps, write what they find, print the table; 1 where a step failed, was cut or had no time, else 0.

    Raises:
        BenchmarkError: there is no GPU, no such step, no folder where one is needed, or it cannot be created.
    """
    began = process_began()
    shares = {name: share for name, share in STAGES[args.stage].items() if not args.parts or name in args.parts}
    if unknown := set(args.parts or ()) - shares.keys():
        raise BenchmarkError(f"there is no step {unknown.pop()!r}; there are {', '.join(STAGES[args.stage])}")
    if not args.dry_run and not torch.cuda.is_available():
        raise BenchmarkError("no CUDA GPU is visible (torch.cuda.is_available() is False); --dry-run needs none")
    if args.dry_run and args.out is None:
        raise BenchmarkError("--dry-run measures nothing worth keeping; name a folder with --out")
    device, whole = ("cpu", DRY_SECONDS) if args.dry_run else ("cuda", args.seconds or sum(shares.values()))
    out = made(args.out or RESULTS / folder_name(device)).resolve()
    # `timeout` sends its signal twice: the second must not come between the first and the end of what runs.
    signal.signal(signal.SIGTERM, interrupted)
    # Commands inherit what is ignored, and pytest has to hear an interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="slora-gpu-") as scratch:
        run = steps.Validation(out, Path(scratch), args.dry_run, args.stage)
        run.log.write_bytes(b"")
        run.about = {**environment(device), "driver": driver()}
        run.write()
        if run.about["commit"] is None:
            print("the commit is not known, and results will not say it; --commit HASH names it", flush=True)
        try:
            used = 0.0
            for name, share in shares.items():
                used += share
                run_step(run, name, began + whole * used / sum(shares.values()) - time.monotonic())
        except KeyboardInterrupt:
            print("\nbenchmarks: interrupted; what was measured so far is kept", file=sys.stderr)
            return 2
    show(run, time.monotonic() - began)
    return int(any(state["state"] not in ("ok", "skipped") for state in run.states.values()))


def driver() -> str | None:
    """The version of the GPU's driver."""
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20).stdout.strip() or None
    except (OSError, subprocess.TimeoutExpired):
        return None


def interrupted(number: int, frame: object) -> None:
    """Answer the first SIGTERM as Ctrl-C, and no other."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    raise KeyboardInterrupt


def run_step(run: steps.Validation, name: str, limit: float) -> None:
    """Run one step, whatever happens in it, and write what it finds."""
    print(f"{name}: at most {max(limit, 0):.0f} s", flush=True)
    start = time.monotonic()
    state: steps.State = {"state": "no time", "reason": steps.TIME_UP}
    if limit >= steps.LEAST:
        try:
            state = steps.STEPS[name](run, limit)
        except Exception as error:
            state = {"state": "failed", "reason": f"{type(error).__name__}: {error}"}
    run.states[name] = {**state, "seconds": round(time.monotonic() - start, 1)}
    run.write()
    print(f"{name}: {state['state']} {state.get('reason', '')}", flush=True)
    for line in state.get("last_lines", ())[-4:]:
        print(f"    {line[:200]}", flush=True)


def show(run: steps.Validation, took: float) -> None:
    """Print the steps, what they left out, and the targets."""
    print(f"\n{'step':12} {'state':8} seconds")
    for name, state in run.states.items():
        notes = [f"{number} {word}" for word, number in state.get("counts", {}).items()] + [state.get("reason", "")]
        print(f"{name:12} {state['state']:8} {state['seconds']:7.1f}  {', '.join(filter(None, notes))}".rstrip())
    print(f"\n{run.about['device']}, in {took:.0f} s; results in {run.out}\n")
    device = folder_name(run.device)
    try:
        print("\n".join(targets.lines({device: run.results}, [device])), flush=True)
    except BenchmarkError as error:
        print(error)
