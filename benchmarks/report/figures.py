"""Figures of result files, drawn with matplotlib: a file per device and kind."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from benchmarks.report import style
from benchmarks.report.layer_figures import all_active, curve, curve_rows, draw_curve, draw_over_frozen, over_frozen
from benchmarks.report.step_figure import draw_steps, step_rows, steps
from benchmarks.report.summary import memory_beside
from benchmarks.results import source
from slora.io.atomic import write_atomically

Results = dict[str, dict[str, Any]]


@dataclass(frozen=True)
class Figure:
    """A figure: the case it is of, the rows in it, what is taken from them, and how that is drawn."""

    case: str
    title: str
    rows: Callable[[Results], list[dict[str, Any]]]
    data: Callable[[Results], Any]
    draw: Callable[[Any, Any], Any]
    left_out: tuple[str, ...] = ()
    """Keys of the points that the title or the axes say already."""


FIGURES = {
    "linear": Figure(
        "linear", "One linear layer, all blocks active", all_active, over_frozen, draw_over_frozen, ("active",)
    ),
    "train-step": Figure("train_step", "One training step", step_rows, steps, draw_steps),
    **{
        name: Figure("scaling", title, curve_rows(name), curve(name), draw_curve(label), ("curve",))
        for name, title, label in (
            ("active", "Cost against active share, 16 blocks", "active share of the layer's blocks"),
            ("rank", "Cost against rank", "rank r"),
            ("tokens", "Cost against tokens", "rows of x (tokens)"),
        )
    },
}


def of_case(device: str, case: str, results: Results) -> list[tuple[str, str]]:
    """`(file name, title)` of the figures that `results` give for `case`."""
    return [
        (f"{device}-{name}.png", figure.title)
        for name, figure in FIGURES.items()
        if figure.case == case and case in results and figure.data(results)
    ]


def draw_all(results: dict[str, Results], folder: Path) -> list[Path]:
    """Draw every figure that there are results for; return the files."""
    plots = style.pyplot()
    drawn = []
    for device, cases in results.items():
        for name, plan in FIGURES.items():
            if plan.case not in cases or not (found := plan.data(cases)):
                continue
            figure = plan.draw(plots, found)
            figure.suptitle(heading(plan, cases), fontsize=10)
            path = folder / f"{device}-{name}.png"
            # No date and no version inside: the same results give the same file.
            write_atomically(path, partial(figure.savefig, format="png", dpi=130, metadata={"Software": None}))
            plots.close(figure)
            drawn.append(path)
    return drawn


def heading(plan: Figure, cases: Results) -> str:
    """What is drawn, and of which machine and source."""
    about = cases[plan.case]["environment"]
    points = [row["point"] for row in plan.rows(cases)]
    commits = source(about)
    memory = memory_beside(cases["train_step"], cases.get("train_memory")) if plan.case == "train_step" else None
    if memory and source(memory["environment"]) != commits:
        commits += f", memory: {source(memory['environment'])}"
    return (
        f"{plan.title}: {style.subject(points, plan.left_out)}\n{about['device']}, {commits}\n"
        "times: medians, and from the 20th to the 80th percentile"
    )
