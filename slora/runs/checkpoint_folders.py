"""The checkpoint folders of a run: which there are, which one is meant, and what a run that goes on from one must keep.

What stands in them is written and read by `checkpoint.py`. Nothing here imports torch.
"""

from __future__ import annotations

import os
import shlex
from pathlib import Path
from typing import Any

from slora.errors import CheckpointError, ConfigError, DamagedCheckpointError
from slora.runs.checkpoint_state import STATE, TENSORS, State, check_digest, is_count, read_state, step_of
from slora.runs.settings import TrainSettings, shown

# What a resumed run may not change: the model, the meaning of its tensors, or which images form which step.
FIXED = (
    "model", "pretrained", "img_size", "model_args", "data", "augment", "method", "r", "lora_alpha", "target_modules",
    "exclude_modules", "modules_to_save", "use_rslora", "blocks", "threshold", "inactive", "base_dtype", "gate_rule",
    "optimizer", "budget", "budget_unit", "ranking", "drift_price", "depth_price", "selection_warmup", "settling",
    "batch_size", "gradient_accumulation", "seed",
)  # fmt: skip


def checkpoints(folder: str | os.PathLike[str]) -> list[Path]:
    """Return the checkpoints in a `checkpoints/` folder, oldest first."""
    found = [path for path in Path(folder).glob("step-*") if step_of(path) >= 0]
    return sorted(found, key=step_of)


def refuse_newer(folder: Path, start: str | os.PathLike[str] | None) -> None:
    """Refuse to write into a `checkpoints/` folder that holds checkpoints after `start` (any, where it is None).

    Raises:
        ConfigError: there is one; nothing is to be overwritten, and two runs in one folder are none.
    """
    found = checkpoints(folder)
    if found and (start is None or step_of(found[-1]) > step_of(Path(start))):
        text = f"{folder} holds {found[-1].name} already; resume from that, or choose another run directory"
        if start is not None:
            moved = shlex.join(["mv", str(found[-1]), f"{found[-1]}.damaged"])
            text += f" to go on from {Path(start).name}. Where {found[-1].name} is damaged, take it away first: {moved}"
        raise ConfigError(text)


def check_settings(folder: Path, settings: TrainSettings, state: State | None = None) -> None:
    """Check that a run may go on from a checkpoint with `settings`; early, before a model is built.

    Raises:
        CheckpointError: a setting differs that a run has to keep, or the checkpoint is unreadable.
    """
    saved = (read_state(folder) if state is None else state).settings
    present = settings.to_dict()
    for name in FIXED:
        before, now = saved.get(name), present[name]
        if before != now:
            raise CheckpointError(
                f"{folder} was written with {name}={shown(before)}, this run has {now!r}; resume with the former, "
                f"or start a new run"
            )


def newest(run_dir: str | os.PathLike[str]) -> Path:
    """Return the newest checkpoint of a run directory, or `run_dir` itself where it is a checkpoint.

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
    """Return, of a checkpoint from before the choice of blocks was made, that it is; else the empty string."""
    state = read_state(folder)
    if state.selection is None:
        return ""
    last: Any = state.selection.get("last")
    if not is_count(last):
        raise DamagedCheckpointError(
            f"{folder / STATE} is damaged: 'last' of 'selection' is none; use another checkpoint"
        )
    if state.step >= last:
        return ""
    return f"the choice of blocks is not made yet in {folder.name}: it is complete at step {last} of {state.steps}"


def refuse_finished(start: Path, settings: TrainSettings) -> None:
    """Refuse to go on from the last checkpoint of a run that has taken all of its steps, unless it is to take more.

    Raises:
        ConfigError: nothing is left to train, so other settings would only be written down.
    """
    state = read_state(start)
    longer = any(state.settings.get(name) != getattr(settings, name) for name in ("epochs", "max_steps"))
    if state.step == state.steps and not longer:
        raise ConfigError(
            f"{start.parent.parent} is finished: it has taken all of its {state.steps} steps; give a larger "
            f"--max-steps or --epochs to go on with it, or start a new run with --config"
        )


def newest_intact(folder: Path) -> Path | None:
    """Return the newest checkpoint in a `checkpoints/` folder whose files are what was written, or None."""
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
    """Return the checkpoint of a run, finished or not, that `which` means.

    Args:
        which: "last" for the newest, "best" for the most accurate on the evaluation data, or the number of a step.

    Raises:
        CheckpointError: the run has no such checkpoint; those that it has are listed.
        ConfigError: `which` is none of these.
    """
    last = newest(run_dir)
    if which == "last":
        return last
    found = {step_of(path): path for path in checkpoints(run_dir / "checkpoints")}
    there = f"there are {', '.join(map(str, found))}"
    if which == "best":
        # The newest checkpoint knows of every evaluation before it.
        step = read_state(last).result["best_step"]
        if step is None:
            raise CheckpointError(f"{run_dir} was not evaluated yet, so that no checkpoint is its best; {there}")
        if step not in found:
            raise CheckpointError(
                f"{run_dir} was most accurate at step {step}, of which it keeps no checkpoint; {there}. A run with "
                f"save_every other than 0 keeps its best"
            )
        return found[step]
    if not which.isdecimal():
        raise ConfigError(f"checkpoint={which!r} is neither best nor last nor the number of a step; {there}")
    if int(which) not in found:
        raise CheckpointError(f"{run_dir} has no checkpoint of step {int(which)}; {there}")
    return found[int(which)]
