"""Figures of result files, drawn with matplotlib: a file per device and kind."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.contenders.peers import Missing
from benchmarks.record import median
from benchmarks.report import tables
from slora.files import write_atomically

FROZEN = "frozen F.linear"
# One colour per family, so that a contender looks the same in every figure.
COLOURS = {
    "slora": ["#1b6ca8", "#4f9bd0", "#8fc1e3", "#bcdcf2", "#0d3b5e"],
    "PEFT": ["#c8553d", "#e39a88"],
    "full": ["#6b6b6b"],
    "addmm": ["#d9a441"],
    "": ["#a0a0a0", "#c4c4c4", "#e0e0e0"],
}
Results = dict[str, dict[str, Any]]


def of_case(device: str, case: str, results: Results) -> list[tuple[str, str]]:
    """`(file name, title)` of the figures that `results` give for `case`."""
    return [
        (f"{device}-{name}.png", figure.title)
        for name, figure in FIGURES.items()
        if figure.case == case and case in results and figure.data(results)
    ]


def draw_all(results: dict[str, Results], folder: Path) -> list[Path]:
    """Draw every figure that there are results for; return the files."""
    plots = _pyplot()
    drawn = []
    for device, cases in results.items():
        for name, plan in FIGURES.items():
            if plan.case not in cases or not (found := plan.data(cases)):
                continue
            figure = plan.draw(plots, found)
            heading = f"{plan.title}: {subject(plan.rows(cases))}"
            figure.suptitle(f"{heading}\n{cases[plan.case]['environment']['device']}", fontsize=10)
            path = folder / f"{device}-{name}.png"
            # No date and no version inside: the same results give the same file.
            write_atomically(
                path,
                lambda target, figure=figure: figure.savefig(
                    target, format="png", dpi=130, metadata={"Software": None}
                ),
            )
            plots.close(figure)
            drawn.append(path)
    return drawn


def _pyplot() -> Any:
    try:
        matplotlib = importlib.import_module("matplotlib")
    except ImportError as error:
        raise Missing(f"matplotlib cannot be imported ({error}); install it to draw the figures") from error
    matplotlib.use("Agg")
    return importlib.import_module("matplotlib.pyplot")


def colour(name: str, names: Sequence[str]) -> str:
    """The colour of a contender among those of its figure."""
    family = next(key for key in COLOURS if name.startswith(key))
    members = [other for other in names if next(key for key in COLOURS if other.startswith(key)) == family]
    shades = COLOURS[family]
    return shades[members.index(name) % len(shades)]


def _over_frozen(cases: Results) -> dict[str, dict[str, float]]:
    """`{shape: {contender: forward and backward over frozen}}` where all blocks are active at r = 16."""
    found: dict[str, dict[str, float]] = {}
    for rows in tables.points(cases["linear"]).values():
        point, limit = rows[0]["point"], tables.of(rows, FROZEN, "forward_backward")
        if point["active"] != "1" or point["r"] != 16 or not limit:
            continue
        label = f"{point['K']}→{point['N']}\nM={point['M']}\n{point['dtype']}"
        found[label] = {
            row["contender"]: row["forward_backward"]["median"] / limit
            for row in rows
            if "forward_backward" in row and row["contender"] != FROZEN
        }
    return found


def _draw_over_frozen(plots: Any, found: dict[str, dict[str, float]]) -> Any:
    names = list(dict.fromkeys(name for values in found.values() for name in values))
    figure, axes = plots.subplots(figsize=(max(7.0, 1.5 * len(found)), 4.6), layout="constrained")
    width = 0.84 / len(names)
    for i, name in enumerate(names):
        places = [k - 0.42 + (i + 0.5) * width for k, values in enumerate(found.values()) if name in values]
        heights = [values[name] for values in found.values() if name in values]
        axes.bar(places, heights, width * 0.92, label=name, color=colour(name, names))
    axes.axhline(1.0, color="black", linewidth=1.2, linestyle="--", label="limit: frozen F.linear, forward and dx")
    axes.set_xticks(range(len(found)), list(found), fontsize=8)
    axes.set_ylabel("forward and backward\n(time over frozen)")
    axes.set_xlabel("K→N, rows of x, dtype")
    axes.legend(fontsize=8, ncols=4, loc="upper center", bbox_to_anchor=(0.5, -0.26), frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _step_rows(cases: Results) -> list[dict[str, Any]]:
    """The first point in fp32, where memory is measured on a CPU, else the first."""
    points = list(tables.points(cases["train_step"]).values())
    return next((rows for rows in points if rows[0]["point"]["precision"] == "fp32"), points[0])


def _curve_rows(axis_name: str) -> Callable[[Results], list[dict[str, Any]]]:
    return lambda cases: [row for row in cases["scaling"]["rows"] if row["point"]["curve"] == axis_name]


def _all_active(cases: Results) -> list[dict[str, Any]]:
    return [row for row in cases["linear"]["rows"] if row["point"]["active"] == "1" and row["point"]["r"] == 16]


def subject(rows: Sequence[dict[str, Any]]) -> str:
    """What all rows of a figure have in common."""
    points = [row["point"] for row in rows]
    shared = {key: value for key, value in points[0].items() if all(point[key] == value for point in points)}
    return ", ".join(f"{key} {value}" for key, value in shared.items() if key != "curve")


def _steps(cases: Results) -> dict[str, tuple[float, float | None]]:
    """`{contender: (seconds, peak MiB)}` at one point of `train_step`."""
    rows = _step_rows(cases)
    precision = rows[0]["point"]["precision"]
    memory = {
        row["contender"]: row.get("peak_memory_mib")
        for row in cases.get("train_memory", {"rows": []})["rows"]
        if row["point"]["precision"] == precision
    }
    return {
        row["contender"]: (row["seconds"]["median"], row.get("peak_memory_mib", memory.get(row["contender"])))
        for row in rows
        if "seconds" in row
    }


def _draw_steps(plots: Any, found: dict[str, tuple[float, float | None]]) -> Any:
    names = sorted(found, key=lambda name: found[name][0], reverse=True)
    known = [name for name in names if found[name][1] is not None]
    figure, axes = plots.subplots(1, 2, sharey=True, figsize=(9.5, 0.36 * len(names) + 1.7), layout="constrained")
    colours = [colour(name, names) for name in names]
    axes[0].barh(names, [found[name][0] for name in names], color=colours)
    axes[0].set_xlabel("time of one training step (s)")
    axes[1].barh(known, [found[name][1] for name in known], color=[colour(name, names) for name in known])
    axes[1].set_xlabel("peak memory (MiB)" if known else "peak memory: not measured")
    limit = "frozen, dx everywhere"
    if limit in found:
        for place, value in enumerate(found[limit]):
            if value is not None:
                axes[place].axvline(value, color="black", linewidth=1.2, linestyle="--")
        axes[0].annotate("limit: frozen,\ndx everywhere", (found[limit][0], 0.99), (4, 0), fontsize=8,
                         xycoords=("data", "axes fraction"), textcoords="offset points", va="top")  # fmt: skip
    for axis in axes:
        axis.spines[["top", "right"]].set_visible(False)
    return figure


def _curve(axis_name: str) -> Callable[[Results], dict[str, list[tuple[float, float, float | None]]]]:
    """Data of one curve of `scaling`: `{contender: [(x, time, predicted)]}`, and FROZEN."""

    def data(cases: Results) -> dict[str, list[tuple[float, float, float | None]]]:
        found: dict[str, list[tuple[float, float, float | None]]] = {}
        for row in cases["scaling"]["rows"]:
            point = row["point"]
            if point["curve"] != axis_name or "forward_backward" not in row:
                continue
            text = point[{"active": "active", "rank": "r", "tokens": "M"}[axis_name]]
            x = _share(text) if axis_name == "active" else float(text)
            found.setdefault(row["contender"], []).append(
                (x, float(median(row["forward_backward"]) or 0), row.get("predicted"))
            )
        return found if len(found.get(FROZEN, ())) > 1 else {}

    return data


def _share(text: str) -> float:
    over, _, under = text.partition("/")
    return float(over) / float(under or 1)


def _draw_curve(label: str) -> Callable[[Any, Any], Any]:
    def draw(plots: Any, found: dict[str, list[tuple[float, float, float | None]]]) -> Any:
        figure, axes = plots.subplots(figsize=(6.6, 4.4), layout="constrained")
        names = list(found)
        for name in names:
            points = sorted(found[name])
            xs, ys = [p[0] for p in points], [1e3 * p[1] for p in points]
            if name == FROZEN:
                axes.plot(xs, ys, "--", color="black", linewidth=1.2, label="limit: frozen F.linear, forward and dx")
                continue
            axes.plot(xs, ys, "o-", color=colour(name, names), label=name)
            predicted = [(p[0], 1e3 * p[2]) for p in points if p[2] is not None]
            axes.plot(*zip(*predicted, strict=True), ":", color=colour(name, names), label=f"{name}, predicted")
        axes.set_ylim(bottom=0)
        axes.set_xlim(left=0)
        axes.set_xlabel(label)
        axes.set_ylabel("forward and backward (ms)")
        axes.legend(fontsize=8, frameon=False, loc="best")
        axes.spines[["top", "right"]].set_visible(False)
        return figure

    return draw


@dataclass(frozen=True)
class Figure:
    """A figure: the case it is of, the rows in it, what is taken from them, and how that is drawn."""

    case: str
    title: str
    rows: Callable[[Results], list[dict[str, Any]]]
    data: Callable[[Results], Any]
    draw: Callable[[Any, Any], Any]


FIGURES = {
    "linear": Figure("linear", "One linear layer, all blocks active", _all_active, _over_frozen, _draw_over_frozen),
    "train-step": Figure("train_step", "One training step", _step_rows, _steps, _draw_steps),
    **{
        name: Figure("scaling", title, _curve_rows(name), _curve(name), _draw_curve(label))
        for name, title, label in (
            ("active", "Cost against active share, 16 blocks", "active share of the layer's blocks"),
            ("rank", "Cost against rank", "rank r"),
            ("tokens", "Cost against tokens", "rows of x (tokens)"),
        )
    },
}
