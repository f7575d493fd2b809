"""The files of a run directory. Nothing here imports torch.

config.yaml       the settings
classes.json      names of the classes, in the order of the model's outputs
prompts.json      with a zero-shot head, the names and templates that its class embeddings are made of
metrics.jsonl     the records of the run, one JSON object a line
tensorboard/      the same records for TensorBoard
checkpoints/      step-<step>: what a run needs to resume
adapter/          the result of selective and lora (`slora.save_adapter`)
model/            the result of full and linear: `model.safetensors`
result.json       accuracy, time, FLOPs, active blocks; written last
evaluation.json   written by `slora evaluate`; evaluation-step-<step>.json for a checkpoint
sweep.json        written by `slora merge --sweep`, with sweep.png; sweep-step-<step> for a checkpoint
report.html       written by `slora report`
"""

from __future__ import annotations

import shlex
from pathlib import Path

from slora.errors import ConfigError
from slora.runs import checkpoint_folders
from slora.runs.settings import TrainSettings

CONFIG, CLASSES, PROMPTS = "config.yaml", "classes.json", "prompts.json"
RESULT, EVALUATION = "result.json", "evaluation.json"
ADAPTER, MODEL, CHECKPOINTS = "adapter", "model", "checkpoints"
TENSORBOARD = "tensorboard"
SWEEP = "sweep.json"
WEIGHTS = "model.safetensors"


def read_settings(run_dir: Path) -> TrainSettings:
    """Return the settings of a run.

    Raises:
        ConfigError: the folder holds no run, or its `config.yaml` is damaged.
    """
    if not (run_dir / CONFIG).exists():
        found = f"holds no {CONFIG}" if run_dir.exists() else "does not exist"
        raise ConfigError(f"{run_dir} {found}; give the folder of a run made by slora finetune")
    return TrainSettings.from_yaml(run_dir / CONFIG)


def run_dir_of(checkpoint: Path) -> Path:
    """Return the run directory of a checkpoint."""
    return checkpoint.parent.parent


def holds_results(out: Path) -> bool:
    """Whether `out` holds a result or a checkpoint, which another run must not overwrite."""
    result = any((out / name).exists() for name in (RESULT, ADAPTER, MODEL))
    return result or bool(checkpoint_folders.checkpoints(out / CHECKPOINTS))


def refuse_other_run(out: Path, start: Path | None) -> None:
    """Refuse to write into `out` where it holds another run than that of the checkpoint `start`.

    A run without a checkpoint or a result may be restarted there.

    Raises:
        ConfigError: `out` holds results that would be overwritten.
    """
    if holds_results(out) and (start is None or out.resolve() != run_dir_of(start).resolve()):
        resumable = start is None and checkpoint_folders.checkpoints(out / CHECKPOINTS)
        instead = f"resume it with --resume {shlex.quote(str(out))}, or " if resumable else ""
        raise ConfigError(f"{out} already holds a run; {instead}choose another --out")


def remove_stale(out: Path) -> None:
    """Remove what an earlier run in `out` left and a restarted one does not replace."""
    for path in (*(out / TENSORBOARD).glob("events.out.tfevents.*"), *out.glob("evaluation-step-*.json")):
        path.unlink(missing_ok=True)


def unused(folder: Path) -> Path:
    """Return `folder` or, where it exists, `folder-2`, `folder-3`, ...: the first that does not."""
    found, number = folder, 2
    while found.exists():
        found, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return found
