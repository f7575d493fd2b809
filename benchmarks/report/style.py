"""What all figures share: names in words, colours, the frame, and the spread of a measure."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from typing import Any

from benchmarks.report.packages import need
from benchmarks.results import median

# A contender's family by the start of its name. All seven colours stay apart for every kind of colour blindness
# (CIE76 difference 28 at least, simulated after Machado et al. 2009).
COLOURS = {
    "slora": ["#0072b2", "#8cd0f5", "#002b45"],
    "PEFT": ["#b33c00", "#f0a35e"],
    "full": ["#8a8a8a"],
    "addmm": ["#f0e442"],
    "": ["#d0d0d0"],
}
EDGE = {"edgecolor": "#404040", "linewidth": 0.5}
ERRORS = {"ecolor": "black", "elinewidth": 1.0, "capsize": 2.0}
WORDS = {
    "frozen F.linear": "frozen F.linear, forward and dx",
    "frozen, dx everywhere": "frozen, dx down to the first layer",
    "full": "full fine-tuning",
    "slora, auto": "slora, fastest form",
    "slora, torch": "slora, PyTorch calls",
    "slora, triton": "slora, Triton kernels",
    "PEFT, all": "PEFT, all layers",
    "PEFT, few": "PEFT, few layers",
    "addmm function": "addmm function, Unsloth's form",
}
POINT = {
    "model": "{}", "K": "{:,} inputs", "N": "{:,} outputs", "M": "{:,} rows of x", "r": "rank {}", "batch": "batch {}",
    "active": "{} blocks active",
}  # fmt: skip


def pyplot() -> Any:
    """matplotlib.pyplot, drawing into files.

    Raises:
        BenchmarkError: matplotlib cannot be imported.
    """
    matplotlib = need("matplotlib")
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def words(contender: str) -> str:
    """A contender's name for a reader who has not seen the code."""
    return WORDS.get(contender, contender)


def subject(points: Sequence[dict[str, Any]], left_out: Sequence[str] = ()) -> str:
    """What `points` have in common, in words, without the keys that are left out."""
    # In the order of `POINT`, what it does not know behind.
    keys = sorted(points[0], key=lambda key: [*POINT, key].index(key))
    shared = {key: points[0][key] for key in keys if all(point[key] == points[0][key] for point in points)}
    if shared.get("active") == "1":
        shared["active"] = "all"
    return ", ".join(POINT.get(key, "{}").format(value) for key, value in shared.items() if key not in left_out)


def family(contender: str) -> str:
    """The key of `COLOURS` that a contender belongs to."""
    return next(key for key in COLOURS if contender.startswith(key))


def colour(contender: str, among: Sequence[str]) -> str:
    """The colour of a contender among those of its figure."""
    members = [other for other in among if family(other) == family(contender)]
    shades = COLOURS[family(contender)]
    return shades[members.index(contender) % len(shades)]


def reach(measures: Sequence[Any], unit: float = 1.0) -> list[list[float]]:
    """How far the 20th and the 80th percentile of each measure are from its median, as matplotlib takes error bars."""
    ends = [(m["median"] - m["p20"], m["p80"] - m["median"]) if isinstance(m, dict) else (0.0, 0.0) for m in measures]
    return [[below / unit for below, _ in ends], [above / unit for _, above in ends]]


def heights(measures: Sequence[Any], unit: float = 1.0) -> list[float]:
    """The medians of measures."""
    return [(median(measure) or 0.0) / unit for measure in measures]


def open_frame(axes: Any) -> None:
    """Leave away the sides of the frame that say nothing."""
    axes.spines[["top", "right"]].set_visible(False)
