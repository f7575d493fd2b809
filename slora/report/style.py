"""The style of all figures: colours, markers, size, title.

Figures are made without pyplot, so nothing global changes and no display is needed. Colours are those of `PALETTE`;
`slora.report.page` replaces them by CSS variables, so that a figure follows the reader's light or dark theme. Methods
differ in colour (Okabe and Ito's palette for colour-blind readers), in marker and in line style.
"""

from __future__ import annotations

import os
import textwrap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import matplotlib
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from slora.io.atomic import write_atomically

# name: (colour on white, colour on dark). Colours on white are unique: `page.py` replaces them by CSS variables.
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

# Variants of a method, and fixed rules: the method whose colour they have, and their own marker.
VARIANTS = {
    "head-first": ("lora", "s"), "rank-16": ("lora", "v"), "distilled": ("lora", "P"),
    "scaled": ("lora", "d"),
    "last": ("full", ">"), "random": ("full", "X"), "late-fc1": ("full", "<"),
    "selective-distilled": ("selective", "p"),
}  # fmt: skip
MARKERS |= {name: marker for name, (_, marker) in VARIANTS.items()}
DASHES |= dict.fromkeys(VARIANTS, (0, (6, 2)))

# Width of every figure in inches: a column of the page, still readable on a phone.
WIDTH = 4.6

# Tick spacing, times a power of ten.
TICK_STEPS = [1, 2, 2.5, 5, 10]


def save_png(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write `figure` as a PNG on white, atomically.

    Raises:
        WriteError: the file cannot be written; names it, the cause and the remedy.
    """
    with figure_style():
        write_atomically(path, lambda temporary: figure.savefig(temporary, format="png", dpi=180))


def framed(title: str, height: float) -> tuple[Figure, Axes]:
    """Return a figure with a title and axes of `height` inches including labels, and the axes."""
    lines = wrapped(title)
    total = height + 0.17 * len(lines) + 0.1
    figure = Figure(figsize=(WIDTH, total), layout="constrained")
    layout = figure.get_layout_engine()
    assert layout is not None
    layout.set(rect=(0, 0, 1, height / total))  # type: ignore[call-arg]
    draw_title(figure, lines, total)
    return figure, figure.add_subplot()


def draw_title(figure: Figure, lines: Sequence[str], height: float) -> None:
    """Write the lines of a title at the top of a figure of `height` inches."""
    for i, line in enumerate(lines):
        figure.text(0.012, 1 - (0.13 + 0.17 * i) / height, line, va="center", fontsize=10.5, fontweight="bold")


def wrapped(title: str) -> list[str]:
    """Return a title as lines that fit the width of a figure."""
    # A no-break space keeps a number and its unit on one line.
    return textwrap.wrap(title.replace(" %", "\u00a0%"), 53)


def colour_of(name: str) -> str:
    """Return the colour on white of a name in `PALETTE` or `VARIANTS`; unknown names are muted."""
    name = VARIANTS[name][0] if name in VARIANTS else name
    return PALETTE[name if name in PALETTE else "muted"][0]


@contextmanager
def figure_style() -> Iterator[None]:
    """Use this style inside the context; global settings are restored afterwards."""
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
