"""What the first page takes from several result files: one training step, lower limits, and the targets."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from benchmarks.report.tables import Row, named, points, ratio
from benchmarks.targets import Judged

Cases = dict[str, dict[str, Any]]
"""The result files of one device, by case."""
LIMITS: list[dict[str, Any]] = yaml.safe_load(Path(__file__).with_name("limits.yaml").read_text(encoding="utf-8"))


def steps(cases: Cases) -> dict[str, dict[str, Row]]:
    """The rows of one training step by precision and implementation, of the first of several models.

    They have the peak memory of `train_memory` where that is of the same machine. A step that is one CUDA graph is a
    precision of its own.
    """
    rows = cases["train_step"]["rows"] if "train_step" in cases else []
    memory = memory_beside(cases) or {"rows": []}
    measured = [row for row in memory["rows"] if "peak_memory_mib" in row]
    peaks = {(row["point"]["precision"], row["contender"]): row["peak_memory_mib"] for row in measured}
    found: dict[str, dict[str, Row]] = {}
    for row in rows:
        point, name = row["point"], row["contender"]
        same = all(point[key] == rows[0]["point"][key] for key in ("model", "batch", "r"))
        if "seconds" in row and same and point["mode"] in ("eager", "graph"):
            column = point["precision"] + ", CUDA graph" * (point["mode"] == "graph")
            peak = row.get("peak_memory_mib", peaks.get((point["precision"], name)))
            found.setdefault(column, {})[name] = {**row, **({} if peak is None else {"peak_memory_mib": peak})}
    return found


def memory_beside(cases: Cases) -> dict[str, Any] | None:
    """The result of `train_memory`, where it is of the machine that `train_step` is of."""
    devices = [cases[case]["environment"]["device"] for case in ("train_step", "train_memory") if case in cases]
    return cases["train_memory"] if len(devices) == 2 and devices[0] == devices[1] else None


def over_limit(entry: dict[str, Any], cases: Cases) -> str:
    """The ratio that an entry of `LIMITS` asks for."""
    for rows in points(cases[entry["case"]]["rows"]) if entry["case"] in cases else ():
        if all(rows[0]["point"].get(key) == value for key, value in entry["where"].items()):
            base = named(rows, entry["limit"])
            found = [ratio(named(rows, name), base, entry["measure"]) for name in entry["implementations"]]
            return next((text for text in found if text != "-"), "-")
    return "-"


def unmeasured(judged: Sequence[Judged]) -> list[list[str]]:
    """Devices, name, points and limit of the targets that were not measured, each once for all devices and points."""
    merged: dict[tuple[str, str], tuple[dict[str, None], dict[str, None]]] = {}
    for name, limit, device in ((one.row[0], one.row[2], one.target.device) for one in judged if one.number is None):
        # A name ends in its point, such as ", K 768, N 768".
        start = re.sub(r"(, [KN] \d+)+$", "", name)
        devices, at = merged.setdefault((start, limit), ({}, {}))
        devices[device] = at[name.removeprefix(start).removeprefix(", ")] = None
    return [[", ".join(devices), start, "; ".join(at), limit] for (start, limit), (devices, at) in merged.items()]
