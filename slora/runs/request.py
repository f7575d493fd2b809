"""The arguments of `slora finetune`, checked as far as possible without torch, whose import takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from slora.errors import CheckpointError, ConfigError
from slora.io.bounded import absence
from slora.runs import rundir
from slora.runs.check_retention import check_retained_data
from slora.runs.checkpoint_folders import check_settings, checkpoints, newest, refuse_finished, refuse_newer
from slora.runs.lock import refuse_locked
from slora.runs.next_command import command, suggesting_intact
from slora.runs.settings import TrainSettings
from slora.sources.data_names import check_name, check_replayed, check_retained
from slora.sources.model_names import require_clip, source_of


class Request(NamedTuple):
    """A run that may begin."""

    settings: TrainSettings
    out: Path
    """The run directory."""
    start: Path | None
    """The checkpoint to resume from."""


def read_request(
    overrides: dict[str, Any], config: Path | None = None, out: Path | None = None, resume: Path | None = None
) -> Request:
    """Return the request that the arguments of `slora.training.finetune_run.finetune` make; nothing is written.

    Raises:
        ConfigError: a setting or a name is wrong, or `out` holds another run.
        CheckpointError: there is no checkpoint to resume from, or a setting differs that a resumed run may not change.
    """
    start = None
    if resume is not None:
        if config is not None:
            raise ConfigError("config and resume were both given; a resumed run takes its own config.yaml")
        start = _checkpoint_of(resume)
        run_dir = rundir.run_dir_of(start)
        settings = TrainSettings.from_yaml(run_dir / rundir.CONFIG, **overrides)
        out = run_dir if out is None else out
        with suggesting_intact(start):
            check_settings(start, settings)
            if (run_dir / rundir.RESULT).exists() and out.resolve() == run_dir.resolve():
                refuse_finished(start, settings)
        refuse_newer(out / rundir.CHECKPOINTS, start)
    else:
        settings = TrainSettings.from_yaml(config, **overrides) if config else TrainSettings.from_dict(overrides)
    data = check_name(settings.data)
    check_retained(settings.retain_data)
    check_retained_data(settings.to_dict(), TrainSettings().to_dict())
    if settings.replay_data is not None:
        check_replayed(settings.replay_data)
    source_of(settings.model)
    if settings.head == "zero-shot":
        require_clip(settings.model)
        if not settings.pretrained and ":" not in (settings.model or ""):
            raise ConfigError(
                f"head='zero-shot' reads what pretraining has taught {settings.model}, which would start from random "
                f"weights; add --pretrained, with the tag or file of open_clip weights"
            )
    if out is None:
        out = _default_folder(settings, data)
    refuse_locked(out)
    rundir.refuse_other_run(out, start)
    return Request(settings, out, start)


def _checkpoint_of(resume: Path) -> Path:
    """The checkpoint that `--resume` means: a checkpoint itself, or the newest of a run directory."""
    if not resume.is_dir():
        why = "is not a folder" if resume.exists() else absence(resume)
        raise CheckpointError(
            f"{resume} holds no checkpoint: it {why}; give the folder of a run made by slora finetune"
        )
    if (resume / rundir.CONFIG).exists() and not checkpoints(resume / rundir.CHECKPOINTS):
        raise CheckpointError(f"{resume} holds no checkpoint; restart its run with: {command(resume)}")
    return newest(resume)


def _default_folder(settings: TrainSettings, data: str) -> Path:
    model = (settings.model or "").partition("/")[2].replace("/", "_").replace(":", "_")
    label = Path(data.partition(":")[2]).name if ":" in data else data
    return rundir.unused(Path("runs") / f"{model}-{label}-{settings.method}")
