"""Figures: which blocks live, target against retention, values over steps, one bar per method.

Each function returns a matplotlib `Figure` that was made without pyplot, so nothing global changes and no display
is needed. Colours are those of `PALETTE`; `slora.report.page` swaps them for CSS variables, so that a figure in a
page follows the reader's light or dark theme. Methods differ in colour (Okabe and Ito's palette, told apart by
colour-blind readers), in marker and in line style.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from statistics import fmean, stdev
from typing import Any, TypeVar, cast

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

from slora.io.atomic import write_atomically

# name: (colour on white, colour on dark). Each colour on white occurs once: it is also the key of the swap.
PALETTE: dict[str, tuple[str, str]] = {
    "ink": ("#1b1f24", "#e8eaed"),
    "muted": ("#5b6470", "#a3abb5"),
    "grid": ("#dde2e8", "#343a42"),
    "paper": ("#ffffff", "#15181c"),
    "full": ("#d55e00", "#ff8f4d"),
    "linear": ("#b86a98", "#e79cc6"),
    "lora": ("#0072b2", "#5cb2f2"),
    "selective": ("#009e73", "#35c796"),
    "live-text": ("#0b1512", "#04150f"),
    "alert": ("#b3261e", "#ff8a80"),
    "gold": ("#a87b00", "#e3b341"),
    "sky": ("#56b4e9", "#a5dcff"),
}
MARKERS = {"full": "s", "linear": "^", "lora": "o", "selective": "D"}
DASHES = {"full": (0, (6, 2)), "linear": (0, (1, 1.5)), "lora": (0, (4, 1.5, 1, 1.5)), "selective": "solid"}

# Variants of a method and fixed rules: the colour of a family, and a marker of their own.
VARIANTS = {
    "head-first": ("lora", "s"), "rank-16": ("lora", "v"), "distilled": ("lora", "P"),
    "last": ("full", ">"), "random": ("full", "X"), "late-fc1": ("full", "<"),
    "selective-distilled": ("selective", "p"),
}  # fmt: skip
MARKERS |= {name: marker for name, (_, marker) in VARIANTS.items()}
DASHES |= dict.fromkeys(VARIANTS, (0, (6, 2)))

# Width of every figure in inches: a column of a page, and still readable when a phone scales it down.
WIDTH = 4.6

# Distances between ticks, times a power of ten.
TICK_STEPS = [1, 2, 2.5, 5, 10]

# Layers whose three blocks are query, key and value.
_FUSED = ("qkv", "in_proj", "attn", "self_attn", "query_key_value")

# Projections of attention in the order in which they are drawn.
_ORDER = (
    (*_FUSED, "q", "q_proj", "query"), ("k", "k_proj", "key"), ("v", "v_proj", "value"), ("proj", "out_proj", "o_proj"),
)  # fmt: skip

Value = TypeVar("Value")

# One value per run: a pair of x and y values of equal length.
Line = tuple[Sequence[float], Sequence[float]]


def block_map(maps: Sequence[Mapping[str, Sequence[bool]]], title: str) -> Figure:
    """Draw every block as one cell: layers from top to bottom, projections from left to right.

    A cell is filled by the share of runs in which its block is active, and holds their number where there are
    several runs. A block that no run keeps is an empty cell with a dashed outline.

    Args:
        maps: `{layer name: active or not, one per block}` for each run, as `slora.active_blocks` returns it; all
            with the same layers. A layer of three blocks named qkv, in_proj or attn is drawn as q, k and v.
        title: what is to be seen.

    Raises:
        ValueError: `maps` is empty or names no layer.
    """
    if not maps or not maps[0]:
        raise ValueError("no blocks to draw: give one map of at least one layer per run")
    counts = {name: [sum(bool(run[name][i]) for run in maps) for i in range(len(on))] for name, on in maps[0].items()}
    cells = by_cell(counts)
    rows, columns = (list(dict.fromkeys(place)) for place in zip(*cells, strict=True))
    lines = _wrapped(title)
    # All in inches. Long names of projections stand at 45 degrees and need room above and to the right.
    longest = max(map(len, columns))
    slanted = longest > 6
    left = 0.15 + max(0.4, 0.075 * max(map(len, rows)))
    overhang = max(0.055 * len(column) - 0.5 * (len(columns) - 1 - i) for i, column in enumerate(columns))
    right = max(0.08, overhang) if slanted else 0.08
    top = 0.17 * len(lines) + (0.2 + 0.055 * longest if slanted else 0.36)
    bottom, body = 0.55, 0.3 * len(rows)
    height = top + body + bottom
    with figure_style():
        figure = Figure(figsize=(WIDTH, height))
        position = (left / WIDTH, bottom / height, 1 - (left + right) / WIDTH, body / height)
        axes = figure.add_axes(position, xlim=(-0.5, len(columns) - 0.5), ylim=(len(rows) - 0.5, -0.5))
        for (row, column), count in cells.items():
            _cell(axes, columns.index(column), rows.index(row), count, len(maps))
        axes.set_xticks(range(len(columns)), columns)
        axes.set_yticks(range(len(rows)), rows)
        axes.xaxis.tick_top()
        axes.tick_params(length=0)
        axes.grid(False)
        axes.spines[:].set_visible(False)
        if slanted:
            for label in axes.get_xticklabels():
                label.set(rotation=45, ha="left", rotation_mode="anchor")
        axes.annotate(
            "layer", (0, 1), xycoords="axes fraction", xytext=(-4, 5.5), textcoords="offset points", ha="right",
            color=colour_of("muted"),
        )  # fmt: skip
        _map_legend(figure, len(maps), height)
        _title(figure, lines, height)
    return figure


def target_against_retention(
    runs: Mapping[str, Sequence[tuple[float, float]]],
    before: float,
    title: str,
    labels: Mapping[str, str] | None = None,
) -> Figure:
    """Draw each run as a small mark and each method's mean as a large one with its standard deviation.

    Args:
        runs: `{method: [(k-NN accuracy on the source after, accuracy on the target), ...]}`, each from 0 to 1.
        before: k-NN accuracy on the source before fine-tuning, 0 to 1; a vertical line.
        title: what is to be seen.
        labels: `{method: name to print}`; by default the method's own.
    """
    with figure_style():
        figure, axes = framed(title, 3.5 + 0.1 * len(runs))
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
        axes.set(xlabel="k-NN accuracy on the source after fine-tuning (%)", ylabel="accuracy on the target (%)")
        axes.margins(0.12, 0.16)
        low, high = axes.get_xlim()
        axes.set_xlim(low, max(high, 100 * before + 0.1 * (high - low)))
        axes.annotate(
            f"before fine-tuning: {100 * before:.1f} %", (100 * before, 0.5), xycoords=("data", "axes fraction"),
            xytext=(5, 0), textcoords="offset points", va="center", rotation=90, color=colour_of("muted"), fontsize=8,
        )  # fmt: skip
        # A legend rather than names in the plot: marks are many and close together.
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
    """Draw values over steps: the mean over the runs of each name, and a band from their least to their greatest.

    Args:
        lines: `{name: one (x, y) per run}`; the runs of a name share their x. A method has its own
            looks, other names take those of the methods in turn.
        title: what is to be seen.
        ylabel: the quantity, with its unit.
        labels: `{name: name to print}`; a single name gets no legend.
        percent: whether y runs from 0 to 1 and is to be printed as a percentage.
        log: whether the y axis is logarithmic.
        zero: whether the y axis starts at 0.
    """
    drawn = {name: runs for name, given in lines.items() if (runs := [run for run in given if len(run[0])])}
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
    """Draw one bar per method: the mean over its runs, each run as a mark, the mean in figures.

    Args:
        values: `{method: one value per run}`, in the unit of `xlabel`.
        title: what is to be seen.
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


def save_png(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write `figure` as a PNG on white, atomically.

    Raises:
        WriteError: the file cannot be written; names it, the cause and the remedy.
    """
    with figure_style():
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=180))


def grid_position(layer: str) -> tuple[str, str]:
    """Return `(row, projection)` of a layer: `blocks.3.attn.qkv` is `("blocks.3", "attn.qkv")`.

    The row ends with the last number of the name. A layer without one belongs to the row of its parent, or to
    `model` where it has none.
    """
    parts = layer.split(".")
    numbers = [i for i, part in enumerate(parts[:-1]) if part.isdigit()]
    cut = numbers[-1] + 1 if numbers else len(parts) - 1
    return ".".join(parts[:cut]) or "model", ".".join(parts[cut:])


def by_cell(values: Mapping[str, Sequence[Value]]) -> dict[tuple[str, str], Value]:
    """Return `{(row label, column label): value}` of all blocks, labels as short as they can be.

    Args:
        values: `{layer name: one value per block}`.
    """
    places = {layer: grid_position(layer) for layer in values}
    # Files list layers by the alphabet: 10 before 2, proj before qkv.
    places = dict(sorted(places.items(), key=lambda item: (_counting(item[1][0]), _flow(item[1][1]))))
    row_names = _short_rows(list(dict.fromkeys(row for row, _ in places.values())))
    column_names = _short_columns(list(dict.fromkeys(column for _, column in places.values())))
    cells = {}
    for layer, (row, column) in places.items():
        own, name, leaf = values[layer], column_names[column], column.rpartition(".")[2]
        for i, value in enumerate(own):
            if len(own) == 3 and leaf in _FUSED:
                label = name.removesuffix(leaf) + "qkv"[i]
            else:
                label = name if len(own) == 1 else f"{name} {i + 1}"
            cells[row_names[row], label] = value
    return cells


def _counting(name: str) -> list[tuple[int, str]]:
    """A key that sorts numbers in a name by their value."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in name.split(".")]


def _flow(column: str) -> int:
    """A key that sorts projections as data pass them: query, key, value, the attention's output, the rest."""
    leaf = column.rpartition(".")[2]
    return next((i for i, names in enumerate(_ORDER) if leaf in names), len(_ORDER))


def _short_rows(rows: list[str]) -> dict[str, str]:
    """Rows by their numbers, after whatever tells towers of equal numbers apart: `visual 3`."""
    numbers = {row: ".".join(part for part in row.split(".") if part.isdigit()) for row in rows}
    if len(set(numbers.values())) == len(rows) and all(numbers.values()):
        return numbers
    stems = {row: [part for part in row.split(".") if not part.isdigit()] for row in rows}
    while len({(stem or [""])[-1] for stem in stems.values()}) == 1 and any(stems.values()):
        stems = {row: stem[:-1] for row, stem in stems.items()}
    short = {row: " ".join(filter(None, (".".join(stems[row]), numbers[row]))) or row for row in rows}
    return short if len(set(short.values())) == len(rows) else {row: row for row in rows}


def _short_columns(columns: list[str]) -> dict[str, str]:
    """The shortest ending of each name that no other has; a name that ends others stays whole."""
    short = {}
    for column in columns:
        parts = column.split(".")
        endings = (".".join(parts[-count:]) for count in range(1, len(parts) + 1))
        alone = (e for e in endings if not any(f".{c}".endswith(f".{e}") for c in columns if c != column))
        short[column] = next(alone, column)
    return short


def _cell(axes: Axes, x: float, y: float, count: int, runs: int, width: float = 0.92, height: float = 0.84) -> None:
    corner = (x - width / 2, y - height / 2)
    share = count / runs
    if count:
        # The least share stays clearly apart from an empty cell.
        fill = Rectangle(corner, width, height, facecolor=colour_of("selective"), alpha=0.2 + 0.8 * share, linewidth=0)
    else:
        fill = Rectangle(
            corner,
            width,
            height,
            facecolor="none",
            edgecolor=colour_of("muted"),
            linewidth=0.7,
            linestyle=(0, (1.5, 2)),
        )
    fill.set_gid("block")
    axes.add_patch(fill)
    if runs > 1 and count:
        colour = colour_of("live-text" if share > 0.6 else "ink")
        axes.text(x, y, str(count), ha="center", va="center", color=colour, fontsize=8.5)


def _map_legend(figure: Figure, runs: int, height: float) -> None:
    axes = figure.add_axes((0.03, 0.06 / height, 0.94, 0.34 / height), xlim=(0, 0.94 * WIDTH), ylim=(0, 0.34))
    axes.set_axis_off()
    if runs == 1:
        entries, x = [(0, "inactive"), (1, "active")], 0.0
    else:
        shown = range(1, runs + 1) if runs <= 4 else (1, (runs + 1) // 2, runs)
        entries, x = [(0, "in none"), *((count, "") for count in shown)], 1.45
        axes.text(0, 0.17, f"active, of {runs} runs:", va="center", fontsize=8.5)
    for count, text in entries:
        _cell(axes, x + 0.16, 0.17, count, runs, width=0.32, height=0.21)
        axes.patches[-1].set_gid("legend")
        axes.text(x + 0.38, 0.17, text, va="center", fontsize=8.5)
        x += 1.0 if text else 0.4


def framed(title: str, height: float) -> tuple[Figure, Axes]:
    """Return a figure with its title over axes of `height` inches, labels included, and the axes."""
    lines = _wrapped(title)
    total = height + 0.17 * len(lines) + 0.1
    figure = Figure(figsize=(WIDTH, total), layout="constrained")
    layout = figure.get_layout_engine()
    assert layout is not None
    layout.set(rect=(0, 0, 1, height / total))  # type: ignore[call-arg]
    _title(figure, lines, total)
    return figure, figure.add_subplot()


def _title(figure: Figure, lines: Sequence[str], height: float) -> None:
    for i, line in enumerate(lines):
        figure.text(0.012, 1 - (0.13 + 0.17 * i) / height, line, va="center", fontsize=10.5, fontweight="bold")


def _wrapped(title: str) -> list[str]:
    # A no-break space keeps a figure and its unit on one line.
    return textwrap.wrap(title.replace(" %", "\u00a0%"), 53)


def _spread(values: Sequence[float]) -> float | None:
    return stdev(values) if len(values) > 1 else None


def colour_of(name: str) -> str:
    """Return the colour on white of a name of `PALETTE` or of a variant's family; unknown names are muted."""
    name = VARIANTS[name][0] if name in VARIANTS else name
    return PALETTE[name if name in PALETTE else "muted"][0]


@contextmanager
def figure_style() -> Iterator[None]:
    """Draw inside in the looks of this file; global settings come back afterwards."""
    ink, muted, grid = (colour_of(name) for name in ("ink", "muted", "grid"))
    style: Any = {
        "font.family": "sans-serif", "font.sans-serif": ["DejaVu Sans"], "font.size": 9, "text.color": ink,
        "axes.labelcolor": ink, "axes.edgecolor": muted, "axes.facecolor": "none", "axes.grid": True,
        "axes.axisbelow": True, "axes.spines.top": False, "axes.spines.right": False, "axes.linewidth": 0.8,
        "grid.color": grid, "grid.linewidth": 0.8, "xtick.color": muted, "ytick.color": muted,
        "xtick.labelcolor": ink, "ytick.labelcolor": ink, "legend.frameon": False, "legend.labelcolor": ink,
        "figure.facecolor": "#ffffff", "savefig.facecolor": "auto", "lines.solid_capstyle": "round",
    }  # fmt: skip
    with matplotlib.rc_context(style):
        yield
