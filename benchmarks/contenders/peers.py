"""Packages that a case compares with: imported when asked for, with a reason where they are missing or fail."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from benchmarks.record import BenchmarkError
from benchmarks.timing import first_line


class Missing(BenchmarkError):
    """A contender cannot run here. A case that can do without it records the reason; one that cannot ends."""


def need(package: str, remedy: str = "install it, or leave its contenders out") -> Any:
    """Import `package`.

    Raises:
        Missing: it is not installed, or does not import.
    """
    try:
        return importlib.import_module(package)
    except Exception as error:
        # Not only ImportError: a package that does not fit this torch fails in many ways.
        raise Missing(f"{package} cannot be imported ({first_line(error)}); {remedy}") from error


@contextmanager
def reason_in(row: dict[str, Any]) -> Iterator[None]:
    """Put into `row` why a contender has no times: what was raised inside ends here, so that the others get theirs."""
    try:
        yield
    except Missing as reason:
        row["skipped"] = str(reason)
    except Exception as error:
        row["failed"] = first_line(error)


@contextmanager
def reasons_in(rows: Mapping[str, dict[str, Any]]) -> Iterator[None]:
    """The same for all contenders of a point, whose rows have neither times nor a reason yet."""
    state: dict[str, Any] = {}
    with reason_in(state):
        yield
    for row in rows.values() if state else ():
        if not row.keys() & {"skipped", "failed", "refused", "seconds", "forward_backward"}:
            for key in row.keys() - {"point", "contender"}:
                del row[key]
            row.update(state)
