"""Packages that the report draws and counts with; no case needs them."""

from __future__ import annotations

from typing import Any

from benchmarks import results


def need(package: str) -> Any:
    """Import `package`.

    Raises:
        Missing: it is not installed, or does not import.
    """
    return results.need(package, "the report needs it: pip install -e '.[train]' --no-build-isolation")
