"""The command to run next, for the end of an error message. Imports no torch."""

from __future__ import annotations

import contextlib
import shlex
from collections.abc import Iterator
from pathlib import Path

from slora.errors import CheckpointError, DamagedCheckpointError
from slora.runs import checkpoint_folders
from slora.runs.rundir import CHECKPOINTS, CONFIG, holds_results, run_dir_of, unused


def command(out: Path, start: Path | None = None, lr: float | None = None, into: Path | None = None) -> str:
    """Return the command line that resumes the run in `out`, or restarts it where it has no checkpoint.

    Args:
        start: the checkpoint to resume from; None for the newest of `out`.
        lr: a new learning rate.
        into: another run directory to continue in.
    """
    words = ["slora", "finetune"]
    if start is not None:
        words += ["--resume", str(start)]
    elif checkpoint_folders.checkpoints(out / CHECKPOINTS):
        words += ["--resume", str(out)]
    else:
        words += ["--config", str(out / CONFIG)]
        into = into or (unused(out) if holds_results(out) else out)
    return _line(words, into, lr)


def restart(out: Path, lr: float | None = None) -> str:
    """Return the command that starts the run of `out` from the beginning in another folder."""
    return _line(["slora", "finetune", "--config", str(out / CONFIG)], unused(out), lr)


def _line(words: list[str], into: Path | None, lr: float | None) -> str:
    words += ["--out", str(into)] if into is not None else []
    words += ["--lr", f"{lr:.3g}"] if lr is not None else []
    return shlex.join(words)


def after_fix(out: Path, start: Path | None) -> str:
    """Return what to run once the cause (a full disk, damaged data, a broken base model) is fixed."""
    if start is not None and not checkpoint_folders.checkpoints(out / CHECKPOINTS):
        return f"Then run: {command(out, start, into=out)}"
    return f"Then run: {command(out)}"


def after_divergence(out: Path, start: Path | None, lr: float) -> str:
    """Return what to run after a loss that was not finite: a learning rate below `lr`, or an earlier checkpoint."""
    lr = min(lr / 10, 0.1)
    found = checkpoint_folders.checkpoints(out / CHECKPOINTS)
    if start is None or (found and found[-1].resolve() != start.resolve()):
        return f"Run: {command(out, lr=lr)}"
    elsewhere = out.resolve() != run_dir_of(start).resolve()
    text = f"Run: {command(out, start, lr, into=out if elsewhere else None)}"
    before = checkpoint_folders.before(start)
    if before is not None:
        # Into another folder: this one holds the later checkpoint, which must not be overwritten.
        return f"{text} and, to go back: {command(out, before, lr, into=out if elsewhere else unused(out))}"
    return f"{text} and, to start again: {restart(out, lr)}"


@contextlib.contextmanager
def suggesting_intact(start: Path | None) -> Iterator[None]:
    """Add to the error about a damaged checkpoint `start` how to continue from an intact one."""
    try:
        yield
    except DamagedCheckpointError as error:
        if start is None:
            raise
        raise CheckpointError(f"{error}. {_from_intact(start)}") from error


def _from_intact(damaged: Path) -> str:
    out = run_dir_of(damaged)
    intact = checkpoint_folders.newest_intact(damaged.parent)
    if intact is None or intact == damaged:
        return f"No other checkpoint of this run is intact; start again: {restart(out)}"
    text = f"The newest intact one is {intact.name}; continue from it"
    last = checkpoint_folders.checkpoints(damaged.parent)[-1]
    if last == intact:
        return f"{text}: {command(out)}"
    text += f" in another folder: {command(out, intact, into=unused(out))}"
    if last == damaged:
        text += f" or here: {shlex.join(['mv', str(damaged), f'{damaged}.damaged'])} && {command(out, out)}"
    return text
