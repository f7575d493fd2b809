"""Running one case into one result file."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from benchmarks import ceilings
from benchmarks.contenders.peers import need
from benchmarks.record import RESULTS, BenchmarkError, environment, folder_name, require_writable, write_result
from benchmarks.registry import Case
from benchmarks.settings import Settings
from benchmarks.timing import ORDER_SEED, first_line, ieee_fp32, release
from slora.errors import WriteError


class CaseFailed(Exception):
    """A case raised what nobody has foreseen: which case, what it raised, and what is kept, in one line."""


def run_case(case: Case, settings: Settings, folder: Path | None = None, keep_partial: bool = False) -> Path:
    """Run `case` and write `<case>.json` into `folder`, by default the device's under `results/`; return its path.

    An interrupted run leaves the file that was there. With `keep_partial` what exists is written after every row,
    marked incomplete until the end.

    Raises:
        BenchmarkError: the device or a package is missing, the folder cannot be written into, or nothing was measured;
            or the file is written, and a contender in it has failed or was wrong.
        CaseFailed: the case raised something else, such as that a GPU is out of memory.
        KeyboardInterrupt: with what is kept as its text, where that is anything.
    """
    case.require_device(settings.device)
    device = folder_name(settings.device)
    require_writable(RESULTS / device if folder is None else folder)
    for package in case.packages:
        need(package)
    path: Path | None = None
    try:
        # What a case before this one has left, where it failed.
        release(settings.device)
        run = case.load()
        _require_contender(case, settings)
        ieee_fp32()
        limits = ceilings.measure(settings)
        payload: dict[str, Any] = {
            "environment": environment(settings.device),
            "settings": {
                "grid": settings.grid,
                "rounds": settings.rounds,
                "only": list(settings.only),
                "order_seed": ORDER_SEED,
            },
            "ceilings": limits,
            "complete": False,
            "rows": [],
        }
        for row in run(settings, limits):
            payload["rows"].append(row)
            if keep_partial:
                path = write_result(case.name, device, payload, folder)
    except (BenchmarkError, WriteError):
        raise
    except KeyboardInterrupt:
        raise KeyboardInterrupt(*([] if path is None else [_kept(path)])) from None
    except Exception as error:
        raise CaseFailed(f"case {case.name!r} failed: {first_line(error)}; {_kept(path)}") from error
    if not payload["rows"]:
        reason = f"no contender has {' or '.join(map(repr, settings.only))} in its name"
        if not settings.only:
            reason = "its grid is empty"
        raise BenchmarkError(f"case {case.name!r} measured nothing: {reason}; nothing was written")
    payload["complete"] = not settings.stopped
    path = write_result(case.name, device, payload, folder)
    said = {"refused": "a wrong result was not timed", "failed": "a contender failed"}
    faults = [
        f"{said[state]}: {row['contender']} at {row['point']}: {row[state]}"
        for state in said
        for row in payload["rows"]
        if state in row
    ]
    if faults:
        raise BenchmarkError(f"{path}: {'; '.join(faults)}")
    return path


def _require_contender(case: Case, settings: Settings) -> None:
    """Find out before anything is measured whether a contender is asked for, where the case lists its contenders."""
    names = case.contenders()
    if names is not None and not any(map(settings.wanted, names)):
        asked = " or ".join(map(repr, settings.only))
        raise BenchmarkError(
            f"case {case.name!r}: no contender has {asked} in its name; there are {'; '.join(names)}; nothing was "
            "measured"
        )


def _kept(path: Path | None) -> str:
    return "nothing of it was written" if path is None else f"what it measured before is in {path}"


def show(rows: list[dict[str, Any]], stream: Any = None) -> None:
    """Print the main time of every row."""
    from benchmarks.report.tables import headline

    for row in rows:
        point = " ".join(f"{key}={value}" for key, value in row["point"].items())
        print(f"{point:58} {row['contender']:38} {headline(row)}", file=stream or sys.stdout)
