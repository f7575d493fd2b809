"""How far each block moves the model: the local drift over the run, and at its end that of the final features."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import fmean
from typing import Any

from slora.report.charts import curves
from slora.report.page import Picture, Section, Table

# Blocks in the table; a run may have hundreds.
MOST = 20


def drift_section(records: Sequence[Mapping[str, Any]]) -> Section | None:
    """Return the section of a run with `log_drift`; None for other runs."""
    logged = [record for record in records if record.get("drift")]
    if not logged:
        return None
    final: Mapping[str, Sequence[float]] = next(
        (record["feature_drift"] for record in reversed(records) if record.get("feature_drift")), {}
    )
    last = _by_block(logged[-1]["drift"])
    features = _by_block(final)
    shown = sorted((block for block in last if last[block] > 0), key=lambda block: -last[block])
    rows = [
        (block, f"{100 * last[block]:.3g}", f"{100 * features[block]:.3g}" if block in features else "")
        for block in shown[:MOST]
    ]
    note = f"The {MOST} blocks that move their layer most, of {len(shown)} active ones." if len(shown) > MOST else ""
    text = [
        "Local drift: what a block changes of the output of its layer, in percent of that output (mean squares), on "
        "fixed inputs of the base model. Feature drift: what it alone changes of the final features, in percent of "
        "their variance."
    ]
    steps = [record["step"] for record in logged]
    active = [[value for value in _by_block(record["drift"]).values() if value > 0] or [0.0] for record in logged]
    title = f"Local drift of the active blocks: {100 * fmean(active[-1]):.2g} % on average at the end"
    lines = {"largest": [(steps, [max(each) for each in active])], "mean": [(steps, [fmean(each) for each in active])]}
    picture = Picture(
        curves(lines, title, "local drift (%)", percent=True, zero=True),
        f"{title}. Two curves over optimizer steps: the largest and the mean.",
    )
    table = Table(("block", "local drift (%)", "feature drift (%)"), rows, note)
    return Section("How far each block moves the model", text, table=table, pictures=[picture])


def _by_block(drift: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """`{"layer, block 2": value}`; a layer with one block has its own name."""
    return {
        name if len(values) == 1 else f"{name}, block {i + 1}": value
        for name, values in drift.items()
        for i, value in enumerate(values)
    }
