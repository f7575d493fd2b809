"""Reports: what came out of a run, as one HTML page.

    plots.py      the figures, and the looks of all
    gates.py      the figure of all gates over the steps
    page.py       text, tables and figures as one file; page.html.j2 is its layout

This file holds the page of a `slora finetune` run; the page of `slora demo` is made in `slora.demo.run`.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from slora.adapters.files import SELECTIVE, read_selective
from slora.errors import CheckpointError, ConfigError
from slora.io.bounded import read_json
from slora.io.yaml_files import read_yaml
from slora.report.gates import gate_curves
from slora.report.page import Picture, Section, Table, scaled, write_page
from slora.report.plots import Line, block_map, curves
from slora.runs.outcome import explained, not_finite
from slora.runs.recorder import METRICS, read_metrics
from slora.runs.settings import TrainSettings

__all__ = ["write_report"]

CONFIG, ADAPTER, REPORT, EVALUATION = "config.yaml", "adapter", "report.html", "evaluation.json"

# Records drawn of each gate, at most twice as many.
MOST_POINTS = 200

Records = Sequence[Mapping[str, Any]]


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a run directory and return its path.

    Read are `metrics.jsonl`, and, where they are there, `config.yaml`, `adapter/selective.json` and `evaluation.json`:
    a run that was stopped before its end, that has no blocks, or that was not evaluated gets a report of what it has.

    Args:
        run_dir: the directory that `slora finetune` or `slora.training.train` wrote.
        out: the HTML file to write; None for `report.html` in `run_dir`.

    Raises:
        CheckpointError: `metrics.jsonl` is missing or empty, or a file is damaged.
        WriteError: `out` cannot be written.
        ConfigError: `config.yaml` is not a mapping of settings.
    """
    run_dir = Path(run_dir)
    records = read_metrics(run_dir / METRICS)
    if not _steps(records) and not not_finite(records):
        raise CheckpointError(f"{run_dir / METRICS} holds no training step yet; let the run reach its first log line")
    settings = _settings(run_dir / CONFIG) if (run_dir / CONFIG).exists() else {}
    blocks = _blocks(run_dir / ADAPTER / SELECTIVE)
    evaluation = _evaluation(run_dir / EVALUATION)
    sections = [Section("Over the run", pictures=_curves(_from_start(records, settings)))] if _steps(records) else []
    if evaluation is not None:
        sections.insert(0, evaluation)
    chosen = _gates(_from_start(records, settings), settings.get("threshold"))
    if chosen := chosen + ([_block_map(blocks)] if blocks else []):
        sections.append(Section("Which blocks are active", pictures=chosen))
    if settings:
        rows = [(name, _shown(value)) for name, value in settings.items()]
        sections.append(Section("Settings", table=Table(("setting", "value"), rows), folded=True))
    title = f"Fine-tuning run {run_dir.resolve().name}"
    out = run_dir / REPORT if out is None else Path(out)
    return write_page(out, title, _lead(records, settings), sections, alert=_alert(records, settings))


def _settings(path: Path) -> dict[str, Any]:
    """The settings in `config.yaml`, those of this version of slora checked; of another version's the text."""
    values = {str(name).replace("-", "_"): value for name, value in read_yaml(path).items()}
    known = {field.name for field in dataclasses.fields(TrainSettings)}
    try:
        checked = TrainSettings.from_dict({name: value for name, value in values.items() if name in known}).to_dict()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return {name: checked.get(name, str(value)[:200]) for name, value in values.items()}


def _steps(records: Records) -> Records:
    """The records of training steps: without evaluations, and without the end of a run that broke off."""
    return [record for record in records if record.get("loss") is not None]


def _from_start(records: Records, settings: Mapping[str, Any]) -> Records:
    """The records with what blocks and gates were before the first step, where selection began with all blocks on."""
    first = next((record for record in records if record.get("gates")), None)
    gate = settings.get("gate_init")
    if first is None or gate is None or gate < settings.get("threshold", gate):
        return records
    gates = {name: [gate] * len(scores) for name, scores in first["gates"].items()}
    return [{"step": 0, "active": first["blocks"], "gates": gates}, *records]


def _alert(records: Records, settings: Mapping[str, Any]) -> str:
    """What makes the run of no use, why, and the remedy; empty for any other run."""
    if broken := not_finite(records):
        remedy = "Lower lr or lengthen warmup, and go on from the last checkpoint (--resume) or start again."
        return f"This run is dead: {broken}. {remedy}"
    last = _steps(records)[-1]
    if last.get("blocks") and not last["active"] and settings.get("budget") is None:
        text = explained(0, last["blocks"], settings, records)
        return f"This run is dead: {text}" if text else ""
    return ""


def _lead(records: Records, settings: Mapping[str, Any]) -> str:
    last = [*records[-1:], *_steps(records)][-1]
    what = ", ".join(str(settings[key]) for key in ("model", "data", "method") if settings.get(key))
    text = (f"{what}: " if what else "") + f"{last['step']} steps"
    if last.get("seconds") is not None:
        text += f", {last['seconds']:.0f} s"
    if last.get("flops"):
        text += f", {scaled(last['flops'])}FLOP"
    evaluated = [record for record in records if record.get("eval_accuracy") is not None]
    if evaluated:
        best = max(evaluated, key=lambda record: float(record["eval_accuracy"]))
        text += f". Accuracy on the evaluation data: {100 * evaluated[-1]['eval_accuracy']:.2f} % at the end"
        if best["step"] != evaluated[-1]["step"]:
            text += f", {100 * best['eval_accuracy']:.2f} % at its best (step {best['step']})"
    if last.get("blocks"):
        text += f". {last['active']} of {last['blocks']} blocks are active"
    said = _alert(records, settings)
    why = explained(last["active"], last["blocks"], settings, records) if last.get("blocks") and not said else ""
    return f"{text}. {why[:1].upper()}{why[1:]}".rstrip() if why else text + "."


def _curves(records: Records) -> list[Picture]:
    """Loss, accuracy, active blocks and learning rate: those of them that were recorded."""

    def lines(keys: Mapping[str, str]) -> dict[str, list[Line]]:
        kept = {key: [record for record in records if record.get(key) is not None] for key in keys}
        return {
            name: [([r["step"] for r in kept[key]], [r[key] for r in kept[key]])]
            for key, name in keys.items()
            if kept[key]
        }

    def last(drawn: Mapping[str, Sequence[Line]], form: str, factor: float = 1) -> str:
        return ", ".join(f"{name} {form.format(factor * runs[0][1][-1])}" for name, runs in drawn.items())

    pictures = []
    if loss := lines({"loss": "training", "eval_loss": "evaluation"}):
        title = f"Loss at the end: {last(loss, '{:.3f}')}"
        pictures.append((title, curves(loss, title, "cross-entropy (nats)", zero=True)))
    if accuracy := lines({"accuracy": "training", "eval_accuracy": "evaluation"}):
        title = f"Accuracy at the end: {last(accuracy, '{:.1f} %', 100)}"
        pictures.append((title, curves(accuracy, title, "accuracy (%)", percent=True)))
    if active := lines({"active": "active blocks"}):
        values = active["active blocks"][0][1]
        title = f"Active blocks: {values[0]:.0f} at first, {values[-1]:.0f} at the end"
        pictures.append((title, curves(active, title, "active blocks", zero=True)))
    if rate := lines({"lr": "learning rate"}):
        title = f"Learning rate: {max(rate['learning rate'][0][1]):.3g} at its highest"
        pictures.append((title, curves(rate, title, "learning rate", zero=True)))
    return [Picture(figure, f"{title}. A curve over optimizer steps.") for title, figure in pictures]


def _gates(records: Records, threshold: float | None) -> list[Picture]:
    """All gates over the steps; empty for runs that did not record them."""
    kept = [record for record in records if record.get("gates")]
    if not kept:
        return []
    # A page of thousands of records times hundreds of gates would be too large; the last record stays.
    kept = kept[:: -max(1, len(kept) // MOST_POINTS)][::-1]
    layers = {name: range(len(scores)) for name, scores in kept[-1]["gates"].items()}
    kept = [record for record in kept if {n: range(len(s)) for n, s in record["gates"].items()} == layers]
    gates = {name: [[r["gates"][name][i] for r in kept] for i in blocks] for name, blocks in layers.items()}
    last = [values[-1] for scores in gates.values() for values in scores]
    title, caption = f"{len(last)} gates from {min(last):.2g} to {max(last):.2g} at the end", "One line per block."
    if threshold is not None:
        title = f"{sum(value >= threshold for value in last)} of {len(last)} gates end at or above the threshold"
        caption += " Strong lines with a dot end active, faint ones inactive."
    figure = gate_curves([record["step"] for record in kept], gates, threshold, title)
    return [Picture(figure, f"{title}. A curve of each gate over optimizer steps.", caption)]


def _evaluation(path: Path) -> Section | None:
    """What `slora evaluate` found: accuracy, and k-NN on what the model knew before; None where it was not run."""
    if not path.exists():
        return None
    content = read_json(path)
    try:
        scores, knn = content["accuracy"], content["knn"]
        text = [
            f"Accuracy on {scores['data']}, {scores['count']:,} images: {100 * scores['top1']:.2f} % for the first "
            f"choice, {100 * scores['top5']:.2f} % among the first five, {100 * scores['per_class']:.2f} % as the mean "
            f"over classes."
        ]
        if knn is None:
            return Section("What it can do", text)
        pairs = {int(k): (float(before), float(knn["after"][k])) for k, before in knn["before"].items()}
        text.append(
            f"What it still knows: weighted k-NN on the features of {knn['source']}, where {knn['bank']:,} images vote "
            f"on {knn['queries']:,} others, with the model before and after fine-tuning."
        )
        rows = [
            (str(k), f"{100 * before:.2f}", f"{100 * after:.2f}", f"{100 * (after - before):+.2f}")
            for k, (before, after) in pairs.items()
        ]
        table = Table(("neighbours k", "before (%)", "after (%)", "change (points)"), rows)
        # One number of neighbours makes no curve.
        pictures = [_kept(knn, pairs)] if len(pairs) > 1 else []
        return Section("What it can do, and what it still knows", text, table=table, pictures=pictures)
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise CheckpointError(f"{path} is incomplete or damaged ({error!r}); run slora evaluate again") from error


def _kept(knn: Mapping[str, Any], pairs: Mapping[int, tuple[float, float]]) -> Picture:
    ks = sorted(pairs)
    lines: dict[str, list[Line]] = {
        name: [(ks, [pairs[k][i] for k in ks])] for i, name in enumerate(("before fine-tuning", "after"))
    }
    before, after = (100 * fmean(run[0][1]) for run in lines.values())
    title = f"k-NN on {knn['source']}: {before:.1f} % before, {after:.1f} % after, the mean over k"
    figure = curves(lines, title, "k-NN accuracy (%)", xlabel="neighbours k", percent=True)
    caption = "The vertical axis does not start at 0."
    return Picture(figure, f"{title}. Two curves over the number of neighbours.", caption)


def _blocks(path: Path) -> dict[str, list[bool]]:
    """`{layer: active or not, one per block}` of an adapter; empty where there is none."""
    if not path.exists():
        return {}
    layers = read_selective(path.parent).layers
    return {name: [i in entry.active for i in range(entry.blocks)] for name, entry in layers.items()}


def _block_map(blocks: Mapping[str, Sequence[bool]]) -> Picture:
    active, total = sum(map(sum, blocks.values())), sum(map(len, blocks.values()))
    title = f"{active} of {total} blocks are active ({100 * active / total:.0f} %)"
    caption = "One cell per LoRA block: layers from top to bottom, projections from left to right."
    return Picture(block_map([blocks], title), f"{title}, by layer and projection.", caption)


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
