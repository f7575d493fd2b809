"""`python -m benchmarks`: run, list, report, compare, bars, gpu."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks.record import BenchmarkError
from benchmarks.registry import CASES
from benchmarks.settings import COMPARABLE_ROUNDS, GRIDS
from slora.errors import WriteError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks", description="What is fast, measured.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    run = commands.add_parser("run", help="run cases and write results/<device>/<case>.json")
    run.add_argument("--case", nargs="+", required=True, metavar="CASE", help="names, or 'all'")
    run.add_argument("--device", default="cpu", help="cpu (default) or cuda")
    grid = run.add_mutually_exclusive_group()
    grid.add_argument("--full", dest="grid", action="store_const", const="full", help="the whole grid; hours on a CPU")
    grid.add_argument("--quick", dest="grid", action="store_const", const="quick", help="one point of every kind")
    grid.add_argument("--grid", choices=GRIDS, help=argparse.SUPPRESS)
    # Of several actions for one name argparse takes the default of the first.
    run.set_defaults(grid="default")
    run.add_argument("--rounds", type=int, help="repetitions of every contender (default: what suits the case)")
    run.add_argument("--only", nargs="+", default=[], metavar="PART", help="parts of contender names")
    run.add_argument("--threads", type=int, help="threads of PyTorch on the CPU (default: its own choice)")
    run.add_argument(
        "--seconds", type=float, help="begin no new point of a case after this time; its first is measured in any case"
    )
    run.add_argument("--out", type=Path, help="folder to write into (default: benchmarks/results/<device>)")
    run.add_argument("--keep-partial", action="store_true", help="write after every point, marked incomplete")
    run.add_argument("--commit", help="what to record as the commit where the source is no git repository")

    commands.add_parser("list", help="name the cases")

    report = commands.add_parser("report", help="write benchmarks/README.md, the figures, and README's tables")
    report.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a text is out of date")

    compare = commands.add_parser("compare", help="what moved beyond noise between two result files")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)

    bars = commands.add_parser("bars", help="the bars of bars.toml, met, missed or not measured")
    bars.add_argument("--results", type=Path, help="a folder of result files of one device (default: results/*)")

    gpu = commands.add_parser("gpu", help="the proof on a GPU: build, tests, cases, sanitizer, profile; 9 minutes")
    gpu.add_argument("--out", type=Path, help="folder to write into (default: benchmarks/results/<device>)")
    gpu.add_argument("--quick", action="store_true", help="90 seconds instead of 9 minutes; needs --out")
    gpu.add_argument("--commit", help="what to record as the commit where the source is no git repository")
    gpu.add_argument(
        "--seconds", type=float, help="all the time there is, its start included (default 530, with --quick 88)"
    )
    gpu.add_argument("--parts", nargs="+", metavar="PART", help="only these parts")
    gpu.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, the kernels interpreted")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Obey the command line; return the exit code: 2 for what the user can mend."""
    args = parser().parse_args(arguments)
    if getattr(args, "commit", None):
        os.environ["SLORA_COMMIT"] = args.commit
    try:
        return COMMANDS[args.command](args)
    except (BenchmarkError, WriteError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        kept = "what was measured so far is kept" if getattr(args, "keep_partial", False) else "nothing was written"
        print(f"\nbenchmarks: interrupted; {kept} for the case in progress", file=sys.stderr)
        return 2


def _run(args: argparse.Namespace) -> int:
    import torch

    from benchmarks.record import read_result
    from benchmarks.registry import find
    from benchmarks.running import run_case, show
    from benchmarks.settings import Settings, process_began

    if args.threads is not None:
        if args.threads < 1:
            raise BenchmarkError(f"--threads {args.threads} is not a positive number")
        torch.set_num_threads(args.threads)
    Settings(
        args.device, args.grid, args.rounds, seconds=args.seconds
    )  # refuses what it does not know before anything is chosen by it
    known = [name for name, case in CASES.items() if args.device in case.devices]
    cases = [find(name) for name in (known if args.case == ["all"] else dict.fromkeys(args.case))]
    if args.out is None and _less_than_whole(args):
        raise BenchmarkError(
            f"{_less_than_whole(args)} needs --out: results that everyone reads are whole, with {COMPARABLE_ROUNDS} "
            "repetitions at least"
        )
    faults = []
    for i, case in enumerate(cases):
        settings = Settings(args.device, args.grid, args.rounds, tuple(args.only), args.seconds)
        if i == 0:
            # What Python and torch need to start is the first case's.
            settings.started = process_began()
        try:
            path = run_case(case, settings, args.out, args.keep_partial)
        except BenchmarkError as error:
            # The other cases do not depend on this one.
            faults.append(str(error))
            continue
        show(read_result(path)["rows"])
        print(path)
    if faults:
        raise BenchmarkError("\n".join(dict.fromkeys(faults)))
    return 0


def _less_than_whole(args: argparse.Namespace) -> str | None:
    """What on the command line makes a result a part of the whole."""
    return next(
        (
            name
            for name, partial in (
                ("--only", bool(args.only)),
                (f"the {args.grid} grid", args.grid in ("tiny", "quick")),
                ("--seconds", args.seconds is not None),
                ("--keep-partial", args.keep_partial),
                (f"--rounds {args.rounds}", args.rounds is not None and args.rounds < COMPARABLE_ROUNDS),
            )
            if partial
        ),
        None,
    )


def _list(args: argparse.Namespace) -> int:
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
    from benchmarks.record import read_result

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


def _gpu(args: argparse.Namespace) -> int:
    from benchmarks import gpu

    return gpu.prove(args)


COMMANDS = {"run": _run, "list": _list, "report": _report, "compare": _compare, "bars": _bars, "gpu": _gpu}

if __name__ == "__main__":
    sys.exit(main())
