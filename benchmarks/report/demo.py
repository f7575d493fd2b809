"""The README's table of the demo, from what `slora demo` wrote."""

from __future__ import annotations

from typing import Any

from benchmarks.report.tables import table
from slora.demo.judge import HEADINGS, aims, rows


def demo_table(demo: dict[str, Any]) -> str:
    """One row per method: means over shifts, then mean and standard deviation over seeds."""
    about, before = demo["environment"], demo["source_before"]
    seeds = len({run["seed"] for run in demo["runs"]})
    note = (
        f"Means over {', '.join(demo['shifts'])}; standard deviation over {seeds} seeds. From `docs/demo.json`: "
        f"{about['processor']} (one thread each), slora {about['slora']}, torch {about['torch']}. Before: "
        f"{100 * before['knn']:.2f} % of letters by k-NN, {100 * before['head']:.2f} % by the original head. The aims "
        f"that were set:"
    )
    points = "\n".join(f"* {sentence}" for sentence in aims(demo))
    return "\n\n".join([table(HEADINGS, rows(demo)), note, points])
