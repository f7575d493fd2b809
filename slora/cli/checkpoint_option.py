"""The option --checkpoint of evaluate, inspect and merge."""

from __future__ import annotations

from pathlib import Path

CHECKPOINT = (
    "A checkpoint of the run, finished or not: best (on the evaluation data), last, or a step number. "
    "[default: the result of the run]"
)


def check_early(run: Path, which: str | None, source: str | None = None) -> None:
    """Check the arguments as far as possible without torch, whose import takes seconds.

    Args:
        run: run directory.
        which: value of --checkpoint.
        source: name of a data set.
    """
    from slora.runs.checkpoint_folders import chosen
    from slora.runs.rundir import read_settings
    from slora.sources.data_names import check_name

    if source is not None:
        check_name(source)
    if which is not None:
        read_settings(run)
        chosen(run, which)


def note_undecided(run: Path, which: str) -> None:
    """Print a note if the checkpoint `which` was written before the blocks were chosen."""
    from slora.runs.checkpoint_folders import chosen, undecided

    if text := undecided(chosen(run, which)):
        print(f"note: {text}")
