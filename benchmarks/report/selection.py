"""The pages of selection and of retention, and their figures, from the runs of `python -m benchmarks selection`."""

from __future__ import annotations

import math
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, FuncFormatter, MaxNLocator, NullLocator

from benchmarks.selection import verdicts
from benchmarks.selection.engine import SEEDS
from benchmarks.selection.lines import Curve, Line, lines, read_off, wise
from benchmarks.selection.registry import TABLES, TASKS, TUNED_ON, task_named
from benchmarks.selection.rows import percent
from benchmarks.selection.store import Store
from slora.io.atomic import write_atomically
from slora.report.style import colour_of, figure_style

# Panels of the figures of a page: a few strategies each, so that each line can have its name beside it.
PANELS = {
    "selection": {
        "Scores and budgets": ("gates", "budget-solo", "budget-norm", "sensitivity"),
        "Fixed rules": ("last", "random", "first"),
        "Ranks inside blocks": ("sora", "codyra", "increlora", "adalora"),
    },
    "retention": {
        "Distillation": ("distil-old", "distil-generic", "distil-mixed", "distil-target"),
        "Penalties on weights": ("l2", "ewc-old", "ewc-generic"),
        "Local drift, replay": ("drift-old", "drift-target", "replay"),
        "Selection by price": ("budget-solo", "price-old", "price-generic"),
    },
}
# How far a figure goes beyond the most that is forgotten, so that names have room.
ROOM = {"selection": 2.5, "retention": 6.0}
# Of a figure, in inches.
HEIGHT = 4.4
COLOURS = ("selective", "full", "linear", "gold")
TICKS = (0, 0.5, 1, 2, 5, 10, 20, 50, 100)
NUMBERS: dict[str, tuple[str, float]] = {
    "target": (".2f", 1.0), "nll": (".3f", 1.0), "drift": (".3f", 1.0), "kept": (",.0f", 1.0), "flops": (".2f", 1e-12),
    "seconds": (".1f", 1.0), "over": ("+.2f", 1.0), "over nll": ("+.3f", 1.0),
}  # fmt: skip
WITHOUT_SPREAD = {"kept", "flops", "seconds"}
MARKS = {"better": " ▲", "worse": " ▼"}


class Scope(NamedTuple):
    """A table of a page: a task, or all tasks of a family together."""

    page: str
    name: str
    title: str
    tasks: tuple[str, ...]
    found: list[Line]


def scopes(store: Store, page: str = "selection") -> list[Scope]:
    """Return the tables of a page that there are runs for: a family over all of its tasks first, then each task."""
    rows = TABLES[page]()
    families: dict[str, list[str]] = {}
    for name in TASKS:
        families.setdefault(task_named(name).family, []).append(name)
    found = []
    for family, tasks in families.items():
        if len(tasks) > 1:
            titles = ", ".join(tasks)
            found.append(Scope(page, family, f"All of {titles}", tuple(tasks), lines(store, rows, tasks)))
        found += [Scope(page, name, task_named(name).title, (name,), lines(store, rows, [name])) for name in tasks]
    # What every page has is no table by itself.
    shared = set.intersection(*({row.name for row in table()} for table in TABLES.values()))
    return [scope for scope in found if {line.row.name for line in scope.found} - shared]


def page(store: Store, name: str = "selection") -> dict[str, Any]:
    """What the template of a page shows; nothing without runs."""
    found = scopes(store, name)
    every = [run for task in TASKS for run in store.runs(task)]
    if not every:
        return {}
    named = {row.name for row in TABLES[name]() if found}
    runs = [run for run in every if run["row"] in named]
    family = {name for scope in found if len(scope.tasks) > 1 for name in scope.tasks}
    return {
        "scopes": found,
        "within": family,
        "rows": {scope.name: [cells(scope, line) for line in scope.found] for scope in found},
        "figures": links(found),
        "rates": {task_named(name).family: [f"{rate:g}" for rate in task_named(name).rates] for name in TASKS},
        "tuned_on": TUNED_ON,
        "missing": list(_missing(found, name)),
        "origins": {each: sorted({run[each] for run in runs}) for each in ("commit", "versions") if runs},
        "selection": {"heads": heads},
        "verdicts": verdicts,
    }


def _missing(found: Sequence[Scope], page: str) -> Iterator[str]:
    """Say of each task which rows have no run, and which have fewer seeds than the page is planned for."""
    lines_of = {scope.name: scope.found for scope in found if len(scope.tasks) == 1}
    for name in TASKS:
        seeds = {line.row.name: len(line.seeds) for line in lines_of.get(name, ())}
        rows = [row.name for row in TABLES[page]() if row.fits(task_named(name))]
        without = [row for row in rows if row not in seeds]
        fewer = [row for row in rows if 0 < seeds.get(row, 0) < len(SEEDS)]
        if without:
            yield f"{name}: {', '.join(without) if seeds else 'all rows'}"
        if fewer:
            yield f"{name}, with fewer than {len(SEEDS)} seeds: {', '.join(fewer)}"


def heads(scope: Scope) -> list[str]:
    """The heads of a scope's table."""
    task = task_named(scope.tasks[0])
    return [
        "strategy", "share", "blocks", "ranks", "seeds", "rate, weight", task.target, "NLL", *task.retention.values(),
        "drift", "parameters", "TFLOP", "CPU s", "over scaled LoRA", "NLL over it",
    ]  # fmt: skip


def cells(scope: Scope, line: Line) -> list[str]:
    """The cells of a line: means over seeds, with the standard deviation; of differences with the standard error."""
    share, scaled = line.row.share, line.scale != 1
    lost = [f"lost {name}" for name in task_named(scope.tasks[0]).retention]
    return [
        line.label,
        "" if share is None else percent(share),
        *("" if share is None or scaled else f"{line.mean(name):.3g}" for name in ("active", "ranks")),
        str(len(line.seeds)),
        ", ".join(f"{each:g}" for each in line.tuned[0]) if len({*line.tuned}) == 1 and not scaled else "",
        *(_number(line, name) for name in ("target", "nll", *lost, "drift", "kept", "flops", "seconds")),
        *(_number(line, name) + MARKS.get(verdicts.verdict(line, name), "") for name in ("over", "over nll")),
    ]


def _number(line: Line, measure: str) -> str:
    form, unit = NUMBERS.get(measure, (".2f", 1.0))
    values = [unit * value for value in line.values.get(measure, ())]
    if not values:
        return ""
    # Rounding may give "-0.00".
    mean = format(fmean(values), form)
    mean = mean if float(mean.replace(",", "")) else mean.lstrip("+-")
    if len(values) < 2 or measure in WITHOUT_SPREAD:
        return mean
    error = verdicts.standard_error(values) if measure in ("over", "over nll") else stdev(values)
    return f"{mean} ± {error:{form.lstrip('+')}}"


def links(found: Sequence[Scope]) -> dict[str, str]:
    """`{scope: file name}` of the figures: of the scopes that have the curve to beat and something to compare."""
    return {scope.name: f"{scope.page}-{scope.name}.png" for scope in found if wise(scope.found) and _panels(scope)}


def draw_all(store: Store, folder: Path) -> list[Path]:
    """Draw the figures; return the files."""
    drawn = []
    for found in (scopes(store, page) for page in TABLES):
        for name, file in links(found).items():
            (scope,) = [scope for scope in found if scope.name == name]
            with figure_style():
                figure = draw(scope)
                # No date and no version inside: the same runs give the same file.
                save = partial(figure.savefig, format="png", dpi=130, metadata={"Software": None})
                write_atomically(folder / file, save)
            drawn.append(folder / file)
    return drawn


def _panels(scope: Scope) -> dict[str, list[str]]:
    """`{title: strategies}` of those that have lines."""
    panels = {title: [name for name in names if _of(scope, name)] for title, names in PANELS[scope.page].items()}
    return {title: names for title, names in panels.items() if names}


def draw(scope: Scope) -> Figure:
    """A panel per group of strategies: the new task over what is forgotten, and shaded what scaled LoRA beats."""
    panels, task = _panels(scope), task_named(scope.tasks[0])
    figure = Figure(layout="constrained", figsize=(4.2 * len(panels) + 0.4, HEIGHT))
    axes: Sequence[Axes] = figure.subplots(1, len(panels), sharex=True, sharey=True, squeeze=False)[0]
    curve = wise(scope.found)
    drawn = [line for names in panels.values() for name in names for line in _of(scope, name)]
    targets = [line.mean("target") or 0.0 for line in drawn] + [target for _, target in curve]
    low, high = min(targets), max(targets)
    bottom, top = low - 0.12 * (high - low) - 0.1, high + 0.12 * (high - low) + 0.1
    most = ROOM[scope.page] * max([line.mean("lost") or 0.0 for line in drawn] + [lost for lost, _ in curve] + [1.0])
    for pane, (title, names) in zip(axes, panels.items(), strict=True):
        _draw_curve(pane, curve, most, bottom)
        ends = []
        for name, colour in zip(names, map(colour_of, COLOURS), strict=False):
            points = sorted(_of(scope, name), key=lambda line: line.row.share or 0.0)
            _draw_strategy(pane, points, colour)
            x, y = (fmean(points[-1].values[measure]) for measure in ("lost", "target"))
            ends.append((x, y, points[-1].row.label, colour))
        _write_names(pane, ends, bottom, top)
        pane.set_title(title, fontsize=10, loc="left")
        pane.set_xscale("symlog", linthresh=1.0, linscale=0.6)
        pane.xaxis.set_major_locator(FixedLocator([tick for tick in TICKS if tick <= most]))
        pane.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        pane.xaxis.set_minor_locator(NullLocator())
        pane.yaxis.set_major_locator(MaxNLocator(6))
        pane.set(xlim=(most, -0.35), ylim=(bottom, top))
    axes[0].set_ylabel(task.target)
    figure.supxlabel("points lost on the old task; to the right less is forgotten", fontsize=9)
    seeds = {len(line.seeds) for line in drawn}
    counted = f"{max(seeds)} seeds" if max(seeds) > 1 else "1 seed"
    counted = counted if len(seeds) == 1 else f"{min(seeds)} to {counted}"
    title = textwrap.fill(f"{scope.title}: target against retention, {counted}", 45 * len(panels))
    figure.suptitle(title, fontsize=11, fontweight="bold")
    return figure


def _of(scope: Scope, strategy: str) -> list[Line]:
    return [line for line in scope.found if line.row.strategy == strategy]


def _draw_curve(pane: Axes, curve: Curve, most: float, bottom: float) -> None:
    # Densely: the comparison interpolates along a linear axis, and this one is not.
    lost = sorted({*(each for each, _ in curve), *(most * (i / 400) ** 2 for i in range(401))})
    best = [read_off(curve, at) for at in lost]
    pane.fill_between(lost, bottom, best, color=colour_of("grid"), alpha=0.7, linewidth=0, zorder=0)
    pane.plot(lost, best, color=colour_of("lora"), linewidth=1.6, zorder=2)
    pane.plot(*zip(*curve, strict=True), "o", color=colour_of("lora"), markersize=4, zorder=2)
    pane.text(
        0.02, 0.03, "shaded: no better than plain LoRA, scaled", transform=pane.transAxes, fontsize=8,
        color=colour_of("lora"),
    )  # fmt: skip


def _draw_strategy(pane: Axes, points: Sequence[Line], colour: str) -> None:
    xs, ys = ([fmean(line.values[name]) for line in points] for name in ("lost", "target"))
    spreads: Mapping[str, Any] = {
        axis: [stdev(line.values[name]) if len(line.seeds) > 1 else 0.0 for line in points]
        for axis, name in (("xerr", "lost"), ("yerr", "target"))
    }
    pane.errorbar(xs, ys, **spreads, color=colour, linewidth=1.1, elinewidth=0.8, zorder=3)
    # The larger the mark, the larger the share; beyond a quarter no more.
    for x, y, line in zip(xs, ys, points, strict=True):
        size = 4 + 16 * min(line.row.share or 0.0, 0.25)
        pane.plot([x], [y], "o", color=colour, markersize=size, zorder=4, clip_on=False)


def _write_names(pane: Axes, ends: Sequence[tuple[float, float, str, str]], bottom: float, top: float) -> None:
    """Write each name beside the end of its line, `(x, y, name, colour)`, and one above the other where they meet."""
    least = 0.055 * (top - bottom)
    points, above = HEIGHT * 72 * 0.75 / (top - bottom), -math.inf
    for x, y, name, colour in sorted(ends, key=lambda end: end[1]):
        above = max(y, above + least)
        pane.annotate(
            name, (x, y), xytext=(-8, (above - y) * points), textcoords="offset points", color=colour, fontsize=8.5,
            fontweight="bold", ha="right", va="center", annotation_clip=False, zorder=5,
        )  # fmt: skip
