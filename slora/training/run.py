"""The `finetune` command, which fills a run directory, and the way of its result, or a checkpoint, into a model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import save_model
from torch import nn

from slora.adapters.adapter import load_adapter, save_adapter, selective
from slora.config import check_budget
from slora.errors import CheckpointError, NonFiniteLossError, WriteError
from slora.io.atomic import write_atomically, write_json, write_text
from slora.layers import adapted_layers
from slora.models.parameter_groups import trainable_parameters
from slora.runs import rundir
from slora.runs.request import read_request
from slora.runs.rundir import ADAPTER, CONFIG, EVALUATION, MODEL, RESULT, read_settings
from slora.runs.settings import TrainSettings
from slora.sources import models
from slora.sources.data import InputSpec, Source, open_data
from slora.sources.data_names import check_name
from slora.training import checkpoint
from slora.training.checkpoint import read_tensors
from slora.training.head_first import STEPS, trained_heads
from slora.training.methods import prepare
from slora.training.process import meet, of_first
from slora.training.retained import retained_images
from slora.training.trainer import TrainResult, train

if TYPE_CHECKING:
    from rich.console import Console


def finetune(
    overrides: dict[str, Any],
    config: Path | None = None,
    out: Path | None = None,
    resume: Path | None = None,
    console: Console | None = None,
) -> tuple[Path, TrainResult]:
    """Fine-tune a model by name on a data set by name; return the run directory and the result.

    Started in several processes by torchrun or `accelerate launch`, all compute and the first one writes: see `train`.

    Args:
        overrides: settings that go before those of `config`, or of the resumed run.
        config: YAML file of settings.
        out: the run directory; by default `runs/<model>-<data>-<method>`, numbered where that exists.
        resume: a run directory, or one of its checkpoints.

    Raises:
        ConfigError: a setting, the model or the data set is unknown, or `out` holds another run. A run that left
            neither a checkpoint nor a result is started over.
        NonFiniteLossError, WriteError: see `train`; the message ends with the command to run next.
        DataError, CheckpointError, TargetError: see `train`, `open_data` and `models.build`.
        Interrupted: Ctrl-C; a checkpoint was written.
    """
    request = read_request(overrides, config, out, resume)
    # Nothing was written so far: all processes have seen the same folders.
    processes = meet(request.settings)
    settings, out, start = of_first(request)
    with processes.local_main_process_first():
        # What is downloaded is so once.
        model, spec, source = build(settings)
    torch.manual_seed(settings.seed)
    prepare(model, settings=settings)
    if settings.budget is not None:
        # Before anything is written: a refused run leaves no folder behind.
        blocks = sum(layer.blocks for _, layer in adapted_layers(model))
        check_budget(settings.budget, settings.budget_unit, blocks)
    if settings.head_first is None:
        settings = settings.replace(head_first=_head_first(model, settings, len(source.classes)))
    with contextlib.ExitStack() as stack:
        if processes.is_main_process:
            stack.enter_context(_begun(out, start, settings, source))

        def accepted() -> None:
            # A refused checkpoint leaves the settings of its run as they were.
            if start is not None and processes.is_main_process:
                _describe(out, start, settings, source)

        try:
            with rundir.or_around(start):
                result = train(
                    model,
                    source.data(spec, settings.augment, training=True),
                    source.data(spec, training=False),
                    settings,
                    run_dir=out,
                    console=console,
                    resume=start,
                    retain=retained_images(settings, spec, source),
                    accepted=accepted,
                )
            if processes.is_main_process:
                save_result(model, source, settings, out, result)
        except NonFiniteLossError as error:
            lower = rundir.after_divergence(out, start, settings.lr)
            then = lower if error.diverged else rundir.after_mending(out, start)
            raise NonFiniteLossError(f"{error} {then}", error.diverged) from error
        except WriteError as error:
            raise WriteError(f"{error} {rundir.after_mending(out, start)}") from error
        processes.wait_for_everyone()
    return out, result


@contextlib.contextmanager
def _begun(out: Path, start: Path | None, settings: TrainSettings, source: Source) -> Iterator[None]:
    """Claim the run directory and, for a new run, write what stands in it from the beginning."""
    with rundir.claimed(out):
        # Another run may have come and gone while the model was built.
        rundir.refuse_other_run(out, start)
        checkpoint.refuse_newer(out / rundir.CHECKPOINTS, start)
        if start is None:
            _describe(out, start, settings, source)
        yield


def _describe(out: Path, start: Path | None, settings: TrainSettings, source: Source) -> None:
    write_text(out / CONFIG, _yaml(settings))
    write_json(out / rundir.CLASSES, list(source.classes))
    if start is None or out.resolve() != rundir.home_of(start).resolve():
        rundir.remove_traces(out)


def _head_first(model: nn.Module, settings: TrainSettings, classes: int) -> int:
    """The steps that the head of a prepared model is trained alone for where the user leaves that open."""
    assert settings.model is not None
    alone = settings.method != "linear" and len(trained_heads(model)) == 1
    return STEPS if alone and models.new_head(settings.model, settings.pretrained, classes) else 0


def build(settings: TrainSettings) -> tuple[nn.Module, InputSpec, Source]:
    """Return the plain model of a run, the images it takes, and its data set.

    Raises:
        ConfigError, DataError, CheckpointError: see `open_data` and `models.build`.
    """
    models.check_name(settings.model, settings.pretrained)
    source = open_data(check_name(settings.data), settings.data_root, settings.download)
    return *rebuild(settings, len(source.classes)), source


def rebuild(settings: TrainSettings, classes: int) -> models.Built:
    """Return the plain model of a run with its input; the same weights at every call."""
    assert settings.model is not None
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return models.build(settings.model, classes, settings.pretrained, settings.img_size, settings.model_args)


def rebuild_for(run_dir: Path, settings: TrainSettings) -> nn.Module:
    """Return the plain model of the run in `run_dir`; its data set is opened only where the run kept no labels.

    Raises:
        ConfigError, DataError, CheckpointError: see `build`.
    """
    labels = rundir.labels(run_dir)
    if labels is None:
        return build(settings)[0]
    models.check_name(settings.model, settings.pretrained)
    return rebuild(settings, len(labels)).model


def save_result(model: nn.Module, source: Source, settings: TrainSettings, out: Path, result: TrainResult) -> None:
    """Write the adapter or the model, then `result.json`, each atomically.

    Raises:
        WriteError: the disk is full or the folder cannot be written.
    """
    # What it says is about an earlier result.
    (out / EVALUATION).unlink(missing_ok=True)
    if settings.method in ("selective", "lora"):
        save_adapter(model, out / ADAPTER)
    else:
        write_atomically(out / MODEL / rundir.WEIGHTS, lambda path: save_model(model, str(path)))
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


def load_result(model: nn.Module, settings: TrainSettings, run_dir: Path, folder: Path | None = None) -> nn.Module:
    """Put what a run learned into its plain model, in place, and return it.

    Args:
        settings: of the run, as `rundir.read_settings` gives them.
        folder: one of its checkpoints, see `checkpoint.chosen`; None for the result of a finished run.

    Raises:
        CheckpointError: the run is not finished, or its files are damaged or of another model.
    """
    if folder is not None:
        prepare(model, settings=settings)
        checkpoint.Checkpoint(folder, model, settings, checkpoint.fingerprint(model)).put()
        return model
    if settings.method in ("selective", "lora"):
        if not (run_dir / ADAPTER).is_dir():
            raise rundir.unfinished(run_dir / ADAPTER, run_dir)
        return load_adapter(model, run_dir / ADAPTER)
    path = run_dir / MODEL / rundir.WEIGHTS
    if not path.exists():
        raise rundir.unfinished(path, run_dir)
    found = read_tensors(path)
    state = model.state_dict()
    # Of tensors that are one, the file has the first.
    there = {_place(state[name]) for name in found if name in state}
    expected = {name: value for name, value in state.items() if name in found or _place(value) not in there}
    try:
        checkpoint.check_values("tensor", found, expected)
    except ValueError as error:
        raise CheckpointError(f"{path} does not fit this {type(model).__name__} or is damaged: {error}") from error
    with torch.no_grad():
        for name, value in found.items():
            state[name].copy_(value)
    return model


def _place(value: torch.Tensor) -> tuple[object, ...]:
    return value.data_ptr(), value.shape, value.stride(), value.dtype


def blocks_of(run_dir: Path, which: str) -> tuple[str, dict[str, Any]]:
    """Return the name of a checkpoint of a run, and what `selective.json` would hold of its blocks.

    Raises:
        ConfigError: the folder holds no run, or its method has no blocks.
        CheckpointError: see `load_result` and `checkpoint.chosen`.
    """
    settings = read_settings(run_dir)
    if settings.method not in ("selective", "lora"):
        raise rundir.without_blocks(run_dir, settings.method, "to show")
    folder = checkpoint.chosen(run_dir, which)
    model = load_result(rebuild_for(run_dir, settings), settings, run_dir, folder)
    return folder.name, selective(model)


def _yaml(settings: TrainSettings) -> str:
    import yaml

    text: str = yaml.safe_dump(settings.to_dict(), sort_keys=False, allow_unicode=True)
    return text
