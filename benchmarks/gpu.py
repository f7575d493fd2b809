"""The proof on a GPU, in two stages that stand alone: build, kernels, cases, tests, profile, and which targets are met.

    python -m benchmarks gpu first|second [--out FOLDER]
    python -m benchmarks gpu [--parts NAME ...] [--out FOLDER]

`first` says whether the kernels are right, and how fast one layer and the merge are; `second` how fast a model trains,
and what the tests and the profiler say. Without a stage there are all parts, or those that are named.

Every part is a process of its own with an end of its own: part i has to end when the shares of parts 1 to i are used
up, so what one part leaves is the next one's. A part that fails or is cut costs the others nothing. The order is that
of importance. Both stages together write at most eight files into one folder: one per case, `candidates.json`, and for
each `proof-<stage>.json` (the state of every part) and `gpu-<stage>.log`. Nothing is written elsewhere but the
extension that is built in place, and temporary files that are removed.

Shares are estimates from the work of a part, in the comments beside them: no GPU has run it yet.

Here are the order, the time and the table at the end; `proof/parts.py` has the parts, `proof/process.py` how they run.
"""

from __future__ import annotations

import argparse
import signal
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks import targets
from benchmarks.proof import parts
from benchmarks.proof.process import Proof, State, environ_of, machine
from benchmarks.results import (
    RESULTS,
    BenchmarkError,
    environment,
    folder_name,
    process_began,
    read_result,
    require_writable,
)

# Of all parts without a stage, and of each stage.
SECONDS: dict[str | None, float] = {None: 530.0, "first": 240.0, "second": 400.0}
DRY_SECONDS = 900.0


@dataclass(frozen=True)
class Part:
    """A part, what it is for, and its share of the time: of all parts, and of each stage (0: not in it)."""

    name: str
    run: parts.Run
    seconds: float
    first: float = 0.0
    second: float = 0.0

    def share(self, stage: str | None) -> float:
        """Its share of the time of a stage."""
        return {None: self.seconds, "first": self.first, "second": self.second}[stage]


PARTS = (
    # Two compilers side by side, nvcc for one architecture: 30 s.
    Part("build", parts.build, 45, 40, 40),
    # In the second stage for the sake of Triton's cache: train steps would compile one kernel after the other.
    Part("candidates", parts.candidates, 60, 80, 60),
    # A start of 10 s; 6 points of 9 contenders and 6 of 2, each 60 calls of 16 launches of 1 ms: 4 s and 2 s, checks
    # and measured choices as much again.
    Part("linear", parts.case("linear"), 90, 85),
    # A start of 10 s, of each of 5 contenders 8 rounds; PEFT takes 0.5 s to adapt a ViT-L.
    Part("merge", parts.case("merge"), 30, 35),
    # A start of 10 s; 2 batches, eager and as a graph, of each 6 contenders: built, checked in fp32 on the whole batch
    # (5 s), timed (8 steps of 0.05 to 0.25 s).
    Part("train_step", parts.case("train_step"), 80, 0, 170),
    # Several hundred tests of 1 s on 8 processes, compiling included.
    Part("tests", parts.tests, 75, 0, 95),
    # Up to 40 kernels, each replayed a few times: 1 s each at most.
    Part("profile", parts.profile, 25, 0, 35),
    Part("inference", parts.case("inference"), 20),
    Part("sanitizer", parts.sanitizer, 70),
    Part("scaling", parts.case("scaling"), 20),
    Part("gates", parts.case("gates"), 15),
)


def chosen(args: argparse.Namespace) -> list[Part]:
    """The parts that are asked for, in their order.

    Raises:
        BenchmarkError: there is no such part, or a stage has other ones.
    """
    names = [part.name for part in PARTS]
    unknown = [name for name in args.parts or () if name not in names]
    if unknown:
        raise BenchmarkError(f"part {unknown[0]!r} is unknown; there are {', '.join(names)}")
    if args.parts and args.stage:
        raise BenchmarkError(f"the stage {args.stage} has its own parts; leave it or --parts out")
    return [part for part in PARTS if (part.name in args.parts if args.parts else part.share(args.stage))]


def prove(args: argparse.Namespace) -> int:
    """Run the parts, write what they say, print the table; 1 where a part failed, was cut or got no time, else 0.

    Raises:
        BenchmarkError: there is no GPU, no such part, no time, no folder where one is needed, or it cannot be written
            into.
    """
    began = process_began()
    if not args.dry_run and not torch.cuda.is_available():
        raise BenchmarkError("no CUDA GPU is visible (torch.cuda.is_available() is False); --dry-run needs none")
    if args.dry_run and args.out is None:
        raise BenchmarkError("--dry-run measures nothing worth keeping; name a folder with --out")
    if args.seconds is not None and not args.seconds > 0:
        raise BenchmarkError(f"--seconds {args.seconds:g} leaves no time; the proof has {SECONDS[args.stage]:g}")
    asked = chosen(args)
    shares = [part.share(args.stage) for part in asked]
    whole = args.seconds or (DRY_SECONDS if args.dry_run else SECONDS[args.stage])
    device = "cpu" if args.dry_run else "cuda"
    out = (args.out or RESULTS / folder_name(device)).resolve()
    require_writable(out)
    out.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="slora-proof-") as scratch:
        proof = Proof(out, args.dry_run, args.stage, environ_of(args.dry_run, Path(scratch)))
        proof.log.write_bytes(b"")
        proof.about = {**environment(device), **machine()}
        proof.write()
        if proof.about["commit"] is None:
            print("the commit is not known, and results will not say it; --commit HASH names it", flush=True)
        # A `timeout` around the proof must not leave a part running.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            for i, part in enumerate(asked):
                end = began + whole * sum(shares[: i + 1]) / sum(shares)
                run_part(proof, part, end - time.monotonic())
        except KeyboardInterrupt:
            print("\nbenchmarks: interrupted; what was measured so far is kept", file=sys.stderr)
            proof.write()
            return 2
    name_left_out(proof, asked, f"not in the stage {args.stage}" if args.stage else "not asked for")
    finish(proof, time.monotonic() - began)
    return int(any(state["state"] in ("failed", "cut") or no_time(state) for state in proof.parts.values()))


def run_part(proof: Proof, part: Part, limit: float) -> None:
    """Run one part, whatever happens in it, and write what it says."""
    print(f"{part.name}: at most {max(limit, 0):.0f} s", flush=True)
    start = time.monotonic()
    if limit < parts.LEAST:
        state: State = {"state": "skipped", "reason": parts.TIME_UP}
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


def no_time(state: State) -> bool:
    """Whether a part was to be run and had no time."""
    return bool(state["state"] == "skipped" and state.get("reason") == parts.TIME_UP)


def name_left_out(proof: Proof, asked: Sequence[Part], reason: str) -> None:
    """Write which parts were not run, and why."""
    for part in PARTS:
        if part not in asked:
            proof.parts[part.name] = {"state": "skipped", "reason": reason, "seconds": 0.0}
    proof.write()


def finish(proof: Proof, took: float) -> None:
    """Print the parts, what they left out, and the targets."""
    print(f"\n{'part':12} {'state':8} seconds")
    for name, state in proof.parts.items():
        counts = [f"{number} {word}" for word, number in state.get("counts", {}).items()]
        note = ", ".join([*counts, *filter(None, [state.get("reason")])])
        word = "NO TIME" if no_time(state) else state["state"]
        print(f"{name:12} {word:8} {state['seconds']:7.1f}  {note}".rstrip())
        for what in state.get("failed", ())[:8]:
            print(f"    failed: {what}")
        for what, reason in state.get("left_out", {}).items():
            print(f"    left out: {what}: {reason}")
    try:
        found = {case: read_result(proof.out / f"{case}.json") for case in proof.measured}
        device = folder_name(proof.device)
        table = targets.lines({device: found}, [device])
    except BenchmarkError as error:
        table = [str(error)]
    print(f"\n{proof.about['device']}, in {took:.0f} s; results in {proof.out}\n")
    print("\n".join(table), flush=True)
