"""The figure of all gates over the steps of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import MaxNLocator

from slora.report.cells import by_cell
from slora.report.style import TICK_STEPS, colour_of, figure_style, framed

# Colours of the projections, in the order of the data flow; from the seventh on they repeat with dashed lines.
_COLOURS = ("lora", "sky", "selective", "gold", "full", "linear")


def gate_curves(
    steps: Sequence[int], gates: Mapping[str, Sequence[Sequence[float]]], threshold: float | None, title: str
) -> Figure:
    """Draw the gate of every block over steps, coloured by the projection that the block adapts.

    A gate that ends active is a strong line with a dot at its end, one that ends inactive a faint line.

    Args:
        steps: of the records, in increasing order.
        gates: `{layer name: one sequence over steps per block}`.
        threshold: drawn as a horizontal line; None if unknown, and then all lines look alike.
        title: what the figure shows.

    Raises:
        ValueError: there is no step or no gate.
    """
    if not steps or not gates:
        raise ValueError("no gates to draw: give at least one step and one layer")
    cells = by_cell(gates)
    projections = list(dict.fromkeys(column for _, column in cells))
    looks: dict[str, tuple[str, Any]] = {
        projection: (colour_of(_COLOURS[i % len(_COLOURS)]), "solid" if i < len(_COLOURS) else (0, (4, 1.5)))
        for i, projection in enumerate(projections)
    }
    # More lines are drawn fainter.
    crowd = min(1.0, (36 / len(cells)) ** 0.5)
    with figure_style():
        figure, axes = framed(title, 4.2)
        for (_, projection), values in cells.items():
            colour, dashes = looks[projection]
            active = threshold is None or values[-1] >= threshold
            axes.plot(
                steps, values, color=colour, linestyle=dashes, linewidth=1.5 if active else 0.9,
                alpha=1.0 if active else 0.25 + 0.3 * crowd, zorder=4 if active else 2,
                marker="." if len(steps) == 1 else None, gid="gate",
            )  # fmt: skip
            if active:
                axes.plot(
                    steps[-1], values[-1], "o", color=colour, markersize=4, markeredgecolor=colour_of("paper"),
                    markeredgewidth=0.6, zorder=5, clip_on=False,
                )  # fmt: skip
        axes.set(xlabel="optimizer step", ylabel="gate")
        axes.margins(x=0.02)
        axes.xaxis.set_major_locator(MaxNLocator(6, integer=True, steps=TICK_STEPS))
        axes.yaxis.set_major_locator(MaxNLocator(6, steps=TICK_STEPS))
        entries = [
            Line2D([], [], color=colour, linestyle=dashes, linewidth=1.8, label=projection)
            for projection, (colour, dashes) in looks.items()
        ]
        if threshold is not None:
            line = axes.axhline(threshold, color=colour_of("ink"), linewidth=1.1, linestyle=(0, (4, 2)), zorder=3)
            line.set_label(f"threshold {threshold:g}")
            entries.append(line)
        columns = max(1, min(7, 62 // (4 + max(map(len, projections)))))
        figure.legend(
            handles=entries, loc="outside lower center", ncols=columns, fontsize=8.5, handlelength=1.6,
            columnspacing=1.2,
        )  # fmt: skip
    return figure
