"""`python -m benchmarks`: run, list, report, compare, bars, compatibility, gpu.

Nothing above `main` imports torch, so that an interrupt in the second that this takes is answered like any other.
"""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

# Of a run that is interrupted before it has measured anything that it keeps.
NOTHING_WRITTEN = "nothing was written for the case in progress"


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks", description="What is fast, measured.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run cases and write results/<device>/<case>.json")
    run.add_argument("--case", nargs="+", action="extend", required=True, metavar="CASE", help="names, or 'all'")
    run.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    grid = run.add_mutually_exclusive_group()
    grid.add_argument("--full", dest="grid", action="store_const", const="full", help="the whole grid; hours on a CPU")
    grid.add_argument("--quick", dest="grid", action="store_const", const="quick", help="one point of every kind")
    grid.add_argument("--grid", help=argparse.SUPPRESS)
    # Of several actions for one name argparse takes the default of the first.
    run.set_defaults(grid="default")
    run.add_argument("--rounds", type=int, help="repetitions of every contender (default: what suits the case)")
    run.add_argument("--only", nargs="+", action="extend", default=[], metavar="PART", help="parts of contender names")
    run.add_argument("--threads", type=int, help="threads of PyTorch on the CPU (default: its own choice)")
    run.add_argument(
        "--seconds", type=float, help="begin no new point of a case after this time; its first is measured in any case"
    )
    run.add_argument("--out", type=Path, help="folder to write into (default: benchmarks/results/<device>)")
    run.add_argument("--keep-partial", action="store_true", help="write after every point, marked incomplete")
    run.add_argument("--commit", help="what to record as the commit where the source is no git repository")

    commands.add_parser("list", help="name the cases")

    report = commands.add_parser(
        "report", help="write benchmarks/README.md, the figures, docs/compatibility.md, README's tables"
    )
    report.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a text is out of date")

    compare = commands.add_parser("compare", help="what moved beyond noise between two result files")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)

    bars = commands.add_parser("bars", help="the bars of bars.toml, met, missed or not measured")
    bars.add_argument("--results", type=Path, help="a folder of result files of one device (default: results/*)")

    census = commands.add_parser(
        "compatibility", help="which architectures slora adapts rightly: docs/compatibility.md"
    )
    census.add_argument("names", nargs="*", metavar="NAME", help="a library, a family, library/family or a part of it")
    census.add_argument("--quick", action="store_true", help="a few of every kind")
    census.add_argument("--jobs", type=int, default=1, help="processes at a time, of one thread each (default 1)")
    census.add_argument("--seconds", type=float, default=600, help="after which one is ended (default 600)")
    census.add_argument("--out", type=Path, help="folder to write into (default of the whole: benchmarks/results)")

    gpu = commands.add_parser("gpu", help="the proof on a GPU: build, kernels, cases, tests, sanitizer, profile")
    gpu.add_argument(
        "stage", nargs="?", choices=("first", "second"),
        help="first: build, candidates, linear, merge (4 minutes); second: train steps, tests, profile (7 minutes); "
        "without it all parts (9 minutes)",
    )  # fmt: skip
    gpu.add_argument("--out", type=Path, help="folder to write into (default: benchmarks/results/<device>)")
    gpu.add_argument("--commit", help="what to record as the commit where the source is no git repository")
    gpu.add_argument(
        "--seconds", type=float, help="all the time there is, its start included (default 240, 400, or 530 of all)"
    )
    gpu.add_argument("--parts", nargs="+", action="extend", metavar="PART", help="only these parts")
    gpu.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, the kernels interpreted")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Obey the command line; return the exit code: 2 for what the user can mend, 1 where a case or a text is wrong."""
    args = argparse.Namespace(command="")
    try:
        parser().parse_args(arguments, args)
        return _obey(args)
    except KeyboardInterrupt as interrupt:
        kept = str(interrupt) or (NOTHING_WRITTEN if args.command == "run" else "")
        print(f"\nbenchmarks: interrupted{kept and f'; {kept}'}", file=sys.stderr)
        return 2


def _obey(args: argparse.Namespace) -> int:
    if getattr(args, "commit", None):
        os.environ["SLORA_COMMIT"] = args.commit
    from benchmarks.record import BenchmarkError
    from slora.errors import WriteError

    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is _end:
            signal.signal(number, signal.default_int_handler)
    try:
        return COMMANDS[args.command](args)
    except (BenchmarkError, WriteError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    import torch

    from benchmarks.record import BenchmarkError, read_result
    from benchmarks.registry import CASES, find
    from benchmarks.running import CaseFailed, run_case, show
    from benchmarks.settings import COMPARABLE_ROUNDS, GRIDS, Settings, process_began
    from slora.errors import WriteError

    if args.threads is not None:
        if args.threads < 1:
            raise BenchmarkError(f"--threads {args.threads} is not a positive number")
        torch.set_num_threads(args.threads)
    if args.grid not in GRIDS:
        raise BenchmarkError(f"--grid {args.grid!r} is unknown; there are {', '.join(GRIDS)}")
    measured = {name: case for name, case in CASES.items() if args.device in case.devices}
    asked = [name for word in args.case for name in (measured if word == "all" else [word])]
    cases = [find(name) for name in dict.fromkeys(asked)]
    # A GPU that is not there is of no interest to a case that needs none.
    for case in cases if measured else ():
        case.require_device(args.device)
    # Refuses what it does not know before anything is chosen by it.
    Settings(args.device, args.grid, args.rounds, seconds=args.seconds)
    partial = _less_than_whole(args, COMPARABLE_ROUNDS)
    if args.out is None and partial:
        raise BenchmarkError(
            f"{partial} needs --out: results that everyone reads are whole, with {COMPARABLE_ROUNDS} repetitions at "
            "least"
        )
    code, faults = 0, []
    try:
        for i, case in enumerate(cases):
            settings = Settings(args.device, args.grid, args.rounds, tuple(args.only), args.seconds)
            if i == 0:
                # What Python and torch need to start is the first case's.
                settings.started = process_began()
            try:
                path = run_case(case, settings, args.out, args.keep_partial)
                show(read_result(path)["rows"])
                print(path)
            # The other cases do not depend on this one.
            except (BenchmarkError, WriteError) as error:
                faults.append(str(error))
                code = code or 2
            except CaseFailed as error:
                faults.append(str(error))
                code = 1
    finally:
        for fault in dict.fromkeys(faults):
            print(f"benchmarks: {fault}", file=sys.stderr)
    return code


def _less_than_whole(args: argparse.Namespace, comparable: int) -> str | None:
    """What on the command line makes a result a part of the whole; `comparable` repetitions are none."""
    return next(
        (
            name
            for name, partial in (
                ("--only", bool(args.only)),
                (f"the {args.grid} grid", args.grid in ("tiny", "quick")),
                ("--seconds", args.seconds is not None),
                ("--keep-partial", args.keep_partial),
                (f"--rounds {args.rounds}", args.rounds is not None and args.rounds < comparable),
            )
            if partial
        ),
        None,
    )


def _list(args: argparse.Namespace) -> int:
    from benchmarks.registry import CASES

    for case in CASES.values():
        print(f"{case.name:13} {case.summary} ({', '.join(case.devices)})")
    return 0


def _report(args: argparse.Namespace) -> int:
    from benchmarks.report import page

    stale = page.stale()
    if not args.check:
        page.write()
        return 0
    for path in stale:
        print(f"{path} is not what the result files give; run: python -m benchmarks report", file=sys.stderr)
    return 1 if stale else 0


def _compare(args: argparse.Namespace) -> int:
    from benchmarks import compare
    from benchmarks.record import BenchmarkError, read_result

    results = [read_result(path) for path in (args.before, args.after)]
    for path, result in zip((args.before, args.after), results, strict=True):
        if "rows" not in result:
            raise BenchmarkError(f"{path} holds no measurements to compare")
    print("\n".join(compare.lines(*results)))
    return 0


def _bars(args: argparse.Namespace) -> int:
    from benchmarks import bars

    print("\n".join(bars.lines(args.results)))
    return 0


def _compatibility(args: argparse.Namespace) -> int:
    from benchmarks.compatibility import census
    from benchmarks.record import RESULTS, BenchmarkError, require_writable

    for option, value in (("--jobs", args.jobs), ("--seconds", args.seconds)):
        if not value > 0:
            raise BenchmarkError(f"{option} {value} is not a positive number")
    names = census.chosen(args.names, args.quick)
    out = args.out or (None if args.names or args.quick else RESULTS)
    if out is not None:
        require_writable(out)
    rows = census.run(names, args.jobs, args.seconds, out)
    return 1 if any(row["verdict"] in ("wrong", "failed") for row in rows) else 0


def _gpu(args: argparse.Namespace) -> int:
    from benchmarks import gpu

    return gpu.prove(args)


COMMANDS = {
    "run": _run,
    "list": _list,
    "report": _report,
    "compare": _compare,
    "bars": _bars,
    "compatibility": _compatibility,
    "gpu": _gpu,
}


def _end(*_: object) -> None:
    """End the process at once: an exception in the midst of the import of torch or NumPy would be swallowed there."""
    os.write(2, b"\nbenchmarks: interrupted; nothing was written\n")
    os._exit(2)


if __name__ == "__main__":
    # `timeout` and others who end a process politely are answered as Ctrl-C is; what the caller ignores stays ignored.
    for number in (signal.SIGINT, signal.SIGTERM):
        if signal.getsignal(number) is not signal.SIG_IGN:
            signal.signal(number, _end)
    sys.exit(main())
