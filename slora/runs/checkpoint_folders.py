"""The checkpoint folders of a run: which exist, which one is chosen, and what a resumed run may not change.

Nothing here imports torch; `slora.training` writes and loads the checkpoints.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from slora.errors import CheckpointError, ConfigError, DamagedCheckpointError
from slora.io.bounded import is_count
from slora.io.plain import shown
from slora.runs.checkpoint_state import STATE, TENSORS, State, check_digest, read_state, step_of
from slora.runs.settings import TrainSettings

# Settings that a resumed run may not change: they determine the model, its tensors, or the images of each step.
FIXED = (
    "model", "pretrained", "img_size", "model_args", "data", "shots", "augment", "head", "tower", "loss", "templates",
    "class_names", "method", "r", "lora_alpha", "target_modules", "exclude_modules", "modules_to_save", "use_rslora",
    "blocks", "threshold", "inactive", "base_dtype", "gate_rule", "optimizer", "strategy", "budget", "budget_unit",
    "ranking", "drift_price", "depth_price", "selection_warmup", "settling", "batch_size", "gradient_accumulation",
    "seed",
)  # fmt: skip


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the checkpoints in a `checkpoints/` folder, oldest first."""
    found = [path for path in Path(folder).glob("step-*") if step_of(path) >= 0]
    return sorted(found, key=step_of)


def refuse_newer(folder: Path, start: str | os.PathLike[str] | None) -> None:
    """Refuse to write into a `checkpoints/` folder that holds checkpoints after `start` (any at all if it is None).

    Raises:
        ConfigError: there is one, which would be overwritten; two runs cannot share a directory.
    """
    found = checkpoints(folder)
    if found and (start is None or step_of(found[-1]) > step_of(Path(start))):
        text = f"{folder} already holds {found[-1].name}; resume from that, or choose another run directory"
        if start is not None:
            moved = shlex.join(["mv", str(found[-1]), f"{found[-1]}.damaged"])
            text += f" to resume from {Path(start).name}. If {found[-1].name} is damaged, rename it first: {moved}"
        raise ConfigError(text)


def check_settings(folder: Path, settings: TrainSettings, state: State | None = None) -> None:
    """Check that a run may resume from a checkpoint with `settings`; early, before a model is built.

    Raises:
        CheckpointError: a setting of `FIXED` differs, or the checkpoint is unreadable.
    """
    saved = (read_state(folder) if state is None else state).settings
    present = settings.to_dict()
    for name in FIXED:
        before, now = saved.get(name), present[name]
        if before != now:
            raise CheckpointError(
                f"{folder} was written with {name}={shown(before)}, this run has {now!r}; resume with the first, "
                f"or start a new run"
            )


def newest(run_dir: str | os.PathLike[str]) -> Path:
    """Return the newest checkpoint of a run directory, or `run_dir` itself if it is a checkpoint.

    Raises:
        CheckpointError: there is none.
    """
    folder = Path(run_dir)
    if (folder / STATE).exists():
        return folder
    found = checkpoints(folder / "checkpoints")
    if not found:
        raise CheckpointError(
            f"{folder} holds no checkpoint; give a run directory that has checkpoints/step-*, or start a new run"
        )
    return found[-1]


def undecided(folder: Path) -> str:
    """Say so if a checkpoint was written before the blocks were chosen; else return the empty string."""
    state = read_state(folder)
    if state.selection is None:
        return ""
    last: Any = state.selection.get("last")
    if not is_count(last):
        raise DamagedCheckpointError(
            f"{folder / STATE} is damaged: 'last' of 'selection' is not a step; use another checkpoint"
        )
    if state.step >= last:
        return ""
    return f"the choice of blocks is not made yet in {folder.name}: it is final at step {last} of {state.steps}"


def refuse_finished(start: Path, settings: TrainSettings) -> None:
    """Refuse to resume from the last checkpoint of a finished run, unless `settings` ask for more steps.

    Raises:
        ConfigError: nothing is left to train.
    """
    state = read_state(start)
    longer = any(state.settings.get(name) != getattr(settings, name) for name in ("epochs", "max_steps"))
    if state.step == state.steps and not longer:
        raise ConfigError(
            f"{start.parent.parent} is finished: it has taken all of its {state.steps} steps; give a larger "
            f"--max-steps or --epochs to continue it, or start a new run with --config"
        )


def newest_intact(folder: Path) -> Path | None:
    """Return the newest checkpoint in a `checkpoints/` folder whose files match their digests, or None."""
    for path in reversed(checkpoints(folder)):
        try:
            read_state(path)
            check_digest(path / TENSORS)
        except CheckpointError:
            continue
        return path
    return None


def before(start: Path) -> Path | None:
    """Return the checkpoint before `start` in the same folder, or None."""
    earlier = [path for path in checkpoints(start.parent) if step_of(path) < step_of(start)]
    return earlier[-1] if earlier else None


def chosen(run_dir: Path, which: str) -> Path:
    """Return the checkpoint `which` of a run, finished or not.

    Args:
        which: "last" for the newest, "best" for the most accurate on the evaluation data, or the number of a step.

    Raises:
        CheckpointError: the run has no such checkpoint; lists those it has.
        ConfigError: `which` is none of these.
    """
    last = newest(run_dir)
    if which == "last":
        return last
    found = {step_of(path): path for path in checkpoints(run_dir / "checkpoints")}
    there = f"there are {', '.join(map(str, found))}"
    if which == "best":
        # The newest checkpoint records the best of all evaluations.
        step = read_state(last).result["best_step"]
        if step is None:
            raise CheckpointError(f"{run_dir} was not evaluated yet, so no checkpoint is the best; {there}")
        if step not in found:
            raise CheckpointError(
                f"{run_dir} was most accurate at step {step}, which has no checkpoint; {there}. With save_every other "
                f"than 0 a run keeps its best"
            )
        return found[step]
    if not which.isdecimal():
        raise ConfigError(f"checkpoint={which!r} is neither best nor last nor a step number; {there}")
    if int(which) not in found:
        raise CheckpointError(f"{run_dir} has no checkpoint of step {int(which)}; {there}")
    return found[int(which)]
