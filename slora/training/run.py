"""The `finetune` command, which fills a run directory, and what reads its result: loading and merging."""

from __future__ import annotations

import os
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from slora.adapter import PREFIX, SELECTIVE, WEIGHTS, load_adapter, save_adapter
from slora.errors import BaseModelWarning, CheckpointError, ConfigError, NonFiniteLossError, WriteError
from slora.files import read_json, write_atomically, write_json, write_text
from slora.gate import adapted_layers
from slora.merging import merge_and_unload
from slora.model import trainable_parameters
from slora.training import checkpoint, models, rundir
from slora.training.data import InputSpec, Source, check_name, open_data
from slora.training.head_first import STEPS, trained_heads
from slora.training.methods import prepare
from slora.training.retained import check_retained, retained_images
from slora.training.rundir import ADAPTER, CONFIG, EVALUATION, MODEL, RESULT, read_settings
from slora.training.settings import TrainSettings
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
    processes = os.environ.get("WORLD_SIZE", "1")
    if processes != "1":
        raise ConfigError(
            f"WORLD_SIZE={processes}: slora finetune runs in one process; for several, call slora.training.train in a "
            f"script of your own under accelerate launch"
        )
    start = None
    if resume is not None:
        if config is not None:
            raise ConfigError("config and resume were both given; a resumed run takes its own config.yaml")
        start = rundir.start_of(resume)
        home = rundir.home_of(start)
        settings = TrainSettings.from_yaml(home / CONFIG, **overrides)
        checkpoint.check_settings(start, settings)
        out = home if out is None else out
    else:
        settings = TrainSettings.from_yaml(config, **overrides) if config else TrainSettings.from_dict(overrides)
    models.check_name(settings.model, settings.pretrained)
    data = check_name(settings.data)
    check_retained(settings.retain_data)
    if out is None:
        out = _free_folder(settings, data)
    rundir.refuse_other_run(out, start)
    model, spec, source = build(settings)
    torch.manual_seed(settings.seed)
    prepare(model, settings=settings)
    if settings.head_first is None:
        settings = settings.replace(head_first=_head_first(model, settings, len(source.classes)))
    with rundir.claimed(out):
        write_text(out / CONFIG, _yaml(settings))
        if start is None or out.resolve() != rundir.home_of(start).resolve():
            rundir.remove_traces(out)
        try:
            result = train(
                model,
                source.data(spec, settings.augment, training=True),
                source.data(spec, training=False),
                settings,
                run_dir=out,
                console=console,
                resume=start,
                retain=retained_images(settings, spec, source),
            )
            save_result(model, source, settings, out, result)
        except NonFiniteLossError as error:
            raise NonFiniteLossError(f"{error} {rundir.after_divergence(out, start, settings.lr)}") from error
        except WriteError as error:
            raise WriteError(f"{error} {rundir.after_a_full_disk(out, start)}") from error
    return out, result


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
        return models.build(settings.model, classes, settings.pretrained)


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


def load_result(model: nn.Module, settings: TrainSettings, run_dir: Path) -> nn.Module:
    """Put what a finished run learned into its plain model, in place, and return it.

    Raises:
        CheckpointError: the run is not finished, or its files are damaged or of another model.
    """
    if settings.method in ("selective", "lora"):
        if not (run_dir / ADAPTER).is_dir():
            raise rundir.unfinished(run_dir / ADAPTER, run_dir)
        return load_adapter(model, run_dir / ADAPTER)
    path = run_dir / MODEL / rundir.WEIGHTS
    if not path.exists():
        raise rundir.unfinished(path, run_dir)
    try:
        load_model(model, str(path))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not fit this {type(model).__name__} or is damaged ({str(error).splitlines()[0]})"
        ) from error
    return model


def _free_folder(settings: TrainSettings, data: str) -> Path:
    model = (settings.model or "").partition("/")[2].replace("/", "_").replace(":", "_")
    label = Path(data.partition(":")[2]).name if ":" in data else data
    return rundir.free(Path("runs") / f"{model}-{label}-{settings.method}")


def _yaml(settings: TrainSettings) -> str:
    import yaml

    text: str = yaml.safe_dump(settings.to_dict(), sort_keys=False, allow_unicode=True)
    return text


def merge_adapter(
    folder: Path, out: Path, model_name: str | None, pretrained: bool, classes: int | None, scale: float = 1.0
) -> int:
    """Merge the adapter in `folder` into its model, write `out`, and return the number of blocks merged.

    Args:
        folder: an adapter directory, or a run directory, which knows its model.
        out: safetensors file for the plain state dict.
        model_name: as for `models.build`; None for that of the run.
        pretrained: whether the adapter belongs to pretrained weights; a run knows it.
        classes: outputs of the head; None for those of the head that the adapter holds.
        scale: factor on the update.

    Raises:
        ConfigError: `out` exists, the run has no blocks, or the model or the number of classes is not known.
        CheckpointError: the run is not finished, or the adapter is missing, damaged, or of another model.
        WriteError: the disk is full or the folder cannot be written.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; choose another file, or remove it first")
    if (folder / CONFIG).exists():
        settings = read_settings(folder)
        model_name, pretrained = model_name or settings.model, pretrained or settings.pretrained
    else:
        settings = TrainSettings()
    if model_name is None:
        raise ConfigError(f"{folder} is an adapter without its run; name its model, such as timm/vit_base_patch16_224")
    adapter = rundir.adapter_of(folder)
    models.check_name(model_name, pretrained)
    classes = classes or _classes_in(adapter)
    model = rebuild(settings.replace(model=model_name, pretrained=pretrained), classes)[0]
    try:
        with warnings.catch_warnings():
            # A file of weights that fit nothing is of no use to anyone, so here it is an error.
            warnings.simplefilter("error", BaseModelWarning)
            load_adapter(model, adapter)
    except BaseModelWarning as error:
        raise CheckpointError(f"{error} On the command line --pretrained does that.") from error
    count = sum(len(layer.activity().active) for _, layer in adapted_layers(model))
    merge_and_unload(model, scale)
    write_atomically(out, lambda path: save_model(model, str(path)))
    return count


def _classes_in(adapter: Path) -> int:
    """The outputs of the head that an adapter holds."""
    content = read_json(adapter / SELECTIVE)
    try:
        saved = content["config"]["modules_to_save"] or []
        with safe_open(adapter / WEIGHTS, framework="pt") as file:
            weights = [f"{PREFIX}{name}.weight" for name in saved]
            shapes = [file.get_slice(key).get_shape() for key in weights if key in file.keys()]  # noqa: SIM118
    except (KeyError, TypeError, SafetensorError, OSError) as error:
        raise CheckpointError(f"{adapter} is incomplete or damaged ({error})") from error
    if not shapes:
        raise ConfigError(f"{adapter} holds no classifier head; say how many outputs the model has with --classes")
    return int(shapes[-1][0])
