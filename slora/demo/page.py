"""The HTML report of the demo: tables, and figures of target against retention, chosen blocks, and cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from slora.demo.clip_page import clip_sections
from slora.demo.judge import HEADINGS, aims, by_seed, flops, forgetting, rows
from slora.demo.methods import BUDGET, COMMON, METHODS, NEIGHBOURS, TEMPERATURE
from slora.report.block_map import block_map
from slora.report.charts import bars, curves, target_against_retention
from slora.report.page import Picture, Section, Table, write_page
from slora.report.style import save_png

Result = Mapping[str, Any]

# Names of the methods in figures.
SHORT = {
    "linear": "linear probe",
    "lora": "LoRA, all",
    "head-first": "head first, all",
    "rank-16": "all, rank 16",
    "distilled": "all + distillation",
    "last": "last 4",
    "random": "random 4",
    "late-fc1": "late fc1",
    "selective": "selective 4",
    "selective-distilled": "selective 4 + distillation",
}

NOTE = (
    "Mean ± standard deviation over seeds. Blocks: active at the end, of 36. NLL: cross-entropy on the test images in "
    "nats, labels smoothed as in training. Lost: points of accuracy on letters that pretraining never saw, of weighted "
    f"k-NN on the features (k = {NEIGHBOURS}, temperature {TEMPERATURE}) and of the original head. Parameters: those "
    "trained that belong to the result. TFLOP, of the first seed, and seconds: of the training steps."
)


def write_report(result: Result, out: Path) -> Path:
    """Write `report.html`, `blocks.png` and `scatter.png` into `out` and return the path of the page.

    Raises:
        WriteError: a file cannot be written; names it and the cause.
    """
    blocks, scatter = _block_map(result), _scatter(result)
    save_png(blocks.figure, out / "blocks.png")
    save_png(scatter.figure, out / "scatter.png")
    sections = [
        Section("Results", points=aims(result), table=Table(HEADINGS, rows(result), NOTE)),
        Section("Target, retention and blocks", pictures=[scatter, blocks]),
        Section("Cost", pictures=_costs(result)),
        Section("Over the run", pictures=_curves(result)),
        *clip_sections(result),
    ]
    if len(result["shifts"]) > 1:
        sections += [
            Section(f"The shift {shift!r} alone", table=Table(HEADINGS, rows(result, shift)), folded=True)
            for shift in result["shifts"]
        ]
    sections.append(Section("Settings", table=_settings_table(result["settings"]), folded=True))
    environment = result["environment"]
    footer = " · ".join(f"{name} {value}" for name, value in environment.items() if name != "slora")
    return write_page(out / "report.html", "Fine-tuning without forgetting: the demo", lead(result), sections, footer)


def lead(result: Result) -> str:
    """Return the sentences under the title."""
    seeds = len({run["seed"] for run in result["runs"]})
    before = result["source_before"]
    text = (
        f"A small vision transformer that classifies rendered letters is fine-tuned on handwritten digits "
        f"({', '.join(result['shifts'])}; {seeds} {'seeds' if seeds > 1 else 'seed'}). Forgetting is measured on "
        f"letters: before fine-tuning the model classifies {100 * before['head']:.1f} % of them correctly, k-NN on its "
        f"features {100 * before['knn']:.1f} %."
    )
    if result["quick"]:
        text += " This was a quick run: it shows that everything works, its results mean nothing."
    return text


def _present(result: Result) -> list[str]:
    return [method for method in METHODS if any(run["method"] == method for run in result["runs"])]


def _scatter(result: Result) -> Picture:
    before = result["source_before"]["knn"]
    points = {
        method: list(
            zip(
                by_seed(result, method, lambda run: before - float(run["knn"]) / 100),
                by_seed(result, method, lambda run: float(run["accuracy"])),
                strict=True,
            )
        )
        for method in _present(result)
    }
    lost = {m: fmean(by_seed(result, m, forgetting)) for m in ("selective-distilled", "head-first")}
    reached = {m: 100 * fmean(by_seed(result, m, lambda run: float(run["accuracy"]))) for m in lost}
    title = (
        f"{BUDGET} blocks and distillation: {reached['selective-distilled']:.1f} % of digits, "
        f"{lost['selective-distilled']:.1f} points of letters lost; LoRA on all: {reached['head-first']:.1f} %, "
        f"{lost['head-first']:.1f}"
    )
    caption = "Up: better on the new task. Right: less forgetting. Small marks: single seeds; bars: standard deviation."
    return Picture(target_against_retention(points, before, title, SHORT), f"Scatter plot. {title}.", caption)


def _block_map(result: Result) -> Picture:
    runs = [run for run in result["runs"] if run["method"] == "selective-distilled"]
    blocks = runs[0]["blocks"]
    title = f"The {BUDGET} of {blocks} blocks that selection chooses" + (f", {len(runs)} runs" if len(runs) > 1 else "")
    caption = "One cell per LoRA block. The number in a cell: how many runs (seeds and shifts) choose the block."
    return Picture(
        block_map([run["block_map"] for run in runs], title), f"Map of layers by projections. {title}.", caption
    )


def _costs(result: Result) -> list[Picture]:
    def values(key: str, scale: float) -> dict[str, list[float]]:
        return {m: by_seed(result, m, lambda run: scale * float(run[key])) for m in _present(result)}

    lost = {m: by_seed(result, m, forgetting) for m in _present(result)}
    computed = {m: [1e-12 * flops(result, m)] for m in _present(result)}
    panels = (
        (lost, "What each forgets", "points of letters lost, mean of k-NN and original head", "{:.2f}"),
        (values("kept", 1e-3), "What each adds", "trained parameters in the result (thousands)", "{:.1f}"),
        (computed, "What each computes", "training, forward and backward (TFLOP)", "{:.2f}"),
        (values("seconds", 1.0), "What each takes", "training time (s)", "{:.1f}"),
    )
    return [Picture(bars(v, title, xlabel, SHORT, form), f"{title}. Bars.") for v, title, xlabel, form in panels]


def _curves(result: Result) -> list[Picture]:
    runs = [run for run in result["runs"] if run["method"] in ("selective", "selective-distilled")]
    lines = {
        method: [
            ([step for step, _ in run["active_at"]], [active for _, active in run["active_at"]])
            for run in runs
            if run["method"] == method
        ]
        for method in ("selective", "selective-distilled")
    }
    title = f"All blocks train, then they are switched off one by one until {BUDGET} are left"
    return [Picture(curves(lines, title, "active blocks", labels=SHORT, zero=True), f"{title}. Curves over steps.")]


def _settings_table(settings: Mapping[str, Mapping[str, Any]]) -> Table:
    names = dict.fromkeys([*COMMON, *(name for method in METHODS.values() for name in method.own)])
    # In the order of METHODS: JSON files may be sorted.
    settings = {method: settings[method] for method in METHODS}
    table: list[Sequence[str]] = [
        [name, *("" if of.get(name) is None else str(of[name]) for of in settings.values())] for name in names
    ]
    return Table(["setting", *(SHORT[method] for method in settings)], table, "Other settings have their defaults.")
