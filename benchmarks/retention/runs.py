"""The stored runs: a JSON line each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

RUNS = "runs.jsonl"


def read(path: Path) -> list[dict[str, Any]]:
    """Return the stored runs, none if there is no file."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.exists() else []
