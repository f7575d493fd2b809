"""The results in a run directory, for the commands that read them. Imports no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from slora.adapters.selective_json import SELECTIVE
from slora.errors import CheckpointError, ConfigError
from slora.io.bounded import absence, all_are, read_json
from slora.runs import checkpoint_folders
from slora.runs.next_command import command
from slora.runs.rundir import ADAPTER, CHECKPOINTS, CLASSES, CONFIG, MODEL, PROMPTS, RESULT, WEIGHTS, read_settings


def read_result(run_dir: Path) -> dict[str, Any]:
    """Return `accuracy` (None without evaluation), `steps` and `seconds` of a finished run.

    Raises:
        CheckpointError: `result.json` is damaged.
    """
    content = read_json(run_dir / RESULT)
    names = ("accuracy", "steps", "seconds")
    values = {name: content.get(name) for name in names} if isinstance(content, dict) else {}
    numbers = [value for name, value in values.items() if name != "accuracy" or value is not None]
    if not values or not all(type(value) in (int, float) for value in numbers):
        raise CheckpointError(f"{run_dir / RESULT} is damaged: accuracy, steps or seconds are missing or not numbers")
    return values


def labels(run_dir: Path) -> tuple[str, ...] | None:
    """Return the names of the classes that a run learns, or None where it saved none.

    Raises:
        CheckpointError: their file is damaged.
    """
    for path in (run_dir / CLASSES, run_dir / RESULT):
        if path.exists():
            content = read_json(path)
            names = content.get("classes") if isinstance(content, dict) else content
            if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
                raise CheckpointError(f"{path} holds no list of classes; it may be damaged")
            return tuple(names)
    return None


def prompts(run_dir: Path, classes: int) -> tuple[tuple[str, ...], tuple[str, ...]] | None:
    """Return `(names, templates)` that a run with a zero-shot head recorded, or None where it recorded none.

    Args:
        classes: number of classes of its data set.

    Raises:
        CheckpointError: the file is damaged, or of another number of classes.
    """
    path = run_dir / PROMPTS
    if not path.exists():
        return None
    content = read_json(path)
    values: list[Any] = [content.get(key) for key in ("names", "templates")] if isinstance(content, dict) else []
    if not values or not all(all_are(lambda text: isinstance(text, str), value) and value for value in values):
        raise CheckpointError(f"{path} holds no names and templates; it may be damaged")
    names, templates = tuple(values[0]), tuple(values[1])
    if len(names) != classes:
        raise CheckpointError(
            f"{path} names {len(names)} classes, but the data set has {classes}; give that of the run"
        )
    return names, templates


def adapter_of(folder: Path) -> Path:
    """Return the adapter directory in `folder`: that of a finished run, or `folder` itself.

    Raises:
        ConfigError: the run's method has no blocks; names what it holds instead.
        CheckpointError: the run is not finished, or there is no adapter.
    """
    if (folder / CONFIG).exists():
        method = read_settings(folder).method
        blocks = method in ("selective", "lora")
        path = folder / ADAPTER if blocks else folder / MODEL / WEIGHTS
        if not path.exists():
            raise unfinished(path, folder)
        if not blocks:
            raise without_blocks(folder, method, f"to show or to merge; its result is already a plain model: {path}")
        return path
    adapter = folder / ADAPTER if (folder / ADAPTER).is_dir() else folder
    if not (adapter / SELECTIVE).exists():
        raise CheckpointError(
            f"{adapter / SELECTIVE} {absence(adapter / SELECTIVE)}; give an adapter directory, or a finished run"
        )
    return adapter


def duration(seconds: float) -> str:
    """Return the training time of a run as text."""
    return f"{seconds:.1f} s" if seconds >= 1 else f"{seconds:.2g} s"


def without_blocks(run_dir: Path, method: str, what: str) -> ConfigError:
    """Return the error for a run that trained no blocks; `what` ends its sentence."""
    return ConfigError(f"{run_dir} was trained with method={method}, which has no LoRA blocks {what}")


def unfinished(missing: Path, run_dir: Path) -> CheckpointError:
    """Return the error for a run that has not written `missing` yet."""
    # The command comes last, where it is easy to copy.
    found = checkpoint_folders.checkpoints(run_dir / CHECKPOINTS)
    hint = " (--checkpoint last uses the newest checkpoint)" if found else ""
    return CheckpointError(
        f"{missing} does not exist{hint}: the run is not finished; continue it with: {command(run_dir)}"
    )
