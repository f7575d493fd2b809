"""`python -m benchmarks`: run, report, compare, targets, compatibility, selection, gpu."""

from __future__ import annotations

import argparse
import math
import os
import signal
import sys
from collections.abc import Sequence
from pathlib import Path

from benchmarks import results
from benchmarks.results import CASES, RESULTS, BenchmarkError, made, read_result
from benchmarks.selection.command import add_options
from benchmarks.timing import first_line
from slora.errors import WriteError


def parser() -> argparse.ArgumentParser:
    """The command line."""
    top = argparse.ArgumentParser(prog="python -m benchmarks", description="What is fast, measured.")
    commands = top.add_subparsers(dest="command", required=True, metavar="COMMAND")

    cases = "; ".join(f"{name}: {case.summary}" for name, case in CASES.items())
    command = commands.add_parser("run", help="run cases and write results/<device>/<case>.json", description=cases)
    command.set_defaults(call=run)
    command.add_argument("--case", nargs="+", action="extend", required=True, choices=["all", *CASES], metavar="CASE")
    command.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    command.add_argument("--grid", choices=("tiny", "quick", "default"), default="default")
    command.add_argument("--only", nargs="+", action="extend", default=[], metavar="PART", help="parts of their names")
    command.add_argument("--seconds", type=float, help="begin no new point after this time; write after every point")
    command.add_argument("--out", type=Path, help="folder to write into (default: benchmarks/results/<device>)")

    command = commands.add_parser("report", help="write the pages, figures and tables that show the result files")
    command.set_defaults(call=report)
    command.add_argument("--check", action="store_true", help="write nothing; exit code 1 where a text is out of date")

    command = commands.add_parser("compare", help="what moved beyond noise between two result files")
    command.set_defaults(call=compare)
    command.add_argument("files", nargs=2, type=Path, metavar="FILE", help="before and after")

    command = commands.add_parser("targets", help="the targets: met, missed or not measured")
    command.set_defaults(call=targets)
    command.add_argument("--results", type=Path, help="a folder of result files of one device (default: results/*)")

    command = commands.add_parser("compatibility", help="which architectures slora adapts correctly")
    command.set_defaults(call=compatibility)
    command.add_argument("names", nargs="*", metavar="NAME", help="a part of library/family, such as timm/ or beit")
    command.add_argument("--jobs", type=int, default=1, help="processes at a time, of one thread each (default 1)")
    command.add_argument("--out", type=Path, help="folder to write into (default of the whole: benchmarks/results)")

    about = "selection strategies and ways of keeping old knowledge on equal terms; runs what is missing"
    command = commands.add_parser("selection", help=about)
    add_options(command)

    command = commands.add_parser("gpu", help="validation on a GPU")
    command.set_defaults(call=gpu)
    stages = "first: kernels, linear, merge (3 minutes); second: train steps, tests, profile (7 minutes)"
    command.add_argument("stage", nargs="?", choices=("first", "second", "all"), default="all", help=stages)
    command.add_argument("--parts", nargs="+", metavar="STEP", help="only these steps")
    command.add_argument("--seconds", type=float, help="all the time there is, its start included")
    command.add_argument("--out", type=Path, help="folder to write into (default: benchmarks/results/<device>)")
    command.add_argument("--commit", help="what to record as the commit where the source is no git repository")
    command.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU, the kernels interpreted")
    return top


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; return the exit code: 2 for what the user can change, 1 where a case or a text is wrong."""
    args = parser().parse_args(arguments)
    try:
        code: int = args.call(args)
        return code
    except (BenchmarkError, WriteError) as error:
        print(f"benchmarks: {error}", file=sys.stderr)
    except KeyboardInterrupt:
        print("\nbenchmarks: interrupted; what was written before is kept", file=sys.stderr)
    return 2


def run(args: argparse.Namespace) -> int:
    """Run cases; those after one that fails are run all the same."""
    if args.out is None and (args.only or args.seconds is not None or args.grid != "default"):
        raise BenchmarkError("a part of a run needs --out; results/ holds whole ones")
    measured = [name for name, case in CASES.items() if args.device in case.devices]
    names = dict.fromkeys(name for word in args.case for name in (measured if word == "all" else [word]))
    # The start of Python and torch counts.
    until = math.inf if args.seconds is None else results.process_began() + args.seconds
    settings = results.Settings(args.device, args.grid, tuple(args.only), until)
    code, errors = 0, []
    for name in names:
        try:
            path = results.run_case(name, settings, args.out)
            for row in read_result(path)["rows"]:
                point = " ".join(f"{key}={value}" for key, value in row["point"].items())
                print(f"{point:58} {row['contender']:38} {headline(row)}")
            print(path)
        except (BenchmarkError, WriteError) as error:
            errors.append(str(error))
            code = code or 2
        except Exception as error:
            errors.append(f"case {name!r} failed: {first_line(error)}")
            code = 1
    for message in dict.fromkeys(errors):
        print(f"benchmarks: {message}", file=sys.stderr)
    return code


def headline(row: results.Row) -> str:
    """The main measure of a row, or why it has none."""
    for state in results.NO_TIMES:
        if state in row:
            return f"{state}: {row[state]}"
    seconds = results.median(row.get("seconds", row.get("forward_backward")))
    return f"{row['peak_memory_mib']:.5g} MiB" if seconds is None else f"{1e3 * seconds:.4g} ms"


def report(args: argparse.Namespace) -> int:
    """Write what shows the result files, or say what is out of date."""
    from benchmarks.report import page

    stale = page.stale()
    if not args.check:
        page.write()
        return 0
    for path in stale:
        print(f"{path} is not what the result files give; run: python -m benchmarks report", file=sys.stderr)
    return 1 if stale else 0


def compare(args: argparse.Namespace) -> int:
    """Print what moved between two files."""
    from benchmarks import compare

    print("\n".join(compare.lines(*map(read_result, args.files))))
    return 0


def targets(args: argparse.Namespace) -> int:
    """Print the targets."""
    from benchmarks import targets

    if args.results and not args.results.is_dir():
        raise BenchmarkError(f"{args.results} is no folder; --results takes the folder of one device's result files")
    folders = [args.results] if args.results else [path for path in RESULTS.iterdir() if path.is_dir()]
    found = [cases for path in folders if (cases := results.results_in(path))]
    by_device = {str(next(iter(cases.values()))["device"]): cases for cases in found}
    print("\n".join(targets.lines(by_device, by_device if args.results else None)))
    return 0


def compatibility(args: argparse.Namespace) -> int:
    """Examine architectures; 1 where one is not adapted correctly."""
    from benchmarks.compatibility import census

    out = args.out or (None if args.names else RESULTS)
    if out is not None:
        made(out)
    rows = census.run(census.chosen(args.names), max(1, args.jobs), out)
    return 1 if any(row["verdict"] in ("wrong", "failed") for row in rows) else 0


def gpu(args: argparse.Namespace) -> int:
    """Validate a GPU."""
    from benchmarks import gpu

    if args.commit:
        os.environ["SLORA_COMMIT"] = args.commit
    return gpu.validate(args)


if __name__ == "__main__":
    # `timeout` and others who end a process politely are answered as Ctrl-C is; what the caller ignores stays ignored.
    if signal.getsignal(signal.SIGTERM) is not signal.SIG_IGN:
        signal.signal(signal.SIGTERM, signal.default_int_handler)
    sys.exit(main())
