"""What `slora finetune` is asked for, checked as far as that goes without torch, whose import takes seconds."""

from __future__ import annotations

from pathlib import Path
from typing import Any, NamedTuple

from slora.errors import ConfigError
from slora.runs import rundir
from slora.runs.checkpoint_folders import check_settings, refuse_finished, refuse_newer
from slora.runs.settings import TrainSettings
from slora.sources.data_names import check_name, check_retained
from slora.sources.model_names import source_of


class Request(NamedTuple):
    """A run that may begin."""

    settings: TrainSettings
    out: Path
    """The run directory."""
    start: Path | None
    """The checkpoint to go on from."""


def read_request(
    overrides: dict[str, Any], config: Path | None = None, out: Path | None = None, resume: Path | None = None
) -> Request:
    """Return the request that the arguments of `slora.training.run.finetune` make; nothing is written.

    Raises:
        ConfigError: a setting or a name is wrong, or `out` holds another run.
        CheckpointError: there is no checkpoint to resume from, or a setting differs that a resumed run has to keep.
    """
    start = None
    if resume is not None:
        if config is not None:
            raise ConfigError("config and resume were both given; a resumed run takes its own config.yaml")
        start = rundir.start_of(resume)
        home = rundir.home_of(start)
        settings = TrainSettings.from_yaml(home / rundir.CONFIG, **overrides)
        out = home if out is None else out
        with rundir.or_around(start):
            check_settings(start, settings)
            if (home / rundir.RESULT).exists() and out.resolve() == home.resolve():
                refuse_finished(start, settings)
        refuse_newer(out / rundir.CHECKPOINTS, start)
    else:
        settings = TrainSettings.from_yaml(config, **overrides) if config else TrainSettings.from_dict(overrides)
    data = check_name(settings.data)
    check_retained(settings.retain_data)
    source_of(settings.model)
    if out is None:
        out = _free_folder(settings, data)
    rundir.refuse_running(out)
    rundir.refuse_other_run(out, start)
    return Request(settings, out, start)


def _free_folder(settings: TrainSettings, data: str) -> Path:
    model = (settings.model or "").partition("/")[2].replace("/", "_").replace(":", "_")
    label = Path(data.partition(":")[2]).name if ":" in data else data
    return rundir.free(Path("runs") / f"{model}-{label}-{settings.method}")
