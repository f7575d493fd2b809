"""The targets of `targets.toml` beside what was measured."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.results import NOT_MEASURED, TIMES, BenchmarkError, median, need, source

FILE = Path(__file__).with_name("targets.toml")
# What a limit asks.
ASKS = {"at_most": operator.le, "at_least": operator.ge, "exactly": operator.eq}
# Of a measure and of what it is divided by: for the least ratio, the ratio of the medians, and the greatest one.
ENDS = (("p20", "p80"), ("median", "median"), ("p80", "p20"))
Results = Mapping[str, Mapping[str, Any]]
"""Result files by the name of the case."""


@dataclass(frozen=True)
class Target:
    """A limit at one point: for a measure of an implementation, or for its ratio to that of another one (`against`)."""

    name: str
    title: str
    """The name without the point."""
    device: str
    case: str
    where: Mapping[str, Any]
    contender: str
    measure: str
    asks: str
    limit: float
    against: str | None = None


@dataclass(frozen=True)
class Judged:
    """A target and what was measured.

    Attributes:
        number: of the medians; None where nothing was measured.
        ends: the least and the greatest number that the 20th and 80th percentiles give.
        note: what is wrong with the measurement.
        origin: the machine and the commit.
    """

    target: Target
    number: float | None = None
    ends: tuple[float, float] = (0.0, 0.0)
    note: str = ""
    origin: str = NOT_MEASURED

    @property
    def verdict(self) -> str:
        """Met or missed; "within noise" where the limit lies between the two ends."""
        if self.number is None:
            return NOT_MEASURED
        met, low, high = (bool(ASKS[self.target.asks](n, self.target.limit)) for n in (self.number, *self.ends))
        return ("met" if met else "missed") + ", within noise" * (low != high)

    @property
    def row(self) -> list[str]:
        """Target, measured, limit and verdict, for a table."""
        low, high = self.ends
        number = "-" if self.number is None else f"{self.number:.3f}" + f" [{low:.3f}, {high:.3f}]" * (low < high)
        limit = f"{self.target.asks.replace('_', ' ')} {self.target.limit:g}"
        return [self.target.name, number, limit, ", ".join(filter(None, (self.verdict, self.note)))]


def load() -> list[Target]:
    """Read the targets: of an entry one for each device, limit and point.

    Raises:
        BenchmarkError: nothing here reads TOML (Python 3.10 needs the package tomli).
    """
    try:
        toml = need("tomllib")
    except BenchmarkError:
        toml = need("tomli", "Python 3.10 needs it to read the targets")
    file, targets = toml.loads(FILE.read_text(encoding="utf-8")), []
    for entry in file["targets"]:
        title, devices, limits = entry.pop("name"), entry.pop("devices"), entry.pop("limits")
        points = file["points"][entry.pop("points", "one")]
        for device, limit, point in itertools.product(devices, limits, points):
            (asks,) = limit.keys() & ASKS.keys()
            own = {key: value for key, value in limit.items() if key != asks} | point
            name = ", ".join([title, *(f"{key} {value}" for key, value in own.items())])
            own = entry | {"where": entry["where"] | own}
            targets.append(Target(name, title, device, **own, asks=asks, limit=limit[asks]))
    return targets


def judge(target: Target, result: Mapping[str, Any]) -> Judged:
    """Look up a target in the result file of its case; times that were taken by different clocks have no ratio."""
    rows = [row for row in result["rows"] if target.where.items() <= row["point"].items()]
    of = {row["contender"]: row for row in rows}
    own, other = of.get(target.contender, {}), of.get(target.against or "", {})
    measure, base = own.get(target.measure), other.get(target.measure) if target.against else 1.0
    if measure is None or not median(base):
        return Judged(target)
    if target.against and target.measure in TIMES and own.get("clock") != other.get("clock"):
        return Judged(target, note=f"taken by different clocks, {own.get('clock')} and {other.get('clock')}")
    low, middle, high = (_at(measure, end) / _at(base, other_end) for end, other_end in ENDS)
    origin = f"{result['environment']['device']}, {source(result['environment'])}"
    return Judged(target, middle, (low, high), "" if result["complete"] else "incomplete", origin)


def _at(measure: Any, end: str) -> float:
    return float(measure[end] if isinstance(measure, Mapping) else measure)


def is_device(name: str, asked: str) -> bool:
    """Whether `name` is the device `asked` or a variant of it, as "nvidia-h200-nvl" is of "nvidia-h200".

    A MIG slice, such as "nvidia-h200-mig-1g-18gb", is not: it has a part of the memory and of the SMs.
    """
    return f"{name}-".startswith(f"{asked}-") and "-mig-" not in name.removeprefix(asked)


def judged(results: Mapping[str, Results], devices: Iterable[str] | None = None) -> list[Judged]:
    """Every target and what was measured; `results` by device. With `devices` only their targets."""
    found = []
    for target in load():
        if devices is None or any(is_device(device, target.device) for device in devices):
            here = next((cases for device, cases in results.items() if is_device(device, target.device)), {})
            found.append(judge(target, here[target.case]) if target.case in here else Judged(target))
    return found


def lines(results: Mapping[str, Results], devices: Iterable[str] | None = None) -> list[str]:
    """A table for people by machine and commit, and a last line that counts."""
    found, shown = judged(results, devices), list[str]()
    widths = [max((len(one.row[i]) for one in found), default=0) for i in range(3)]
    for origin in dict.fromkeys(one.origin for one in found):
        shown.append(f"-- {origin}")
        shown += ["  ".join(map(str.ljust, one.row, [*widths, 0])) for one in found if one.origin == origin]
    counts = {word: sum(one.verdict.startswith(word) for one in found) for word in ("met", "missed", NOT_MEASURED)}
    return [*shown, ", ".join(f"{count} {word}" for word, count in counts.items())]
