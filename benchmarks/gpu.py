"""Validation on a GPU, in two stages that stand alone: is it right, how fast is it, and which targets are met.

    python -m benchmarks gpu first|second [--out FOLDER]
    python -m benchmarks gpu [--parts NAME ...] [--out FOLDER]

`first`: are the kernels right, how fast are one layer and the merge; `second`: how fast does a model train, and what do
the tests and the profiler say. Without a stage all steps run, or those that are named.

Every step is a process of its own. Step i has to end when the shares of steps 1 to i are used up, so the time that one
leaves is the next one's. A step that fails or is cut costs the others nothing; the most important come first. Both
stages together write at most eight files into one folder: one per case, `candidates.json`, and for each stage
`gpu-<stage>.json` (the state of every step) and `gpu-<stage>.log`. Nothing else is written but the extension, which is
built in place, and temporary files that are removed.
"""

from __future__ import annotations

import argparse
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import gpu_steps as steps
from benchmarks import targets
from benchmarks.results import RESULTS, BenchmarkError, environment, folder_name, process_began, require_writable

DRY_SECONDS = 900.0


@dataclass(frozen=True)
class Step:
    """A step, and its share of the time in seconds: of all steps, and of each stage (0: not in it)."""

    name: str
    run: steps.Run
    alone: float
    first: float = 0.0
    second: float = 0.0

    def share(self, stage: str | None) -> float:
        """Its share of the time of a stage."""
        return {None: self.alone, "first": self.first, "second": self.second}[stage]


# Shares are estimates; no GPU has run any of it yet.
STEPS = (
    # Two compilers side by side, nvcc for one architecture: 30 s.
    Step("build", steps.build, 45, 40, 40),
    # In the second stage for Triton's cache: train steps would compile one kernel after the other.
    Step("candidates", steps.candidates, 60, 80, 60),
    # A start of 10 s; 6 points of 9 implementations and 6 of 2, each 60 calls of 16 launches of 1 ms: 4 s and 2 s,
    # checks and measured choices as much again.
    Step("linear", steps.case("linear"), 90, 85),
    # A start of 10 s, of each of 5 implementations 8 rounds; PEFT takes 0.5 s to adapt a ViT-L.
    Step("merge", steps.case("merge"), 30, 35),
    # A start of 10 s; 2 batches, eager and as a graph, of 6 implementations each: built, checked in fp32 on the whole
    # batch (5 s), timed (8 steps of 0.05 to 0.25 s).
    Step("train_step", steps.case("train_step"), 80, 0, 170),
    # Several hundred tests of 1 s on 8 processes, compiling included.
    Step("tests", steps.tests, 75, 0, 95),
    # Up to 40 kernels, each replayed a few times: 1 s each at most.
    Step("profile", steps.profile, 25, 0, 35),
    Step("inference", steps.case("inference"), 20),
    Step("memcheck", steps.sanitizer("memcheck"), 35),
    Step("racecheck", steps.sanitizer("racecheck"), 35),
    Step("gates", steps.case("gates"), 15),
)


def chosen(stage: str | None, names: list[str] | None) -> list[Step]:
    """The steps of a stage, or those that are named, in their order.

    Raises:
        BenchmarkError: there is no such step, or a stage has other ones.
    """
    known = [step.name for step in STEPS]
    unknown = [name for name in names or () if name not in known]
    if unknown:
        raise BenchmarkError(f"part {unknown[0]!r} is unknown; there are {', '.join(known)}")
    if names and stage:
        raise BenchmarkError(f"the stage {stage} has its own parts; leave it or --parts out")
    return [step for step in STEPS if (step.name in names if names else step.share(stage))]


def validate(args: argparse.Namespace) -> int:
    """Run the steps, write what they find, print the table; 1 where a step failed, was cut or had no time, else 0.

    Raises:
        BenchmarkError: there is no GPU, no such step, no time, no folder where one is needed, or it cannot be written
            into.
    """
    began = process_began()
    if not args.dry_run and not torch.cuda.is_available():
        raise BenchmarkError("no CUDA GPU is visible (torch.cuda.is_available() is False); --dry-run needs none")
    if args.dry_run and args.out is None:
        raise BenchmarkError("--dry-run measures nothing worth keeping; name a folder with --out")
    asked, usual = chosen(args.stage, args.parts), sum(step.share(args.stage) for step in STEPS)
    shares = [step.share(args.stage) for step in asked]
    seconds = args.seconds if args.seconds is not None else DRY_SECONDS if args.dry_run else usual
    if not seconds > 0:
        raise BenchmarkError(f"--seconds {seconds:g} leaves no time; by itself it takes {usual:g}")
    device = "cpu" if args.dry_run else "cuda"
    out = (args.out or RESULTS / folder_name(device)).resolve()
    require_writable(out)
    # `timeout` sends its signal twice: the second must not come between the first and the end of what runs.
    signal.signal(signal.SIGTERM, interrupted)
    # Commands inherit what is ignored, and pytest has to hear an interrupt.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    with tempfile.TemporaryDirectory(prefix="slora-gpu-") as scratch:
        run = steps.Validation(out, Path(scratch), args.dry_run, args.stage)
        (out / f"{run.name}.log").write_bytes(b"")
        run.about = {**environment(device), "driver": driver()}
        run.write()
        if run.about["commit"] is None:
            print("the commit is not known, and results will not say it; --commit HASH names it", flush=True)
        try:
            for i, step in enumerate(asked):
                end = began + seconds * sum(shares[: i + 1]) / sum(shares)
                run_step(run, step, end - time.monotonic())
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


def run_step(run: steps.Validation, step: Step, limit: float) -> None:
    """Run one step, whatever happens in it, and write what it finds."""
    print(f"{step.name}: at most {max(limit, 0):.0f} s", flush=True)
    start = time.monotonic()
    state: steps.State = {"state": "no time", "reason": steps.TIME_UP}
    if limit >= steps.LEAST:
        try:
            state = step.run(run, limit)
        except Exception as error:
            state = {"state": "failed", "reason": f"{type(error).__name__}: {error}"}
    run.states[step.name] = {**state, "seconds": round(time.monotonic() - start, 1)}
    run.write()
    print(f"{step.name}: {state['state']} {state.get('reason', '')}", flush=True)
    for line in state.get("last_lines", ())[-4:]:
        print(f"    {line[:200]}", flush=True)


def show(run: steps.Validation, took: float) -> None:
    """Print the steps, what they left out, and the targets."""
    print(f"\n{'part':12} {'state':8} seconds")
    for name, state in run.states.items():
        notes = [f"{number} {word}" for word, number in state.get("counts", {}).items()] + [state.get("reason", "")]
        print(f"{name:12} {state['state']:8} {state['seconds']:7.1f}  {', '.join(filter(None, notes))}".rstrip())
        for what in state.get("failed", ())[:8]:
            print(f"    failed: {what}")
        for what, reason in state.get("left_out", {}).items():
            print(f"    left out: {what}: {reason}")
    print(f"\n{run.about['device']}, in {took:.0f} s; results in {run.out}\n")
    device = folder_name(run.device)
    try:
        print("\n".join(targets.lines({device: run.results}, [device])), flush=True)
    except BenchmarkError as error:
        print(error)
