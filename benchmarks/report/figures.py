"""Figures of a device: one layer beside its peers, and one training step."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter

from benchmarks.report.tables import Cases, Row, points, shared, spelled, steps
from benchmarks.results import median, source
from slora.io.atomic import write_atomically

# By the start of an implementation's name.
COLOURS = {"slora": "#0072b2", "PEFT": "#b33c00", "full": "#8a8a8a", "addmm": "#f0e442", "": "#d0d0d0"}
# Its time is a dashed line, too.
FROZEN = ("frozen F.linear", "frozen, dx everywhere")
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


# By the end of the file's name: the case, the title, and what is taken from a device's results.
FIGURES: dict[str, tuple[str, str, Callable[[Cases], Panels]]] = {
    "linear": ("linear", "One linear layer, all blocks active", layer_panels),
    "train-step": ("train_step", "One training step", step_panels),
}


def draw_bars(figure: Figure, panels: Panels) -> None:
    """A panel of bars for each label: medians, and from the 20th to the 80th percentile."""
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
            name, time, middle = row["contender"], row[measure], median(row[measure])
            ends: Any = None if "MiB" in label else [[middle - time["p20"]], [time["p80"] - middle]]
            colour = next(colour for start, colour in COLOURS.items() if name.startswith(start))
            axes.barh(name, [middle], xerr=ends, color=colour, edgecolor="#404040", capsize=2)
            if name in FROZEN:
                axes.axvline(middle, color="black", linewidth=1.2, linestyle="--")
        axes.locator_params(axis="x", nbins=5)
        axes.xaxis.set_major_formatter("{x:,g}" if "MiB" in label else EngFormatter("s"))
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)


def links(device: str, cases: Cases) -> dict[str, tuple[str, str]]:
    """`{case: (file name, title)}` of the figures that the results of `device` give."""
    return {case: (f"{device}-{name}.png", title) for name, (case, title, data) in FIGURES.items() if data(cases)}


def draw_all(results: dict[str, Cases], folder: Path) -> list[Path]:
    """Draw every figure that there are results for; return the files."""
    drawn = []
    for device, cases in results.items():
        for case, title, data in FIGURES.values():
            if not (panels := data(cases)):
                continue
            figure, about = Figure(layout="constrained", dpi=130), cases[case]["environment"]
            draw_bars(figure, panels)
            common = spelled(shared([row for rows in panels.values() for row in rows]))
            figure.suptitle(f"{title}: {common}\n{about['device']}, {source(about)}", fontsize=10)
            path = folder / links(device, cases)[case][0]
            # No date and no version inside: the same results give the same file.
            write_atomically(path, partial(figure.savefig, format="png", metadata={"Software": None}))
            drawn.append(path)
    return drawn
