"""The sections of a run's page about what `slora evaluate` found."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from statistics import fmean
from typing import Any

from slora.errors import CheckpointError
from slora.io.bounded import read_json
from slora.report.charts import Line, curves
from slora.report.page import Picture, Section, Table
from slora.runs.eval_table import FORGETTING, TITLES, shown

FORGETTING_SHOWN = f"It is the {FORGETTING}."


def evaluation_sections(path: Path) -> list[Section]:
    """Return what `slora evaluate` wrote to `path`: accuracy, the table of before and after, and k-NN on old data.

    Empty if the file does not exist.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not path.exists():
        return []
    content = read_json(path)
    try:
        scores, knn = content["accuracy"], content["knn"]
        text = [
            f"Accuracy on {scores['data']}, {scores['count']:,} images: top-1 {100 * scores['top1']:.2f} %, top-5 "
            f"{100 * scores['top5']:.2f} %, mean over classes {100 * scores['per_class']:.2f} %."
        ]
        if knn is None:
            return [Section("Evaluation", text), *_table(content)]
        pairs = {int(k): (float(before), float(knn["after"][k])) for k, before in knn["before"].items()}
        text.append(
            f"Forgetting: weighted k-NN on the features of {knn['source']}, where {knn['bank']:,} images vote on "
            f"{knn['queries']:,} others, with the model before and after fine-tuning."
        )
        rows = [
            (str(k), f"{100 * before:.2f}", f"{100 * after:.2f}", f"{100 * (after - before):+.2f}")
            for k, (before, after) in pairs.items()
        ]
        table = Table(("neighbours k", "before (%)", "after (%)", "change (points)"), rows)
        # A curve needs more than one number of neighbours.
        pictures = [_knn_curves(knn, pairs)] if len(pairs) > 1 else []
        section = Section("Evaluation and forgetting", text, table=table, pictures=pictures)
        return [section, *_table(content)]
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is incomplete or damaged ({error!r}); run slora evaluate again") from error


def _table(content: Mapping[str, Any]) -> list[Section]:
    """All rows; an evaluation by an earlier version has none, one of a single row has said it already."""
    rows = content.get("rows") or []
    if len(rows) < 2:
        return []
    lines = [
        (
            f"{TITLES[row['task']]}: {shown(row['data'])}, {row['metric']}",
            *_shares(row),
            _pair(row.get("nll"), 1, "{:.3f}"),
            _pair(row.get("calibration_error"), 100, "{:.2f}"),
        )
        for row in rows
    ]
    lines += [(f"{TITLES[key]}, mean of top-1", *_shares(values), "", "") for key, values in content["means"].items()]
    columns = ("", "before (%)", "after (%)", "change (points)", "NLL", "ECE (%)")
    text = []
    if (found := content["forgetting"]) is not None:
        text = [f"Forgetting: {100 * found['mean_change']:+.2f} points over {found['sets']} sets. {FORGETTING_SHOWN}"]
    return [Section("Before and after", text, table=Table(columns, lines))]


def _shares(row: Mapping[str, Any]) -> tuple[str, str, str]:
    before, change = row["before"], row["change"]
    first = "-" if before is None else f"{100 * before:.2f}"
    return first, f"{100 * row['after']:.2f}", "-" if change is None else f"{100 * change:+.2f}"


def _pair(values: Mapping[str, Any] | None, factor: float, form: str) -> str:
    if values is None:
        return ""
    before, after = (values["before"], values["after"])
    first = "-" if before is None else form.format(factor * before)
    return f"{first} \N{RIGHTWARDS ARROW} {form.format(factor * after)}"


def _knn_curves(knn: Mapping[str, Any], pairs: Mapping[int, tuple[float, float]]) -> Picture:
    ks = sorted(pairs)
    lines: dict[str, list[Line]] = {
        name: [(ks, [pairs[k][i] for k in ks])] for i, name in enumerate(("before fine-tuning", "after"))
    }
    before, after = (100 * fmean(run[0][1]) for run in lines.values())
    title = f"k-NN on {knn['source']}: {before:.1f} % before, {after:.1f} % after, the mean over k"
    figure = curves(lines, title, "k-NN accuracy (%)", xlabel="neighbours k", percent=True)
    caption = "The vertical axis does not start at 0."
    return Picture(figure, f"{title}. Two curves over the number of neighbours.", caption)
