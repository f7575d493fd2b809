"""The bars of `bars.toml` beside what was measured."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.record import RESULTS, BenchmarkError, median, results_in

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

FILE = Path(__file__).with_name("bars.toml")


@dataclass(frozen=True)
class Bar:
    """One bar at one point."""

    name: str
    device: str
    case: str
    where: dict[str, Any]
    contender: str
    measure: str
    against: str | None
    limit: float
    least: bool
    """Whether the limit is the least that is asked, rather than the most."""
    apart: tuple[str, ...]
    """Keys of `where` in which it differs from the other bars of its name."""

    @property
    def label(self) -> str:
        """The name with what sets it apart."""
        return ", ".join([self.name, *(f"{key} {self.where[key]}" for key in self.apart)])


def load(path: Path = FILE) -> list[Bar]:
    """Read the bars.

    Raises:
        BenchmarkError: an entry lacks a key.
    """
    bars = []
    with open(path, "rb") as file:
        entries = tomllib.load(file)["bars"]
    for entry in entries:
        try:
            for limit in entry["limits"]:
                own = {key: value for key, value in limit.items() if key not in ("at_most", "at_least")}
                bars.append(
                    Bar(
                        entry["name"], entry["device"], entry["case"], {**entry["where"], **own}, entry["contender"],
                        entry["measure"], entry.get("against"), limit.get("at_most", limit.get("at_least")),
                        "at_least" in limit, tuple(own),
                    )
                )  # fmt: skip
        except KeyError as error:
            raise BenchmarkError(f"{path}: the bar {entry.get('name')!r} has no {error}") from error
    return bars


def value(bar: Bar, result: dict[str, Any] | None) -> float | None:
    """What was measured, None where it was not."""
    if result is None:
        return None
    rows = [row for row in result["rows"] if all(row["point"].get(k) == v for k, v in bar.where.items())]

    def of(contender: str) -> float | None:
        return next((median(row.get(bar.measure)) for row in rows if row["contender"] == contender), None)

    own = of(bar.contender)
    if bar.against is None or own is None:
        return own
    other = of(bar.against)
    return own / other if other else None


def judged(folder: Path | None = None, results: Path = RESULTS) -> Iterator[tuple[Bar, float | None]]:
    """Every bar and what was measured: under `results`, or in `folder`, where only its device's bars count.

    Raises:
        BenchmarkError: `folder` is none, or a result file in it cannot be read.
    """
    if folder is not None and not folder.is_dir():
        raise BenchmarkError(f"{folder} is no folder; --results takes the folder of one device's result files")
    cache: dict[Path, dict[str, dict[str, Any]]] = {}
    device = _device_of(folder)
    for bar in load():
        if device not in (None, bar.device):
            continue
        where = results / bar.device if folder is None else folder
        if where not in cache:
            cache[where] = results_in(where)
        yield bar, value(bar, cache[where].get(bar.case))


def met(bar: Bar, found: float) -> bool:
    """Whether a measured bar is met."""
    return found >= bar.limit if bar.least else found <= bar.limit


def verdict(bar: Bar, found: float | None) -> str:
    """In words."""
    return "not measured" if found is None else "met" if met(bar, found) else "missed"


def lines(folder: Path | None = None) -> list[str]:
    """A table: measured, limit, verdict; the last line counts."""
    rows = list(judged(folder))
    if not rows:
        return [f"no bars are set for {_device_of(folder) if folder else 'any device'}; see {FILE.name}"]
    width = max(len(bar.label) for bar, _ in rows)
    found = [f"{'bar':{width}}  device       measured    limit"]
    for bar, number in rows:
        shown = "-" if number is None else f"{number:.3f}"
        sign = ">=" if bar.least else "<="
        found.append(f"{bar.label:{width}}  {bar.device:11} {shown:>9}  {sign} {bar.limit:<6g} {verdict(bar, number)}")
    counts = [sum(verdict(bar, number) == word for bar, number in rows) for word in ("met", "missed", "not measured")]
    return [*found, f"{counts[0]} met, {counts[1]} missed, {counts[2]} not measured"]


def _device_of(folder: Path | None) -> str | None:
    """The device whose results a folder holds, None where it holds none."""
    results = {} if folder is None else results_in(folder)
    return next((str(result["device"]) for result in results.values()), None)
