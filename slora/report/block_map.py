"""`block_map`: the figure of which blocks are active, one cell per block."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from slora.report.cells import by_cell
from slora.report.style import WIDTH, colour_of, draw_title, figure_style, wrapped


def block_map(maps: Sequence[Mapping[str, Sequence[int]]], title: str, *, numbers: bool = False) -> Figure:
    """Draw every block as one cell: layers from top to bottom, projections from left to right.

    The darker a cell, the larger the share of runs in which its block is active; with several runs it shows their
    number. A block that is inactive in all runs is an empty cell with a dashed outline.

    Args:
        maps: `{layer name: active or not, one per block}` for each run, as `slora.active_blocks` returns it; all
            with the same layers. A layer of three blocks named qkv, in_proj or attn is drawn as q, k and v.
        title: what the figure shows.
        numbers: write the numbers of a single run, such as ranks, into its cells.

    Raises:
        ValueError: `maps` is empty or names no layer.
    """
    if not maps or not maps[0]:
        raise ValueError("no blocks to draw: give one map of at least one layer per run")
    counts = {name: [sum(bool(run[name][i]) for run in maps) for i in range(len(on))] for name, on in maps[0].items()}
    cells = by_cell(counts)
    values = by_cell(maps[0]) if numbers else {}
    rows, columns = (list(dict.fromkeys(place)) for place in zip(*cells, strict=True))
    lines = wrapped(title)
    # Inches. Long names of projections are rotated by 45 degrees and need space above and to the right.
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
            x, y = columns.index(column), rows.index(row)
            _cell(axes, x, y, count, len(maps))
            if values.get((row, column)):
                text = str(int(values[row, column]))
                axes.text(x, y, text, ha="center", va="center", color=colour_of("live-text"), fontsize=8.5)
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
        draw_title(figure, lines, height)
    return figure


def _cell(axes: Axes, x: float, y: float, count: int, runs: int, width: float = 0.92, height: float = 0.84) -> None:
    corner = (x - width / 2, y - height / 2)
    share = count / runs
    if count:
        # The smallest share must still differ clearly from an empty cell.
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
