"""Figures of a device: one layer beside its peers, one training step, and the cost of a layer along three curves."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from benchmarks.report.summary import Cases, memory_beside, steps
from benchmarks.report.tables import Row, points, shared, spelled
from benchmarks.results import source
from slora.io.atomic import write_atomically

# By the start of an implementation's name; the curves and the dashed lines of what is frozen are black.
COLOURS = {"slora": "#0072b2", "PEFT": "#b33c00", "full": "#8a8a8a", "addmm": "#f0e442", "": "#d0d0d0"}
FROZEN = ("frozen F.linear", "frozen, dx everywhere")
# The curves of `scaling`: the key of a point that each runs along, and what that is.
CURVES = {
    "active": ("active", "share of 16 blocks that is active"),
    "rank": ("r", "rank r"),
    "tokens": ("M", "rows of x"),
}
Panels = dict[str, list[Row]]
"""Rows by the label of their panel."""


def layer_panels(cases: Cases) -> Panels:
    """The rows of `linear` with all blocks active at rank 16: a panel per shape."""
    found = {}
    for rows in points(cases["linear"]["rows"]) if "linear" in cases else ():
        point = rows[0]["point"]
        if point["active"] == "1" and point["r"] == 16:
            label = f"{point['K']}→{point['N']}, {point['M']:,} rows\n{point['dtype']}: forward and backward"
            found[label] = [row for row in rows if "forward_backward" in row]
    return {label: rows for label, rows in found.items() if rows}


def step_panels(cases: Cases) -> Panels:
    """The rows of the first precision of the training step: time, and memory where it was measured."""
    rows = [*next(iter(steps(cases).values()), {}).values()]
    memory = [row for row in rows if "peak_memory_mib" in row]
    return {label: own for label, own in (("time of one step", rows), ("peak memory (MiB)", memory)) if own}


def curve_panels(cases: Cases) -> Panels:
    """The rows of each curve of `scaling` that has two points or more."""
    rows = [row for row in cases["scaling"]["rows"] if "forward_backward" in row] if "scaling" in cases else []
    found = {name: [row for row in rows if row["point"]["curve"] == name] for name in CURVES}
    return {name: rows for name, rows in found.items() if len(points(rows)) > 1}


def draw_bars(figure: Figure, panels: Panels) -> None:
    """A panel of bars for each label; dashed, what is frozen."""
    names = list(dict.fromkeys(row["contender"] for rows in panels.values() for row in rows))[::-1]
    columns, lines = min(len(panels), 4), -(-len(panels) // 4)
    figure.set_size_inches(2.5 + 2.6 * columns, (0.32 * len(names) + 1.2) * lines + 1.0)
    panes = figure.subplots(lines, columns, sharey=True, squeeze=False).flatten()
    for spare in panes[len(panels) :]:
        spare.remove()
    for axes, (label, rows) in zip(panes, panels.items(), strict=False):
        measure = "peak_memory_mib" if "MiB" in label else "seconds" if "seconds" in rows[0] else "forward_backward"
        axes.barh(names, [0.0] * len(names))
        for row in rows:
            values, ends = _spread([row[measure]])
            axes.barh(
                row["contender"], values, xerr=ends, color=_colour(row["contender"]), edgecolor="#404040", capsize=2
            )
            if row["contender"] in FROZEN:
                axes.axvline(values[0], color="black", linewidth=1.2, linestyle="--")
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter("{x:,g}" if "MiB" in label else EngFormatter("s"))
        axes.set_xlabel(label)


def draw_curves(figure: Figure, panels: Panels) -> None:
    """A panel per curve: measured times, those of the frozen layer, and dotted what the cost model predicts."""
    figure.set_size_inches(4.0 * len(panels), 4.2)
    panes = figure.subplots(1, len(panels), squeeze=False)[0]
    for axes, (curve, rows) in zip(panes, panels.items(), strict=True):
        key, label = CURVES[curve]
        for name in dict.fromkeys(row["contender"] for row in rows):
            own = sorted((r for r in rows if r["contender"] == name), key=lambda row: _number(row["point"][key]))
            xs = [_number(row["point"][key]) for row in own]
            times, ends = _spread([row["forward_backward"] for row in own])
            style, colour = ("s--", "black") if name in FROZEN else ("o-", _colour(name))
            axes.errorbar(xs, times, yerr=ends, fmt=style, color=colour, capsize=3, markersize=4.5, label=name)
            if all("predicted" in row for row in own):
                axes.plot(xs, [row["predicted"] for row in own], ":", color=colour, label=f"{name}, predicted")
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=-0.02 * axes.get_xlim()[1])
        axes.xaxis.set_major_formatter("{x:,g}")
        axes.set_xlabel(label)
        axes.yaxis.set_major_formatter(EngFormatter("s"))
    figure.axes[0].set_ylabel("forward and backward")
    figure.legend(*axes.get_legend_handles_labels(), ncols=3, loc="outside lower center", frameon=False)


# By the end of the file's name: the case, the title, what is taken from a device's results, and how that is drawn.
FIGURES: dict[str, tuple[str, str, Callable[[Cases], Panels], Callable[[Figure, Panels], None]]] = {
    "linear": ("linear", "One linear layer, all blocks active", layer_panels, draw_bars),
    "train-step": ("train_step", "One training step", step_panels, draw_bars),
    "scaling": ("scaling", "Cost of one linear layer", curve_panels, draw_curves),
}


def links(device: str, cases: Cases) -> dict[str, tuple[str, str]]:
    """`{case: (file name, title)}` of the figures that the results of `device` give."""
    return {case: (f"{device}-{name}.png", title) for name, (case, title, data, _) in FIGURES.items() if data(cases)}


def draw_all(results: dict[str, Cases], folder: Path) -> list[Path]:
    """Draw every figure that there are results for; return the files."""
    drawn = []
    for device, cases in results.items():
        for name, (case, title, data, draw) in FIGURES.items():
            panels = data(cases)
            if not panels:
                continue
            figure = Figure(layout="constrained", dpi=130)
            draw(figure, panels)
            for axes in figure.axes:
                axes.spines[["top", "right"]].set_visible(False)
            about, memory = cases[case]["environment"], memory_beside(cases) if case == "train_step" else None
            sources = source(about) + (f", memory: {source(memory['environment'])}" if memory else "")
            figure.suptitle(
                f"{title}: {spelled(shared([row for rows in panels.values() for row in rows]))}\n"
                f"{about['device']}, {sources}\n"
                "times: medians, and from the 20th to the 80th percentile",
                fontsize=10,
            )
            path = folder / f"{device}-{name}.png"
            # No date and no version inside: the same results give the same file.
            write_atomically(path, partial(figure.savefig, format="png", metadata={"Software": None}))
            drawn.append(path)
    return drawn


def _colour(name: str) -> str:
    return next(colour for start, colour in COLOURS.items() if name.startswith(start))


def _spread(measures: Sequence[Any]) -> tuple[list[float], Any]:
    """Medians, and how far below and above them the 20th and 80th percentiles are; None of numbers without any."""
    if not isinstance(measures[0], dict):
        return list(measures), None
    ends = [[m["median"] - m["p20"] for m in measures], [m["p80"] - m["median"] for m in measures]]
    return [m["median"] for m in measures], ends


def _number(text: Any) -> float:
    """The number of a coordinate, which may be a fraction such as "4/16"."""
    over, _, under = str(text).partition("/")
    return float(over) / float(under or 1)
