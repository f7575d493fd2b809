"""The bars of `bars.toml` beside what was measured."""

from __future__ import annotations

import importlib
import operator
from collections.abc import Container, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from benchmarks.results import NOT_MEASURED, RESULTS, TIMES, BenchmarkError, median, read_result, results_in, source

# How a limit is spelled in the file, in a line and in a table, and what it asks.
SIGNS = {
    "at_most": ("<=", "at most", operator.le),
    "at_least": (">=", "at least", operator.ge),
    "exactly": ("=", "exactly", operator.eq),
}
KEYS = {"name", "device", "case", "where", "contender", "measure", "against", "limits"}
# Of a measure and of what it is divided by: what gives the least ratio, that of the medians, and the greatest one.
ENDS = (("p20", "p80"), ("median", "median"), ("p80", "p20"))
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
    asks: str
    """A key of `SIGNS`."""
    apart: tuple[str, ...]
    """Keys of `where` in which it differs from the other bars of its name."""

    @property
    def label(self) -> str:
        """The name with what sets it apart."""
        return ", ".join([self.name, *(f"{key} {self.where[key]}" for key in self.apart)])


class Found(NamedTuple):
    """What was measured of a bar.

    Attributes:
        number: of the medians; None where it was not measured.
        notes: why not, or what is wrong with the file that it is from.
        ends: the least and the greatest that the 20th and 80th percentiles give, where times have them.
        environment: of the file that it is from.
    """

    number: float | None
    notes: tuple[str, ...] = ()
    ends: tuple[float, float] | None = None
    environment: Mapping[str, Any] | None = None

    @property
    def text(self) -> str:
        """The number and its ends."""
        if self.number is None:
            return NOT_MEASURED
        return f"{self.number:.3f}" + (f" [{self.ends[0]:.3f}, {self.ends[1]:.3f}]" if self.ends else "")


def load(path: Path = FILE) -> list[Bar]:
    """Read the bars.

    Raises:
        BenchmarkError: an entry lacks a key or has an unknown one, or nothing here reads TOML.
    """
    bars = []
    for entry in _toml().loads(path.read_text(encoding="utf-8"))["bars"]:
        unknown = sorted(entry.keys() - KEYS)
        if unknown:
            raise BenchmarkError(f"{path}: the bar {entry.get('name')!r} has the unknown key {unknown[0]!r}")
        try:
            for limit in entry["limits"]:
                asked = [key for key in SIGNS if key in limit]
                if len(asked) != 1:
                    raise BenchmarkError(
                        f"{path}: a limit of the bar {entry['name']!r} needs one of {', '.join(SIGNS)}"
                    )
                own = {key: value for key, value in limit.items() if key not in SIGNS}
                device = entry["device"]
                bars += [
                    Bar(
                        entry["name"], name, entry["case"], {**entry.get("where", {}), **own}, entry["contender"],
                        entry["measure"], entry.get("against"), limit[asked[0]], asked[0], tuple(own),
                    )
                    for name in ([device] if isinstance(device, str) else device)
                ]  # fmt: skip
        except KeyError as error:
            raise BenchmarkError(f"{path}: the bar {entry.get('name')!r} has no {error}") from error
    return bars


def _toml() -> Any:
    """The standard library's reader, or the package that it comes from where Python is older than 3.11."""
    for name in ("tomllib", "tomli"):
        try:
            return importlib.import_module(name)
        except ImportError:
            continue
    raise BenchmarkError("the bars cannot be read: Python 3.10 needs the package tomli for that")


def value(bar: Bar, result: dict[str, Any] | None) -> Found:
    """What was measured of a bar; nothing where its two times were taken in different ways."""
    if result is None:
        return Found(None)
    rows = [row for row in result["rows"] if all(row["point"].get(k) == v for k, v in bar.where.items())]

    def of(contender: str | None) -> dict[str, Any]:
        return next((row for row in rows if row["contender"] == contender), {})

    own, other = of(bar.contender), of(bar.against)
    measure, base = own.get(bar.measure), 1.0 if bar.against is None else other.get(bar.measure)
    if measure is None or not median(base):
        return Found(None)
    about = result["environment"]
    if bar.against is not None and bar.measure in TIMES and own.get("clock") != other.get("clock"):
        clocks = " and ".join(str(row.get("clock", "unknown")) for row in (own, other))
        return Found(None, (f"taken by different clocks, {clocks}",), environment=about)
    notes = ["incomplete"] * (not result.get("complete", True))
    notes += ["unknown source"] * (about["commit"] is None or about["dirty"] is None)
    notes += ["source with changes"] * bool(about["dirty"])
    low, middle, high = (_at(measure, own_end) / _at(base, base_end) for own_end, base_end in ENDS)
    return Found(middle, tuple(notes), (low, high) if low < high else None, about)


def _at(measure: Any, end: str) -> float:
    """The median or a percentile of a measure, or the number that it is."""
    return float(measure[end] if isinstance(measure, Mapping) else measure)


def judged(
    folder: Path | None = None,
    results: Path = RESULTS,
    cases: Container[str] | None = None,
    device: str | None = None,
) -> Iterator[tuple[Bar, Found]]:
    """Every bar and what was measured: under `results`, or in `folder`, where only its device's bars count.

    `device` names that device; by default the files do. With `cases` only their files are read, and one that cannot
    be read costs no other case's bars.

    Raises:
        BenchmarkError: `folder` is none, or, without `cases`, a result file in it cannot be read.
    """
    if folder is not None and not folder.is_dir():
        raise BenchmarkError(f"{folder} is no folder; --results takes the folder of one device's result files")
    cache: dict[Path, dict[str, dict[str, Any]]] = {}
    device = device or _device_of(folder)
    for bar in load():
        if device is not None and not is_device(device, bar.device):
            continue
        where = _folder_of(bar.device, results) if folder is None else folder
        if cases is not None:
            yield bar, _in_file(bar, where / f"{bar.case}.json") if bar.case in cases else Found(None)
            continue
        if where not in cache:
            cache[where] = results_in(where)
        yield bar, value(bar, cache[where].get(bar.case))


def _in_file(bar: Bar, path: Path) -> Found:
    """What was measured of a bar according to one file; nothing, with the reason, where that cannot be read."""
    try:
        return value(bar, read_result(path))
    except BenchmarkError as error:
        return Found(None, (str(error),))


def is_device(name: str, asked: str) -> bool:
    """Whether `name` is the device `asked`, or a variant such as "nvidia-h200-nvl" of "nvidia-h200".

    A slice of a GPU, such as "nvidia-h200-mig-1g-18gb", is none: it has a part of its memory and processors.
    """
    return f"{name}-".startswith(f"{asked}-") and "-mig-" not in name.removeprefix(asked)


def met(bar: Bar, number: float) -> bool:
    """Whether a measured bar is met."""
    return bool(SIGNS[bar.asks][2](number, bar.limit))


def verdict(bar: Bar, found: Found) -> str:
    """In words; "within noise" where the least and the greatest ratio are on both sides of the limit."""
    if found.number is None:
        return NOT_MEASURED
    word = "met" if met(bar, found.number) else "missed"
    unclear = found.ends is not None and met(bar, found.ends[0]) != met(bar, found.ends[1])
    return word + ", within noise" * unclear


def by_machine(rows: Sequence[tuple[Bar, Found]]) -> dict[str, list[tuple[Bar, Found]]]:
    """The bars by what they were measured on: a machine with its commits, or a device of which there is nothing."""
    machines: dict[str, list[tuple[Bar, Found]]] = {}
    for bar, found in sorted(rows, key=lambda row: row[1].environment is None):
        about = found.environment
        machines.setdefault(f"{bar.device}: {NOT_MEASURED}" if about is None else str(about["device"]), []).append(
            (bar, found)
        )
    return {_with_commits(machine, rows): rows for machine, rows in machines.items()}


def _with_commits(machine: str, rows: Sequence[tuple[Bar, Found]]) -> str:
    cases: dict[str, dict[str, None]] = {}
    for bar, found in rows:
        if found.environment is not None:
            cases.setdefault(source(found.environment), {})[bar.case] = None
    commits = [f"{commit} ({', '.join(names)})" if len(cases) > 1 else commit for commit, names in cases.items()]
    return f"{machine}; {', '.join(commits)}" if commits else machine


def lines(folder: Path | None = None, cases: Container[str] | None = None, device: str | None = None) -> list[str]:
    """A table for each machine: measured, limit, verdict; the last line counts. `cases`, `device` as for `judged`."""
    rows = list(judged(folder, cases=cases, device=device))
    if not rows:
        return [f"no bars are set for {device or _device_of(folder) or 'any device'}; see {FILE.name}"]
    width = max(len(bar.label) for bar, _ in rows)
    shown = [f"{'bar':{width}}  {'measured':22} limit"]
    for machine, group in by_machine(rows).items():
        shown.append(f"-- {machine}")
        for bar, found in group:
            number = "-" if found.number is None else found.text
            said = ", ".join((verdict(bar, found), *found.notes))
            shown.append(f"{bar.label:{width}}  {number:22} {SIGNS[bar.asks][0]:2} {bar.limit:<6g} {said}")
    words = [verdict(bar, found) for bar, found in rows]
    counts = [sum(word.startswith(start) for word in words) for start in ("met", "missed", NOT_MEASURED)]
    partial = sum(found.number is not None and bool(found.notes) for _, found in rows)
    last = f"{counts[0]} met, {counts[1]} missed, {counts[2]} {NOT_MEASURED}"
    return [*shown, last + (f"; {partial} of them by incomplete files or changed source" if partial else "")]


def _folder_of(device: str, results: Path) -> Path:
    """The folder of `device` under `results`, or the first one of a variant."""
    variants = sorted(path for path in results.glob(f"{device}-*") if path.is_dir() and is_device(path.name, device))
    return next((path for path in (results / device, *variants) if path.is_dir()), results / device)


def _device_of(folder: Path | None) -> str | None:
    """The device whose results a folder holds, None where it holds none."""
    results = {} if folder is None else results_in(folder)
    return next((str(result["device"]) for result in results.values()), None)
