"""Packages that the report draws and counts with; no case needs them."""

from __future__ import annotations

import importlib
from typing import Any

from benchmarks.record import BenchmarkError
from benchmarks.timing import first_line


def need(package: str) -> Any:
    """Import `package`.

    Raises:
        BenchmarkError: it is not installed, or does not import.
    """
    try:
        return importlib.import_module(package)
    except Exception as error:
        # Not only ImportError: a package that does not fit the others fails in many ways.
        raise BenchmarkError(
            f"{package} cannot be imported ({first_line(error)}); the report needs it: "
            "pip install -e '.[train]' --no-build-isolation"
        ) from error
