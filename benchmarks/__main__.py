"""`python -m benchmarks`: run, list, report, compare, targets, compatibility, gpu."""

from __future__ import annotations

import argparse
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

COMMIT = "what to record as the commit where the source is no git repository"


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
    grid.add_argument("--grid", choices=("tiny", "quick", "default", "full"), help=argparse.SUPPRESS)
    # Of several actions for one name argparse takes the default of the first.
    run.set_defaults(grid="default")
    run.add_argument("--rounds", type=int, help="repetitions of every implementation (default: what suits the case)")
    run.add_argument("--only", nargs="+", action="extend", default=[], metavar="PART", help="parts of their names")
    run.add_argument("--threads", type=int, help="threads of PyTorch on the CPU (default: its own choice)")
    run.add_argument(
        "--seconds", type=float, help="begin no new point of a case after this time; its first is measured in any case"
    )
    run.add_argument("--out", type=Path, help="folder to write into (default: benchmarks/results/<device>)")
    run.add_argument("--keep-partial", action="store_true", help="write after every point, marked incomplete")
    run.add_argument("--commit", help=COMMIT)

    commands.add_parser("list", help="name the cases")

    report = commands.add_parser(
        "report", help="write benchmarks/README.md, the figures, docs/compatibility.md, README's tables"
    )
    report.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a text is out of date")

    compare = commands.add_parser("compare", help="what moved beyond noise between two result files")
    compare.add_argument("before", type=Path)
    compare.add_argument("after", type=Path)

    targets = commands.add_parser("targets", aliases=["bars"], help="the targets: met, missed or not measured")
    targets.add_argument("--results", type=Path, help="a folder of result files of one device (default: results/*)")

    census = commands.add_parser(
        "compatibility", help="which architectures slora adapts correctly: docs/compatibility.md"
    )
    census.add_argument("names", nargs="*", metavar="NAME", help="a library, a family, library/family or a part of it")
    census.add_argument("--quick", action="store_true", help="a few of every kind")
    census.add_argument("--jobs", type=int, default=1, help="processes at a time, of one thread each (default 1)")
    census.add_argument("--seconds", type=float, default=600, help="after which one is ended (default 600)")
    census.add_argument("--out", type=Path, help="folder to write into (default of the whole: benchmarks/results)")

    gpu = commands.add_parser("gpu", help="validation on a GPU: build, kernels, cases, tests, sanitizer, profile")
    gpu.add_argument(
        "stage", nargs="?", choices=("first", "second"),
        help="first: build, candidates, linear, merge (4 minutes); second: train steps, tests, profile (7 minutes); "
        "without it all parts (9 minutes)",
    )  # fmt: skip
    gpu.add_argument("--out", type=Path, help="folder to write into (default: benchmarks/results/<device>)")
    gpu.add_argument("--commit", help=COMMIT)
    gpu.add_argument(
        "--seconds", type=float, help="all the time there is, its start included (default 240, 400, or 530 of all)"
    )
    gpu.add_argument("--parts", nargs="+", action="extend", metavar="PART", help="only these parts")
    gpu.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, the kernels interpreted")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 2 for what the user can change, 1 where a case or a text is wrong."""
    args = parser().parse_args(arguments)
    if getattr(args, "commit", None):
        os.environ["SLORA_COMMIT"] = args.commit
    from benchmarks.results import BenchmarkError
    from slora.errors import WriteError

    try:
        return COMMANDS[args.command](args)
    except (BenchmarkError, WriteError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nbenchmarks: interrupted; only what --keep-partial wrote is there", file=sys.stderr)
    return 2


def _run(args: argparse.Namespace) -> int:
    import torch

    from benchmarks.results import CASES, BenchmarkError, Settings, find, process_began, read_result, run_case
    from benchmarks.timing import COMPARABLE_ROUNDS, first_line
    from slora.errors import WriteError

    if args.threads is not None:
        if args.threads < 1:
            raise BenchmarkError(f"--threads {args.threads} is not a positive number")
        torch.set_num_threads(args.threads)
    partial = {
        "--only": args.only,
        f"the {args.grid} grid": args.grid in ("tiny", "quick"),
        "--seconds": args.seconds is not None,
        "--keep-partial": args.keep_partial,
        f"--rounds {args.rounds}": args.rounds is not None and args.rounds < COMPARABLE_ROUNDS,
    }
    if args.out is None and any(partial.values()):
        option = next(option for option in partial if partial[option])
        raise BenchmarkError(f"{option} needs --out; results/ holds whole runs of {COMPARABLE_ROUNDS} or more rounds")
    measured = [name for name, case in CASES.items() if args.device in case.devices]
    names = [name for word in args.case for name in (measured if word == "all" else [word])]
    code, errors = 0, []
    for i, case in enumerate([find(name) for name in dict.fromkeys(names)]):
        settings = Settings(args.device, args.grid, args.rounds, tuple(args.only), args.seconds)
        if i == 0:
            # The start of Python and torch counts as time of the first case.
            settings.started = process_began()
        # The other cases do not depend on one that fails.
        try:
            path = run_case(case, settings, args.out, args.keep_partial)
            for row in read_result(path)["rows"]:
                point = " ".join(f"{key}={value}" for key, value in row["point"].items())
                print(f"{point:58} {row['contender']:38} {_headline(row)}")
            print(path)
        except (BenchmarkError, WriteError) as error:
            errors.append(str(error))
            code = code or 2
        except Exception as error:
            errors.append(f"case {case.name!r} failed: {first_line(error)}")
            code = 1
    for message in errors:
        print(f"benchmarks: {message}", file=sys.stderr)
    return code


def _headline(row: dict[str, Any]) -> str:
    from benchmarks.results import median

    for state in ("skipped", "failed", "refused"):
        if state in row:
            return f"{state}: {row[state]}"
    name = next((n for n in ("seconds", "forward_backward", "device_seconds", "peak_memory_mib") if n in row), None)
    value = median(row[name]) if name else None
    return "" if value is None else f"{value:.5g} MiB" if name == "peak_memory_mib" else f"{1e3 * value:.4g} ms"


def _list(args: argparse.Namespace) -> int:
    from benchmarks.results import CASES

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
    from benchmarks.results import BenchmarkError, read_result

    results = [read_result(path) for path in (args.before, args.after)]
    for path, result in zip((args.before, args.after), results, strict=True):
        if "rows" not in result:
            raise BenchmarkError(f"{path} holds no measurements to compare")
    print("\n".join(compare.lines(*results)))
    return 0


def _targets(args: argparse.Namespace) -> int:
    from benchmarks import targets
    from benchmarks.results import RESULTS, BenchmarkError, results_in

    if args.results and not args.results.is_dir():
        raise BenchmarkError(f"{args.results} is no folder; --results takes the folder of one device's result files")
    folders = [args.results] if args.results else [path for path in RESULTS.iterdir() if path.is_dir()]
    found = [results for path in folders if (results := results_in(path))]
    by_device = {str(next(iter(results.values()))["device"]): results for results in found}
    print("\n".join(targets.lines(by_device, by_device if args.results else None)))
    return 0


def _compatibility(args: argparse.Namespace) -> int:
    from benchmarks.compatibility import census
    from benchmarks.results import RESULTS, BenchmarkError, require_writable

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

    return gpu.validate(args)


COMMANDS = {
    "run": _run,
    "list": _list,
    "report": _report,
    "compare": _compare,
    "targets": _targets,
    "bars": _targets,
    "compatibility": _compatibility,
    "gpu": _gpu,
}


if __name__ == "__main__":
    # `timeout` and others who end a process politely are answered as Ctrl-C is; what the caller ignores stays ignored.
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
