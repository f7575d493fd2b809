"""Figures: which blocks live, target against retention, values over steps, one bar per method.

Each function returns a matplotlib `Figure` that was made without pyplot, so nothing global changes and no display
is needed. Colours are those of `PALETTE`; `slora.report.page` swaps them for CSS variables, so that a figure in a
page follows the reader's light or dark theme. Methods differ in colour (Okabe and Ito's palette, told apart by
colour-blind readers), in marker and in line style.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any, cast

from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from slora.report.style import DASHES, MARKERS, TICK_STEPS, colour_of, figure_style, framed

# One value per run: a pair of x and y values of equal length.
Line = tuple[Sequence[float], Sequence[float]]


def target_against_retention(
    runs: Mapping[str, Sequence[tuple[float, float]]],
    before: float,
    title: str,
    labels: Mapping[str, str] | None = None,
    *,
    measure: str = "k-NN accuracy on the source",
    paths: Mapping[str, Sequence[tuple[float, float]]] | None = None,
) -> Figure:
    """Draw each run as a small mark and each method's mean as a large one with its standard deviation.

    Args:
        runs: `{method: [(accuracy on the source after, accuracy on the target), ...]}`, each from 0 to 1.
        before: accuracy on the source before fine-tuning, 0 to 1; a vertical line.
        title: what the figure shows.
        labels: `{method: name to print}`; by default the method's own.
        measure: what is measured on the source.
        paths: `{method: points}` that a line joins, such as those of its update scaled.
    """
    with figure_style():
        figure, axes = framed(title, 3.5 + 0.1 * len(runs))
        for method, points in (paths or {}).items():
            axes.plot(
                [100 * x for x, _ in points], [100 * y for _, y in points], color=colour_of(method), linewidth=1.2,
                linestyle=DASHES["linear"], zorder=1,
            )  # fmt: skip
        axes.axvline(100 * before, color=colour_of("muted"), linewidth=1, linestyle=(0, (4, 3)), zorder=1)
        for method, points in runs.items():
            xs, ys = [100 * x for x, _ in points], [100 * y for _, y in points]
            colour, marker = colour_of(method), MARKERS.get(method, "o")
            axes.plot(xs, ys, marker, color=colour, markersize=4, alpha=0.5, markeredgewidth=0, zorder=2)
            axes.errorbar(
                fmean(xs), fmean(ys), xerr=_spread(xs), yerr=_spread(ys), fmt=marker, color=colour, markersize=9,
                markeredgecolor=colour_of("paper"), elinewidth=1.3, capsize=3, zorder=3,
                label=(labels or {}).get(method, method),
            )  # fmt: skip
        axes.set(xlabel=f"{measure} after fine-tuning (%)", ylabel="accuracy on the target (%)")
        axes.margins(0.12, 0.16)
        low, high = axes.get_xlim()
        axes.set_xlim(low, max(high, 100 * before + 0.1 * (high - low)))
        axes.annotate(
            f"before fine-tuning: {100 * before:.1f} %", (100 * before, 0.5), xycoords=("data", "axes fraction"),
            xytext=(5, 0), textcoords="offset points", va="center", rotation=90, color=colour_of("muted"), fontsize=8,
        )  # fmt: skip
        # A legend, because the marks are too close for labels.
        handles, names = axes.get_legend_handles_labels()
        marks = [handle[0] for handle in cast(list[Any], handles)]
        figure.legend(marks, names, loc="outside lower center", ncols=2, fontsize=8.5, columnspacing=1.4)
    return figure


def curves(
    lines: Mapping[str, Sequence[Line]],
    title: str,
    ylabel: str,
    *,
    xlabel: str = "optimizer step",
    labels: Mapping[str, str] | None = None,
    percent: bool = False,
    log: bool = False,
    zero: bool = False,
) -> Figure:
    """Draw values over steps: for each name the mean over its runs, and a band from minimum to maximum.

    Args:
        lines: `{name: one (x, y) per run}`; the runs of a name share their x. Methods have their own style, other names
            use those of the methods in turn.
        title: what the figure shows.
        ylabel: the quantity, with its unit.
        labels: `{name: name to print}`; a single name gets no legend.
        percent: whether y is from 0 to 1 and printed as a percentage.
        log: whether the y axis is logarithmic.
        zero: whether the y axis starts at 0.
    """
    drawn = {name: runs for name, all_runs in lines.items() if (runs := [run for run in all_runs if len(run[0])])}
    with figure_style():
        figure, axes = framed(title, 3.3 if len(drawn) > 1 else 2.9)
        for i, (name, runs) in enumerate(drawn.items()):
            look = name if name in MARKERS else ("selective", "lora", "full", "linear")[i % 4]
            count = min(len(y) for _, y in runs)
            x, ys = list(runs[0][0][:count]), [list(y[:count]) for _, y in runs]
            mean = [fmean(values) for values in zip(*ys, strict=True)]
            colour = colour_of(look)
            if len(ys) > 1:
                low, high = ([pick(v) for v in zip(*ys, strict=True)] for pick in (min, max))
                axes.fill_between(x, low, high, color=colour, alpha=0.15, linewidth=0)
            axes.plot(
                x, mean, color=colour, linewidth=1.7, linestyle=DASHES[look],
                marker=MARKERS[look] if count == 1 else None, label=(labels or {}).get(name, name),
            )  # fmt: skip
        axes.set(xlabel=xlabel, ylabel=ylabel)
        if log:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_formatter(NullFormatter())
        else:
            axes.yaxis.set_major_locator(MaxNLocator(5, steps=TICK_STEPS))
        if percent:
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:g}"))
        if zero:
            axes.set_ylim(bottom=0)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=TICK_STEPS))
        axes.margins(x=0.02)
        if len(drawn) > 1:
            figure.legend(loc="outside lower center", ncols=4, fontsize=8.5, handlelength=2.6, columnspacing=1.4)
    return figure


def bars(
    values: Mapping[str, Sequence[float]], title: str, xlabel: str, labels: Mapping[str, str] | None = None,
    form: str = "{:.1f}",
) -> Figure:  # fmt: skip
    """Draw one bar per method: the mean over its runs, each run as a mark, the mean as a number.

    Args:
        values: `{method: one value per run}`, in the unit of `xlabel`.
        title: what the figure shows.
        xlabel: the quantity, with its unit.
        labels: `{method: name to print}`.
        form: how a mean is printed, as for `str.format`.
    """
    methods = list(values)
    with figure_style():
        figure, axes = framed(title, 0.95 + 0.34 * len(methods))
        for row, method in enumerate(methods):
            runs, mean = values[method], fmean(values[method])
            axes.barh(row, mean, height=0.62, color=colour_of(method), alpha=0.85)
            if len(set(runs)) > 1:
                axes.plot(runs, [row] * len(runs), "|", color=colour_of("ink"), markersize=9, markeredgewidth=1.2)
            axes.annotate(
                form.format(mean), (max(*runs, mean, 0), row), xytext=(5, 0), textcoords="offset points", va="center"
            )
        axes.set_yticks(range(len(methods)), [(labels or {}).get(method, method) for method in methods])
        axes.set(ylim=(len(methods) - 0.5, -0.5), xlabel=xlabel)
        axes.axvline(0, color=colour_of("muted"), linewidth=0.8)
        low, high = axes.get_xlim()
        axes.set_xlim(min(0, low), high + 0.16 * (high - low))
        axes.xaxis.set_major_locator(MaxNLocator(5, steps=TICK_STEPS))
        axes.grid(False, axis="y")
        axes.tick_params(axis="y", length=0)
    return figure


def _spread(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None
