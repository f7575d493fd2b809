"""The glyph CLIP in the demo's report: its table, and zero-shot accuracy on letters against accuracy on digits."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import fmean
from typing import Any

from slora.demo.clip_methods import CLIP_METHODS, CLIP_SCALED
from slora.demo.judge import with_spread
from slora.demo.methods import BUDGET, HALF, RETAINED_COUNT
from slora.report.charts import target_against_retention
from slora.report.page import Picture, Section, Table

Result = Mapping[str, Any]
Run = Mapping[str, Any]

CLIP_HEADINGS = ("method", "blocks", "digits %", "NLL", "letters lost", "drift", "parameters", "TFLOP", "seconds")

_SHORT = {
    "lora": "LoRA, all",
    "scaled": f"LoRA, all, scaled by {HALF:g}",
    "distilled": "all + distillation",
    "last": "last 4",
    "selective": "selective 4",
    "selective-distilled": "selective 4 + distillation",
}

_NOTE = (
    "Mean ± standard deviation over seeds. Blocks: active at the end, of 36. Digits and NLL: with the prompts of the "
    "digits as the head. Letters lost: points of zero-shot accuracy on letters in fonts that pretraining never saw. "
    "Drift: mean squared change of the embeddings of these letters, relative to their variance. Parameters: trained "
    "ones of the result. TFLOP, of the first seed, and seconds: of the training steps."
)


def clip_rows(clip: Result) -> list[list[str]]:
    """Return the table's cells under `CLIP_HEADINGS`.

    Args:
        clip: the entry "clip" of `demo.json`.
    """
    lines = []
    for method, entry in CLIP_METHODS.items():
        runs = _runs(clip, method)
        if not runs:
            continue
        counted = [run["flops"] for run in runs if run["flops"]]
        costs = [
            f"{fmean(run['kept'] for run in runs):,.0f}",
            f"{fmean(counted) / 1e12:.2f}" if counted else "",
            f"{fmean(run['seconds'] for run in runs):.1f}",
        ]
        lines.append([entry.label, f"{fmean(run['active'] for run in runs):g}", *_measures(runs), *costs])
        if scaled := _at(runs, HALF):
            lines.append([f"the same, scaled by {HALF:g}", lines[-1][1], *_measures(scaled), "", "", ""])
    return lines


def _runs(clip: Result, method: str) -> list[Run]:
    return [run for run in clip["runs"] if run["method"] == method]


def _at(runs: list[Run], scale: float) -> list[Run]:
    """The measures of the runs with their update times `scale`."""
    return [entry for run in runs for entry in run["scaled"] if entry["scale"] == scale]


def _measures(runs: list[Run]) -> list[str]:
    return [
        with_spread([factor * float(run[key]) for run in runs], form)
        for key, factor, form in (
            ("accuracy", 100, ".2f"), ("nll", 1, ".3f"), ("zero_shot", 1, ".2f"), ("drift", 1, ".3f"),
        )
    ]  # fmt: skip


def clip_sentence(clip: Result) -> str:
    """Return what four blocks and distillation reach, and LoRA on all blocks, whole and scaled."""

    def reached(runs: list[Run]) -> str:
        lost = [float(run["zero_shot"]) for run in runs]
        return f"{100 * fmean(float(run['accuracy']) for run in runs):.1f} % and {with_spread(lost, '.1f')}"

    before, lora = clip["before"], _runs(clip, "lora")
    return (
        f"Zero-shot, the glyph CLIP reads {100 * before['letters']:.1f} % of letters in new fonts, and "
        f"{100 * before['digits']:.1f} % of handwritten digits, which it never saw. Digits read after fine-tuning, and "
        f"points of letters lost: {BUDGET} blocks with {RETAINED_COUNT} unlabelled letters "
        f"{reached(_runs(clip, 'selective-distilled'))}; {BUDGET} blocks {reached(_runs(clip, 'selective'))}; LoRA on "
        f"all {reached(lora)}, scaled by {HALF:g} {reached(_at(lora, HALF))}, with the unlabelled letters "
        f"{reached(_runs(clip, 'distilled'))}."
    )


def clip_sections(result: Result) -> list[Section]:
    """Return the report's section on the glyph CLIP; none if `demo.json` is from before there was one."""
    clip = result.get("clip")
    if not clip:
        return []
    table = Table(CLIP_HEADINGS, clip_rows(clip), _NOTE)
    return [
        Section("A CLIP: zero-shot before and after", [clip_sentence(clip)], table=table, pictures=[_scatter(clip)])
    ]


def _scatter(clip: Result) -> Picture:
    before = clip["before"]["letters"]

    def point(run: Run) -> tuple[float, float]:
        return before - float(run["zero_shot"]) / 100, float(run["accuracy"])

    points = {method: [point(run) for run in runs] for method in CLIP_METHODS if (runs := _runs(clip, method))}
    lora = _runs(clip, CLIP_SCALED)
    points["scaled"] = [point(run) for run in _at(lora, HALF)]
    scales = sorted({entry["scale"] for run in lora for entry in run["scaled"]})
    path = [(before, clip["before"]["digits"]), *(_mean(_at(lora, s), point) for s in scales), _mean(lora, point)]
    lost = {m: fmean(float(run["zero_shot"]) for run in _runs(clip, m)) for m in CLIP_METHODS}
    title = (
        f"Points of letters lost: {lost['selective-distilled']:.1f} by {BUDGET} blocks and {lost['distilled']:.1f} by "
        f"all with distillation, {lost['lora']:.1f} by all without"
    )
    figure = target_against_retention(
        points, before, title, _SHORT, measure="zero-shot accuracy on letters", paths={"lora": path}
    )
    caption = (
        "Up: better on the new task. Right: less forgetting. Small marks: single seeds; bars: standard deviation. "
        "Dotted: LoRA on all with its update scaled, from nothing to whole."
    )
    return Picture(figure, f"Scatter plot. {title}.", caption)


def _mean(runs: list[Run], point: Callable[[Run], tuple[float, float]]) -> tuple[float, float]:
    xs, ys = zip(*map(point, runs), strict=True)
    return fmean(xs), fmean(ys)
