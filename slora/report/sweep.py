"""The figure of `slora merge --sweep`: target against retention over the factor on the update."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from matplotlib.figure import Figure

from slora.report.style import colour_of, figure_style, framed


def sweep_figure(result: Mapping[str, Any]) -> Figure:
    """Draw what `slora.training.sweep_run.sweep` returns: a point per scale, joined in the order of the scales.

    With k-NN on old data that is the x axis, and a line marks it before training; without, the scale is.
    """
    rows = sorted(result["scales"], key=lambda row: float(row["scale"]))
    ys = [100 * row["top1"] for row in rows]
    known = result["source"] is not None
    xs = [100 * row["knn"] for row in rows] if known else [row["scale"] for row in rows]
    best = max(rows, key=lambda row: float(row["top1"]))
    title = f"Accuracy on {result['data']} is highest, {100 * best['top1']:.1f} %, at scale {best['scale']:g}"
    with figure_style():
        figure, axes = framed(title, 3.3)
        colour = colour_of("selective")
        if known:
            before = 100 * result["before"]
            axes.axvline(before, color=colour_of("muted"), linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axes.annotate(
                f"before fine-tuning: {before:.1f} %", (before, 0.04), xycoords=("data", "axes fraction"),
                xytext=(-5, 0), textcoords="offset points", ha="right", color=colour_of("muted"), fontsize=8,
            )  # fmt: skip
        axes.plot(xs, ys, "-", color=colour, linewidth=1.4, zorder=2)
        axes.plot(xs, ys, "o", color=colour, markersize=6, markeredgecolor=colour_of("paper"), zorder=3)
        for row, x, y in zip(rows, xs, ys, strict=True):
            axes.annotate(
                f"{row['scale']:g}", (x, y), xytext=(6, 5), textcoords="offset points", fontsize=8.5,
                color=colour_of("ink"),
            )  # fmt: skip
        label = f"k-NN accuracy on {result['source']} (%), by the scale at each point" if known else "scale"
        axes.set(xlabel=label, ylabel=f"accuracy on {result['data']} (%)")
        axes.margins(0.14, 0.16)
    return figure
