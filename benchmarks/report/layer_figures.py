"""Figures of one linear layer: its cost beside peers, and against rank, active share and tokens."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from benchmarks.report import style, tables

FROZEN = "frozen F.linear"
Results = dict[str, dict[str, Any]]
Measures = dict[str, Any]


def all_active(cases: Results) -> list[dict[str, Any]]:
    """Rows of `linear` with all blocks active at rank 16."""
    return [row for row in cases["linear"]["rows"] if row["point"]["active"] == "1" and row["point"]["r"] == 16]


def over_frozen(cases: Results) -> dict[str, Measures]:
    """`{shape: {contender: forward and backward}}` where `all_active`, for shapes of which frozen was measured."""
    rows = [row for row in all_active(cases) if "forward_backward" in row]
    several = len({row["point"]["M"] for row in rows}) > 1
    found: dict[str, Measures] = {}
    for row in rows:
        point = row["point"]
        tokens = f"\n{point['M']:,} rows" if several else ""
        label = f"{point['K']}→{point['N']}{tokens}\n{point['dtype']}"
        found.setdefault(label, {})[row["contender"]] = row["forward_backward"]
    return {label: measures for label, measures in found.items() if FROZEN in measures}


def draw_over_frozen(plots: Any, found: dict[str, Measures]) -> Any:
    """Bars in groups, a group per shape; one is the median of frozen, around it a band as wide as its spread."""
    names = list(dict.fromkeys(name for measures in found.values() for name in measures if name != FROZEN))
    across = max(7.5, 1.5 * len(found))
    figure, axes = plots.subplots(figsize=(across, 5.0), layout="constrained")
    width = 0.84 / len(names)
    for k, measures in enumerate(found.values()):
        unit = style.heights([measures[FROZEN]])[0]
        (below,), (above,) = style.reach([measures[FROZEN]], unit)
        axes.bar(k, below + above, 0.96, 1 - below, color="black", alpha=0.12, zorder=0)
        for i, name in enumerate(names):
            if name in measures:
                axes.bar(
                    k - 0.42 + (i + 0.5) * width, style.heights([measures[name]], unit), width * 0.92,
                    yerr=style.reach([measures[name]], unit), color=style.colour(name, names),
                    error_kw=style.ERRORS, **style.EDGE,
                )  # fmt: skip
    for name in names:
        axes.bar(0, 0, color=style.colour(name, names), label=style.words(name), **style.EDGE)
    axes.axhline(
        1.0, color="black", linewidth=1.2, linestyle="--", label=f"{style.words(FROZEN)}; band: its percentiles"
    )
    axes.set_xticks(range(len(found)), list(found), fontsize=9)
    axes.set_ylabel(f"forward and backward:\ntime over that of {FROZEN}")
    axes.set_xlabel("inputs→outputs of the layer, dtype")
    figure.legend(fontsize=9, ncols=int(across / 2.9), loc="outside lower center", frameon=False)
    style.open_frame(axes)
    return figure


def curve_rows(axis_name: str) -> Callable[[Results], list[dict[str, Any]]]:
    """Rows of one curve of `scaling`."""
    return lambda cases: [row for row in cases["scaling"]["rows"] if row["point"]["curve"] == axis_name]


def curve(axis_name: str) -> Callable[[Results], dict[str, list[tuple[float, Any, float | None]]]]:
    """Data of one curve of `scaling`: `{contender: [(x, time, predicted)]}`, and FROZEN."""

    def data(cases: Results) -> dict[str, list[tuple[float, Any, float | None]]]:
        found: dict[str, list[tuple[float, Any, float | None]]] = {}
        for row in curve_rows(axis_name)(cases):
            if "forward_backward" not in row:
                continue
            text = row["point"][tables.CURVES[axis_name]]
            x = _share(text) if axis_name == "active" else float(text)
            found.setdefault(row["contender"], []).append((x, row["forward_backward"], row.get("predicted")))
        return found if len(found.get(FROZEN, ())) > 1 else {}

    return data


def _share(text: str) -> float:
    over, _, under = text.partition("/")
    return float(over) / float(under or 1)


def draw_curve(label: str) -> Callable[[Any, Any], Any]:
    """Time against what `label` says, beside frozen and what the model of costs predicts."""

    def draw(plots: Any, found: dict[str, list[tuple[float, Any, float | None]]]) -> Any:
        figure, axes = plots.subplots(figsize=(7.0, 4.6), layout="constrained")
        names = [name for name in found if name != FROZEN]
        for name, points in found.items():
            points = sorted(points, key=lambda point: point[0])
            xs, measures = [point[0] for point in points], [point[1] for point in points]
            shade = "black" if name == FROZEN else style.colour(name, names)
            axes.errorbar(
                xs, style.heights(measures, 1e-3), yerr=style.reach(measures, 1e-3), color=shade, capsize=3.0,
                fmt="s--" if name == FROZEN else "o-", markersize=4.5, label=style.words(name),
            )  # fmt: skip
            predicted = [(point[0], 1e3 * point[2]) for point in points if point[2] is not None]
            if predicted:
                # As `errorbar`, so that the legend has the order in which things are drawn.
                axes.errorbar(
                    *zip(*predicted, strict=True), fmt=":", color=shade, label=f"{style.words(name)}, predicted"
                )
        axes.set_ylim(bottom=0)
        # Room for the marker at 0.
        axes.set_xlim(left=-0.02 * axes.get_xlim()[1])
        axes.xaxis.set_major_formatter("{x:,.4g}")
        axes.set_xlabel(label)
        axes.set_ylabel("forward and backward (ms)")
        figure.legend(fontsize=9, ncols=2, loc="outside lower center", frameon=False)
        style.open_frame(axes)
        return figure

    return draw
