"""The figure of one training step: its time and its peak memory by method."""

from __future__ import annotations

from typing import Any

from benchmarks.report import style, tables
from benchmarks.report.summary import memory_beside

FROZEN = "frozen, dx everywhere"
Results = dict[str, dict[str, Any]]


def step_rows(cases: Results) -> list[dict[str, Any]]:
    """The first point in fp32, where memory is measured on a CPU, else the first."""
    points = list(tables.points(cases["train_step"]).values())
    return next((rows for rows in points if rows[0]["point"]["precision"] == "fp32"), points[0])


def steps(cases: Results) -> dict[str, tuple[Any, float | None]]:
    """`{contender: (time, peak MiB)}` at one point of `train_step`; memory of the same machine only."""
    rows = step_rows(cases)
    precision = rows[0]["point"]["precision"]
    memory = memory_beside(cases["train_step"], cases.get("train_memory"))
    peaks = {
        row["contender"]: row.get("peak_memory_mib")
        for row in (memory or {"rows": []})["rows"]
        if row["point"]["precision"] == precision
    }
    return {
        row["contender"]: (row["seconds"], row.get("peak_memory_mib", peaks.get(row["contender"])))
        for row in rows
        if "seconds" in row
    }


def draw_steps(plots: Any, found: dict[str, tuple[Any, float | None]]) -> Any:
    """Two panels of bars, the fastest method on top."""
    names = sorted(found, key=lambda name: style.heights([found[name][0]])[0], reverse=True)
    figure, axes = plots.subplots(1, 2, sharey=True, figsize=(10.0, 0.36 * len(names) + 2.2), layout="constrained")
    labels = [style.words(name) for name in names]
    colours = [style.COLOURS[style.family(name)][0] for name in names]
    times = [found[name][0] for name in names]
    axes[0].barh(labels, style.heights(times), xerr=style.reach(times), color=colours, error_kw=style.ERRORS,
                 **style.EDGE)  # fmt: skip
    axes[0].set_xlabel("time of one training step (s)")
    peaks = [found[name][1] for name in names]
    axes[1].barh(labels, [peak or 0.0 for peak in peaks], color=colours, **style.EDGE)
    measured = any(peak is not None for peak in peaks)
    axes[1].set_xlabel("peak memory (MiB)" if measured else "peak memory: not measured on this machine")
    axes[1].xaxis.set_major_formatter("{x:,.0f}")
    axes[1].tick_params(left=False)
    for axis, value in zip(axes, found.get(FROZEN, ()), strict=False):
        if value is not None:
            axis.axvline(style.heights([value])[0], color="black", linewidth=1.2, linestyle="--")
    for axis in axes:
        style.open_frame(axis)
    return figure
