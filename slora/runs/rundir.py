"""The run directory: what stands in it, who writes into it, and how to go on with a run that is not finished.

config.yaml       the settings
classes.json      names of the classes, in the order of the model's outputs
metrics.jsonl     the records of the run, one JSON object a line
tensorboard/      the same for TensorBoard
checkpoints/      step-<step>: what a run needs to go on
adapter/          the result of selective and lora (`slora.save_adapter`)
model/            the result of full and linear: `model.safetensors`
result.json       accuracy, time, FLOPs, active blocks; written last
evaluation.json   written by slora.evaluation; evaluation-step-<step>.json for a checkpoint
report.html       written by slora.report

Nothing here imports torch.
"""

from __future__ import annotations

import contextlib
import os
import shlex
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path
from typing import Any

from slora.adapters.files import SELECTIVE
from slora.errors import CheckpointError, ConfigError, DamagedCheckpointError
from slora.io.atomic import cannot_write
from slora.io.bounded import absence, read_json
from slora.runs import checkpoint_folders
from slora.runs.settings import TrainSettings

CONFIG, CLASSES, RESULT, EVALUATION = "config.yaml", "classes.json", "result.json", "evaluation.json"
ADAPTER, MODEL, CHECKPOINTS = "adapter", "model", "checkpoints"
TENSORBOARD = "tensorboard"
WEIGHTS = "model.safetensors"

# Which folders this thread has claimed, and the descriptors that hold the locks of this process.
_ours: ContextVar[frozenset[tuple[int, int, int]]] = ContextVar("claimed", default=frozenset())
_open: set[int] = set()


def read_settings(run_dir: Path) -> TrainSettings:
    """Return the settings of a run.

    Raises:
        ConfigError: the folder holds no run, or its `config.yaml` is damaged.
    """
    if not (run_dir / CONFIG).exists():
        raise ConfigError(f"{run_dir} holds no {CONFIG}; give the folder of a run made by slora finetune")
    return TrainSettings.from_yaml(run_dir / CONFIG)


def labels(run_dir: Path) -> tuple[str, ...] | None:
    """Return the names of the classes that a run learns, or None where it kept none.

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
        raise CheckpointError(f"{run_dir / RESULT} is damaged: it says no accuracy, steps and seconds")
    return values


def start_of(resume: Path) -> Path:
    """Return the checkpoint that `--resume` asks for: a checkpoint itself, or the newest of a run directory.

    Raises:
        CheckpointError: there is none; says how to start a run over that stopped before its first.
    """
    if not resume.is_dir():
        why = "is not a folder" if resume.exists() else absence(resume)
        raise CheckpointError(
            f"{resume} holds no checkpoint: it {why}; give the folder of a run made by slora finetune"
        )
    if (resume / CONFIG).exists() and not checkpoint_folders.checkpoints(resume / CHECKPOINTS):
        raise CheckpointError(f"{resume} holds no checkpoint; start its run over with: {command(resume)}")
    return checkpoint_folders.newest(resume)


def home_of(start: Path) -> Path:
    """Return the run directory of a checkpoint."""
    return start.parent.parent


def refuse_other_run(out: Path, start: Path | None) -> None:
    """Refuse to write into `out` where it holds a run that is not to be gone on with from `start`.

    A run that left neither a checkpoint nor a result may be started over.

    Raises:
        ConfigError: `out` holds a run with something to lose.
    """
    if _lasts(out) and (start is None or out.resolve() != home_of(start).resolve()):
        there = start is None and checkpoint_folders.checkpoints(out / CHECKPOINTS)
        instead = f"go on with it by --resume {shlex.quote(str(out))}, or " if there else ""
        raise ConfigError(f"{out} holds a run already; {instead}choose another --out")


def _lasts(out: Path) -> bool:
    """Whether `out` holds a run with something to lose."""
    result = any((out / name).exists() for name in (RESULT, ADAPTER, MODEL))
    return result or bool(checkpoint_folders.checkpoints(out / CHECKPOINTS))


@contextlib.contextmanager
def or_around(start: Path | None) -> Iterator[None]:
    """Where the checkpoint `start` turns out to be damaged inside, say how to go on without it."""
    try:
        yield
    except DamagedCheckpointError as error:
        if start is None:
            raise
        raise CheckpointError(f"{error}. {_way_around(start)}") from error


def _way_around(damaged: Path) -> str:
    out = home_of(damaged)
    intact = checkpoint_folders.newest_intact(damaged.parent)
    if intact is None or intact == damaged:
        return f"No other one of this run is intact; start anew: {start_anew(out)}"
    text = f"The newest that is intact is {intact.name}; go on from it in another folder: "
    text += command(out, intact, into=free(out))
    last = checkpoint_folders.checkpoints(damaged.parent)[-1]
    if last == intact:
        return f"The newest that is intact is {intact.name}; go on from it: {command(out)}"
    if last == damaged:
        text += f" or here: {shlex.join(['mv', str(damaged), f'{damaged}.damaged'])} && {command(out, out)}"
    return text


def refuse_running(out: Path) -> None:
    """Refuse a folder that another run is writing into; early, and without a claim of one's own.

    Raises:
        ConfigError: another run is.
    """
    try:
        descriptor = os.open(out, os.O_RDONLY)
    except OSError:
        return
    try:
        # Processes of one run that look at the same time do not keep each other out.
        _lock(descriptor, out, shared=True)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Keep other runs, of this process or of others, from writing into `out` while inside; a kill ends that, too.

    Inside, `out` may be claimed again. What has to hold of the folder is to be checked inside: before, another run may
    come and go.

    Raises:
        ConfigError: another run is writing into it, or a folder in it is a link to another place.
        WriteError: the folder cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise cannot_write(out / CONFIG, error) from error
    status = os.fstat(descriptor)
    # Neither another thread nor a child has the context of this one, or its process.
    key = os.getpid(), status.st_dev, status.st_ino
    if key in _ours.get():
        os.close(descriptor)
        yield
        return
    _open.add(descriptor)
    token = _ours.set(_ours.get() | {key})
    try:
        _lock(descriptor, out)
        _refuse_links(out)
        yield
    finally:
        _ours.reset(token)
        if descriptor in _open:
            _open.discard(descriptor)
            os.close(descriptor)


def _refuse_links(out: Path) -> None:
    """Refuse folders through which a run would write, and remove old checkpoints, in another place."""
    for path in (out / name for name in (CHECKPOINTS, TENSORBOARD, ADAPTER, MODEL)):
        if path.is_symlink():
            raise ConfigError(
                f"{path} is a link to {os.readlink(path)}, and a run writes into its own folder alone; remove the "
                f"link, or make the whole run directory one"
            )


def _close_in_child() -> None:
    # A lock lasts until nobody has it open: a process that reads images would hold it beyond the death of the run.
    while _open:
        os.close(_open.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)


def _lock(descriptor: int, out: Path, shared: bool = False) -> None:
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"another run is writing into {out}; wait for its end, or choose another run directory"
        ) from error
    except OSError:
        # A file system without locks.
        return


def remove_traces(out: Path) -> None:
    """Remove what a run that is started over left and the new one does not replace."""
    for path in (*(out / TENSORBOARD).glob("events.out.tfevents.*"), *out.glob("evaluation-step-*.json")):
        path.unlink(missing_ok=True)


def command(out: Path, start: Path | None = None, lr: float | None = None, into: Path | None = None) -> str:
    """Return the command line that goes on with the run in `out`: from a checkpoint, or over from its settings.

    Args:
        start: the checkpoint to go on from; None for the newest of `out`.
        lr: a learning rate other than before.
        into: another run directory to go on in.
    """
    words = ["slora", "finetune"]
    if start is not None:
        words += ["--resume", str(start)]
    elif checkpoint_folders.checkpoints(out / CHECKPOINTS):
        words += ["--resume", str(out)]
    else:
        words += ["--config", str(out / CONFIG)]
        into = into or (free(out) if _lasts(out) else out)
    words += ["--out", str(into)] if into is not None else []
    words += ["--lr", f"{lr:.3g}"] if lr is not None else []
    return shlex.join(words)


def after_mending(out: Path, start: Path | None) -> str:
    """Return what to run once there is room on the disk again, or the data or the base model is in order."""
    if start is not None and not checkpoint_folders.checkpoints(out / CHECKPOINTS):
        return f"Then run: {command(out, start, into=out)}"
    return f"Then run: {command(out)}"


def after_divergence(out: Path, start: Path | None, lr: float) -> str:
    """Return what to run after a loss that was not finite, at a learning rate below `lr`."""
    lr = min(lr / 10, 0.1)
    found = checkpoint_folders.checkpoints(out / CHECKPOINTS)
    if start is None or (found and found[-1].resolve() != start.resolve()):
        return f"Run: {command(out, lr=lr)}"
    elsewhere = out.resolve() != home_of(start).resolve()
    text = f"Run: {command(out, start, lr, into=out if elsewhere else None)}"
    before = checkpoint_folders.before(start)
    if before is not None:
        # Into another folder: this one holds the later checkpoint, which is not to be overwritten.
        return f"{text} and, to go back: {command(out, before, lr, into=out if elsewhere else free(out))}"
    return f"{text} and, to start anew: {start_anew(out, lr)}"


def start_anew(out: Path, lr: float | None = None) -> str:
    """Return the command that starts the run of `out` from the beginning in another folder."""
    words = ["slora", "finetune", "--config", str(out / CONFIG), "--out", str(free(out))]
    words += ["--lr", f"{lr:.3g}"] if lr is not None else []
    return shlex.join(words)


def free(folder: Path) -> Path:
    """Return `folder`, or where that exists the same with the first number from 2 that is free."""
    found, number = folder, 2
    while found.exists():
        found, number = folder.with_name(f"{folder.name}-{number}"), number + 1
    return found


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
            raise without_blocks(folder, method, f"to show or to merge; its result is a plain model already: {path}")
        return path
    home = folder / ADAPTER if (folder / ADAPTER).is_dir() else folder
    if not (home / SELECTIVE).exists():
        raise CheckpointError(
            f"{home / SELECTIVE} {absence(home / SELECTIVE)}; give an adapter directory, or a finished run"
        )
    return home


def without_blocks(run_dir: Path, method: str, what: str) -> ConfigError:
    """Return the error for a run that trained no blocks; `what` ends its sentence."""
    return ConfigError(f"{run_dir} was trained with method={method}, which has no LoRA blocks {what}")


def unfinished(missing: Path, run_dir: Path) -> CheckpointError:
    """Return the error for a run that has not written `missing` yet."""
    # The command stands last, where it is easy to copy.
    there = checkpoint_folders.checkpoints(run_dir / CHECKPOINTS)
    hint = " (--checkpoint last takes what it has learned so far)" if there else ""
    return CheckpointError(f"{missing} does not exist{hint}: the run is not finished; go on with: {command(run_dir)}")
