"""The page of a `slora finetune` run: curves, gates, active blocks, what `slora evaluate` found, settings."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from slora.adapters.selective_json import SELECTIVE, read_selective
from slora.errors import CheckpointError, ConfigError
from slora.io.yaml_files import read_yaml
from slora.report.block_map import block_map
from slora.report.charts import Line, curves
from slora.report.drift import drift_section
from slora.report.evaluation import evaluation_sections
from slora.report.gates import gate_curves
from slora.report.page import Picture, Section, Table, scaled, write_page
from slora.runs.explain_blocks import explained, not_finite
from slora.runs.heads import is_contrastive
from slora.runs.metrics import METRICS, read_metrics
from slora.runs.settings import TrainSettings
from slora.runs.strategies import STRATEGIES, strategy_of

CONFIG, ADAPTER, REPORT, EVALUATION = "config.yaml", "adapter", "report.html", "evaluation.json"

# About so many points per gate are drawn, at most twice as many.
MOST_POINTS = 200

Records = Sequence[Mapping[str, Any]]


def write_report(run_dir: Path, out: Path | None = None) -> Path:
    """Write the report of a run directory and return its path.

    It reads `metrics.jsonl` and, if they exist, `config.yaml`, `adapter/selective.json` and `evaluation.json`: the
    report of an unfinished run, or of one without blocks or evaluation, lacks the corresponding sections.

    Args:
        run_dir: a directory written by `slora finetune` or `slora.training.train`.
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
    evaluation = evaluation_sections(run_dir / EVALUATION)
    sections = [Section("Over the run", pictures=_curves(_from_start(records, settings)))] if _steps(records) else []
    sections[:0] = evaluation
    chosen = _gates(_from_start(records, settings), settings.get("threshold"))
    if chosen := chosen + ([_block_map(blocks)] if blocks else []):
        sections.append(Section("Which blocks are active", pictures=chosen))
    if (moved := drift_section(records)) is not None:
        sections.append(moved)
    if settings:
        rows = [(name, _shown(value)) for name, value in settings.items()]
        sections.append(Section("Settings", table=Table(("setting", "value"), rows), folded=True))
    title = f"Fine-tuning run {run_dir.resolve().name}"
    out = run_dir / REPORT if out is None else Path(out)
    return write_page(out, title, _lead(records, settings), sections, alert=_alert(records, settings))


def _settings(path: Path) -> dict[str, Any]:
    """The settings in `config.yaml`; those that this version of slora does not know as text."""
    values = {str(name).replace("-", "_"): value for name, value in read_yaml(path).items()}
    known = {field.name for field in dataclasses.fields(TrainSettings)}
    try:
        checked = TrainSettings.from_dict({name: value for name, value in values.items() if name in known}).to_dict()
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    return {name: checked.get(name, str(value)[:200]) for name, value in values.items()}


def _steps(records: Records) -> Records:
    """The records of training steps, without evaluations and errors."""
    return [record for record in records if record.get("loss") is not None]


def _from_start(records: Records, settings: Mapping[str, Any]) -> Records:
    """The records, preceded by the initial blocks and gates if all blocks were active at the start."""
    first = next((record for record in records if record.get("gates")), None)
    gate = settings.get("gate_init")
    if STRATEGIES[strategy_of(settings)].phases is None:
        # The blocks were chosen before the first step.
        return records
    if first is None or gate is None or gate < settings.get("threshold", gate):
        return records
    gates = {name: [gate] * len(scores) for name, scores in first["gates"].items()}
    return [{"step": 0, "active": first["blocks"], "gates": gates}, *records]


def _alert(records: Records, settings: Mapping[str, Any]) -> str:
    """Why the run is useless and what to do; empty for any other run."""
    if broken := not_finite(records):
        remedy = "Lower lr or lengthen warmup, and resume from the last checkpoint (--resume) or start again."
        return f"This run failed: {broken}. {remedy}"
    last = _steps(records)[-1]
    if last.get("blocks") and not last["active"] and settings.get("budget") is None:
        text = explained(0, last["blocks"], settings, records)
        return f"This run failed: {text}" if text else ""
    return ""


def _lead(records: Records, settings: Mapping[str, Any]) -> str:
    last = [*records[-1:], *_steps(records)][-1]
    words = [str(settings[key]) for key in ("model", "data", "method", "strategy") if settings.get(key)]
    if settings.get("head") == "zero-shot":
        trained = {"both": "both towers"}.get(settings["tower"], f"{settings['tower']} tower")
        words.append(f"{trained} with a zero-shot head")
        words.append("contrastive loss" if is_contrastive(settings) else "cross-entropy")
    what = ", ".join(words)
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
    """Loss, accuracy, active blocks and learning rate, as far as they were recorded."""

    def lines(keys: Mapping[str, str]) -> dict[str, list[Line]]:
        having = {key: [record for record in records if record.get(key) is not None] for key in keys}
        return {
            name: [([r["step"] for r in having[key]], [r[key] for r in having[key]])]
            for key, name in keys.items()
            if having[key]
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
    drawn = [record for record in records if record.get("gates")]
    if not drawn:
        return []
    # Thousands of records times hundreds of gates would make the page too large; the last record is always drawn.
    drawn = drawn[:: -max(1, len(drawn) // MOST_POINTS)][::-1]
    layers = {name: range(len(scores)) for name, scores in drawn[-1]["gates"].items()}
    drawn = [record for record in drawn if {n: range(len(s)) for n, s in record["gates"].items()} == layers]
    gates = {name: [[r["gates"][name][i] for r in drawn] for i in blocks] for name, blocks in layers.items()}
    last = [values[-1] for scores in gates.values() for values in scores]
    title, caption = f"{len(last)} gates from {min(last):.2g} to {max(last):.2g} at the end", "One line per block."
    if threshold is not None:
        title = f"{sum(value >= threshold for value in last)} of {len(last)} gates end at or above the threshold"
        caption += " Strong lines with a dot end active, faint lines inactive."
    figure = gate_curves([record["step"] for record in drawn], gates, threshold, title)
    return [Picture(figure, f"{title}. A curve of each gate over optimizer steps.", caption)]


def _blocks(path: Path) -> dict[str, tuple[int, ...]]:
    """`{layer: rank of each block, 0 for an inactive one}` of an adapter; empty if there is none."""
    if not path.exists():
        return {}
    layers = read_selective(path.parent).layers
    return {name: entry.ranks for name, entry in layers.items()}


def _block_map(blocks: Mapping[str, Sequence[int]]) -> Picture:
    ranks = [rank for layer in blocks.values() for rank in layer]
    active, total = len([rank for rank in ranks if rank]), len(ranks)
    title = f"{active} of {total} blocks are active ({100 * active / total:.0f} %)"
    caption = "One cell per LoRA block: layers from top to bottom, projections from left to right."
    differ = len({rank for rank in ranks if rank}) > 1
    if differ:
        title += f", with {sum(ranks)} ranks"
        caption += " The number in a cell is the rank of its block."
    return Picture(block_map([blocks], title, numbers=differ), f"{title}, by layer and projection.", caption)


def _shown(value: Any) -> str:
    if isinstance(value, (list, tuple)):
        return ", ".join(map(str, value))
    return "unset" if value is None else str(value).lower() if isinstance(value, bool) else str(value)
