"""The `finetune` command: fills a run directory."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_model
from torch import nn

from slora.adapters.save_load import save_adapter
from slora.clip import PromptedClip
from slora.errors import NonFiniteLossError, WriteError
from slora.io.atomic import write_atomically, write_json, write_text
from slora.layers import adapted_layers
from slora.models.parameter_groups import trainable_parameters
from slora.module_tree.wrappers import unwrapped
from slora.runs import rundir
from slora.runs.checkpoint_folders import refuse_newer
from slora.runs.lock import locked
from slora.runs.next_command import after_divergence, after_fix, suggesting_intact
from slora.runs.request import read_request
from slora.runs.rundir import ADAPTER, CONFIG, EVALUATION, MODEL, RESULT
from slora.runs.settings import TrainSettings
from slora.selection.allocation import checked_budget
from slora.sources import models
from slora.sources.data import Source
from slora.training.entry import train
from slora.training.head_first import STEPS, trained_heads
from slora.training.process import meet, of_first
from slora.training.replay_images import replay_terms
from slora.training.result import TrainResult
from slora.training.retain_images import retained_images
from slora.training.run_model import build
from slora.training.schedule import check_images
from slora.training.trainable import prepare

if TYPE_CHECKING:
    from rich.console import Console


def finetune(
    overrides: dict[str, Any],
    config: Path | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    console: Console | None = None,
) -> tuple[Path, TrainResult]:
    """Fine-tune a model on a data set, both by name; return the run directory and the result.

    Started in several processes by torchrun or `accelerate launch`, all of them train and the first one writes.

    Args:
        overrides: settings that replace those of `config`, or of the resumed run.
        config: YAML file of settings.
        out: the run directory; by default `runs/<model>-<data>-<method>`, with a number if that exists.
        resume: a run directory, or one of its checkpoints.

    Raises:
        ConfigError: a setting, the model or the data set is unknown, or `out` holds another run. A run that left
            neither a checkpoint nor a result is restarted.
        NonFiniteLossError, WriteError: see `train`; the message ends with the command to run next.
        DataError, CheckpointError, TargetError: see `train`, `open_data` and `models.build`.
        Interrupted: Ctrl-C; a checkpoint was written.
    """
    request = read_request(overrides, config, out, resume)
    # Nothing has been written so far, so all processes have seen the same folders.
    processes = meet(request.settings)
    settings, out, start = of_first(request)
    with processes.local_main_process_first():
        # So that downloads happen once per machine.
        model, spec, source = build(settings, None if start is None else rundir.run_dir_of(start))
        retain, replay = retained_images(settings, spec, source), replay_terms(settings, spec)
    torch.manual_seed(settings.seed)
    prepare(model, settings=settings)
    # Before anything is written: a refused run must not leave a folder.
    if settings.budget is not None:
        checked_budget(settings.budget, settings.unit, dict(adapted_layers(model)))
    check_images(settings, len(source.training), processes.num_processes)
    if settings.head_first is None:
        settings = settings.replace(head_first=_head_first(model, settings, len(source.classes)))
    with contextlib.ExitStack() as stack:
        if processes.is_main_process:
            stack.enter_context(_prepared_dir(out, start, settings, source, model))

        def accepted() -> None:
            # Only now: a refused checkpoint must not change the settings of its run.
            if start is not None and processes.is_main_process:
                _describe(out, start, settings, source, model)

        try:
            with suggesting_intact(start):
                result = train(
                    model,
                    source.data(spec, settings.augment, training=True),
                    source.data(spec, training=False),
                    settings,
                    run_dir=out,
                    console=console,
                    resume=start,
                    retain=retain,
                    terms=replay,
                    accepted=accepted,
                )
            if processes.is_main_process:
                save_result(model, source, settings, out, result)
        except NonFiniteLossError as error:
            lower = after_divergence(out, start, settings.lr)
            then = lower if error.diverged else after_fix(out, start)
            raise NonFiniteLossError(f"{error} {then}", error.diverged) from error
        except WriteError as error:
            raise WriteError(f"{error} {after_fix(out, start)}") from error
        processes.wait_for_everyone()
    return out, result


@contextlib.contextmanager
def _prepared_dir(
    out: Path, start: Path | None, settings: TrainSettings, source: Source, model: nn.Module
) -> Iterator[None]:
    """Lock the run directory and, for a new run, write the files that describe it."""
    with locked(out):
        # Again: another run may have written here while the model was built.
        rundir.refuse_other_run(out, start)
        refuse_newer(out / rundir.CHECKPOINTS, start)
        if start is None:
            _describe(out, start, settings, source, model)
        yield


def _describe(out: Path, start: Path | None, settings: TrainSettings, source: Source, model: nn.Module) -> None:
    write_text(out / CONFIG, _yaml(settings))
    write_json(out / rundir.CLASSES, list(source.classes))
    if isinstance(model, PromptedClip):
        write_json(out / rundir.PROMPTS, model.prompts._asdict())
    else:
        (out / rundir.PROMPTS).unlink(missing_ok=True)
    if start is None or out.resolve() != rundir.run_dir_of(start).resolve():
        rundir.remove_stale(out)


def _head_first(model: nn.Module, settings: TrainSettings, classes: int) -> int:
    """How many steps to train the head alone, if the user does not say: `STEPS` for a new head, else 0."""
    assert settings.model is not None
    if settings.head == "zero-shot":
        return 0
    possible = settings.method != "linear" and len(trained_heads(model)) == 1
    return STEPS if possible and models.new_head(settings.model, settings.pretrained, classes) else 0


def save_result(model: nn.Module, source: Source, settings: TrainSettings, out: Path, result: TrainResult) -> None:
    """Write the adapter or the model, then `result.json`, each atomically.

    Raises:
        WriteError: the disk is full or the folder cannot be written.
    """
    # An evaluation of an earlier result.
    (out / EVALUATION).unlink(missing_ok=True)
    if settings.method in ("selective", "lora"):
        save_adapter(model, out / ADAPTER)
    else:
        write_atomically(out / MODEL / rundir.WEIGHTS, lambda path: save_model(unwrapped(model), str(path)))
    values: dict[str, Any] = {
        "accuracy": result.accuracy,
        "best_accuracy": result.best_accuracy,
        "best_step": result.best_step,
        "steps": result.steps,
        "seconds": result.seconds,
        "flops": result.flops,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": trainable_parameters(model),
        "classes": list(source.classes),
        "damaged_images": source.damage.found,
    }
    if any(True for _ in adapted_layers(model)):
        values["active_blocks"] = {name: list(layer.activity().active) for name, layer in adapted_layers(model)}
        values["blocks"] = {name: layer.blocks for name, layer in adapted_layers(model)}
    write_json(out / RESULT, values)


def _yaml(settings: TrainSettings) -> str:
    import yaml

    text: str = yaml.safe_dump(settings.to_dict(), sort_keys=False, allow_unicode=True)
    return text
