"""The table and the figure of `slora merge --sweep`: target against retention over the factor on the update."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from matplotlib.figure import Figure

from slora.report.style import colour_of, figure_style, framed, wrapped
from slora.runs.eval_table import shown

# The least width of an axis, in points of accuracy: a few images more or less must not look like much.
LEAST_SPAN = 2.0


def sweep_lines(result: Mapping[str, Any]) -> list[str]:
    """Return the result of `slora.training.sweep_run.sweep` as lines of a table, in percent and points."""
    what = [f"accuracy and loss on {result['data']}"]
    kept: list[tuple[str, float, list[float]]] = []
    if result["source"] is not None:
        what.append(f"k-NN on {result['source']}")
        kept.append(("k-NN", result["before"], [row["knn"] for row in result["scales"]]))
    if result["zero_shot"]:
        what.append(f"zero-shot accuracy on {', '.join(map(shown, result['zero_shot']))}")
    for name, before in result["zero_shot"].items():
        kept.append((shown(name), before, [row["zero_shot"][name] for row in result["scales"]]))
    wide = [max(9, len(name)) for name, _, _ in kept]
    heads = [f"{name:>{w}} {'points':>8}" for w, (name, _, _) in zip(wide, kept, strict=True)]
    lines = [", ".join(what), " ".join([f"  {'scale':>6} {'top-1':>9} {'loss':>8}", *heads])]
    if kept:
        firsts = [f"{before:{w}.2%} {'':>8}" for w, (_, before, _) in zip(wide, kept, strict=True)]
        lines.append(" ".join([f"  {'before':>6} {'':>9} {'':>8}", *firsts]).rstrip())
    for i, row in enumerate(result["scales"]):
        cells = [
            f"{after[i]:{w}.2%} {100 * (after[i] - before):+8.2f}"
            for w, (_, before, after) in zip(wide, kept, strict=True)
        ]
        lines.append(" ".join([f"  {row['scale']:>6g} {row['top1']:9.2%} {row['loss']:8.4f}", *cells]))
    return lines


def sweep_figure(result: Mapping[str, Any]) -> Figure:
    """Draw what `slora.training.sweep_run.sweep` returns: a point per scale, joined in the order of the scales.

    With zero-shot accuracy, its mean over the sets is the x axis, else k-NN on old data, and a line marks it before
    training; without both the scale is. Scales whose points fall together share a label.
    """
    rows = sorted(result["scales"], key=lambda row: float(row["scale"]))
    ys = [100 * row["top1"] for row in rows]
    sets = list(result["zero_shot"])
    known = bool(sets) or result["source"] is not None
    before, xs, label = 0.0, [row["scale"] for row in rows], "scale"
    if sets:
        before = 100 * fmean(result["zero_shot"].values())
        xs = [100 * fmean(row["zero_shot"].values()) for row in rows]
        label = f"zero-shot accuracy on {', '.join(map(shown, sets))} (%)"
    elif known:
        before, xs = 100 * result["before"], [100 * row["knn"] for row in rows]
        label = f"k-NN accuracy on {result['source']} (%)"
    best = max(rows, key=lambda row: float(row["top1"]))
    title = f"Accuracy on {result['data']} is highest, {100 * best['top1']:.1f} %, at scale {best['scale']:g}"
    with figure_style():
        figure, axes = framed(title, 3.3)
        colour = colour_of("selective")
        if known:
            axes.axvline(before, color=colour_of("muted"), linewidth=1, linestyle=(0, (4, 3)), zorder=1)
            axes.annotate(
                f"before fine-tuning: {before:.1f} %", (before, 0.04), xycoords=("data", "axes fraction"),
                xytext=(-5, 0), textcoords="offset points", ha="right", color=colour_of("muted"), fontsize=8,
            )  # fmt: skip
        axes.plot(xs, ys, "-", color=colour, linewidth=1.4, zorder=2)
        axes.plot(xs, ys, "o", color=colour, markersize=6, markeredgecolor=colour_of("paper"), zorder=3)
        axes.set(ylabel=f"accuracy on {result['data']} (%)")
        axes.set_xlabel("\n".join(wrapped(f"{label}, by the scale at each point" if known else label)))
        axes.set_ylim(_limits(ys, 0.16))
        axes.set_xlim(_limits([*xs, before], 0.14) if known else _limits(xs, 0.14, 0.0))
        near = (0.02 * (axes.get_xlim()[1] - axes.get_xlim()[0]), 0.03 * (axes.get_ylim()[1] - axes.get_ylim()[0]))
        for (x, y), scales in _together([row["scale"] for row in rows], xs, ys, near):
            axes.annotate(
                ", ".join(f"{scale:g}" for scale in scales), (x, y), xytext=(6, 5), textcoords="offset points",
                fontsize=8.5, color=colour_of("ink"),
            )  # fmt: skip
    return figure


def _limits(values: Sequence[float], margin: float, least: float = LEAST_SPAN) -> tuple[float, float]:
    """The limits of an axis with `margin`, a share of its width, on both sides of the values."""
    low, high = min(values), max(values)
    more = max(0.0, least - (high - low)) / 2
    edge = margin * (high - low + 2 * more) or 0.5
    return low - more - edge, high + more + edge


def _together(
    scales: Sequence[float], xs: Sequence[float], ys: Sequence[float], near: tuple[float, float]
) -> list[tuple[tuple[float, float], list[float]]]:
    """Points, each with the scales of all that are as near as `near` to it."""
    found: list[tuple[tuple[float, float], list[float]]] = []
    for scale, x, y in zip(scales, xs, ys, strict=True):
        for (other_x, other_y), shared in found:
            if abs(x - other_x) <= near[0] and abs(y - other_y) <= near[1]:
                shared.append(scale)
                break
        else:
            found.append(((x, y), [scale]))
    return found
