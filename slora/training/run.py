"""The run directory, and the `finetune` command that fills it.

config.yaml       the settings
metrics.jsonl     the records of the run, one JSON object a line
tensorboard/      the same for TensorBoard
checkpoints/      step-<step>: what a run needs to go on
adapter/          the result of selective and lora (`slora.save_adapter`)
model/            the result of full and linear: `model.safetensors`
result.json       accuracy, time, FLOPs, active blocks; written last
report.html       written by slora.report
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_model, save_model
from torch import nn

from slora.adapter import PREFIX, SELECTIVE, WEIGHTS, load_adapter, save_adapter
from slora.errors import CheckpointError, ConfigError
from slora.files import read_json, write_atomically, write_json, write_text
from slora.gate import adapted_layers
from slora.merging import merge_and_unload
from slora.training import checkpoint, models
from slora.training.data import InputSpec, Source, check_name, open_data
from slora.training.methods import prepare
from slora.training.settings import TrainSettings, read_yaml
from slora.training.trainer import TrainResult, train

if TYPE_CHECKING:
    from rich.console import Console

CONFIG, RESULT = "config.yaml", "result.json"
ADAPTER, MODEL = "adapter", "model"


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
        ConfigError: a setting, the model or the data set is unknown, or `out` holds another run.
        DataError, CheckpointError, NonFiniteLossError, TargetError: see `train`, `open_data` and `models.build`.
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
        start = checkpoint.newest(resume)
        home = start.parent.parent
        settings = TrainSettings.from_yaml(home / CONFIG, **overrides)
        checkpoint.check_settings(start, settings)
        out = home if out is None else out
    else:
        settings = TrainSettings.from_yaml(config, **overrides) if config else TrainSettings.from_dict(overrides)
    models.check_name(settings.model, settings.pretrained)
    data = check_name(settings.data)
    if out is None:
        out = _free_folder(settings, data)
    elif (out / CONFIG).exists() and (start is None or out != start.parent.parent):
        raise ConfigError(f"{out} holds a run already; add --resume {out} to go on with it, or choose another --out")
    model, spec, source = build(settings)
    torch.manual_seed(settings.seed)
    prepare(model, settings=settings)
    write_text(out / CONFIG, _yaml(settings))
    result = train(
        model,
        source.data(spec, settings.augment, training=True),
        source.data(spec, training=False),
        settings,
        run_dir=out,
        console=console,
        resume=start,
    )
    save_result(model, source, settings, out, result)
    return out, result


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
        CheckpointError: the disk is full or the folder cannot be written.
    """
    if settings.method in ("selective", "lora"):
        save_adapter(model, out / ADAPTER)
    else:
        write_atomically(out / MODEL / "model.safetensors", lambda path: save_model(model, str(path)))
    values: dict[str, Any] = {
        "accuracy": result.accuracy,
        "best_accuracy": result.best_accuracy,
        "best_step": result.best_step,
        "steps": result.steps,
        "seconds": result.seconds,
        "flops": result.flops,
        "parameters": sum(p.numel() for p in model.parameters()),
        "trainable": sum(p.numel() for p in model.parameters() if p.requires_grad),
        "classes": list(source.classes),
        "damaged_images": source.damage.found,
    }
    if any(True for _ in adapted_layers(model)):
        values["active_blocks"] = {name: list(layer.activity().active) for name, layer in adapted_layers(model)}
        values["blocks"] = {name: layer.blocks for name, layer in adapted_layers(model)}
    write_json(out / RESULT, values)


def read_settings(run_dir: Path) -> TrainSettings:
    """Return the settings of a run.

    Raises:
        ConfigError: the folder holds no run, or its `config.yaml` is damaged.
    """
    if not (run_dir / CONFIG).exists():
        raise ConfigError(f"{run_dir} holds no {CONFIG}; give the folder of a run made by slora finetune")
    return TrainSettings.from_dict(read_yaml(run_dir / CONFIG))


def load_result(model: nn.Module, settings: TrainSettings, run_dir: Path) -> nn.Module:
    """Put what a finished run learned into its plain model, in place, and return it.

    Raises:
        CheckpointError: the run is not finished, or its files are damaged or of another model.
    """
    if settings.method in ("selective", "lora"):
        if not (run_dir / ADAPTER).is_dir():
            raise _unfinished(run_dir, ADAPTER)
        return load_adapter(model, run_dir / ADAPTER)
    path = run_dir / MODEL / "model.safetensors"
    if not path.exists():
        raise _unfinished(run_dir, f"{MODEL}/model.safetensors")
    try:
        load_model(model, str(path))
    except (SafetensorError, OSError, RuntimeError) as error:
        raise CheckpointError(
            f"{path} does not fit this {type(model).__name__} or is damaged ({str(error).splitlines()[0]})"
        ) from error
    return model


def _unfinished(run_dir: Path, what: str) -> CheckpointError:
    return CheckpointError(
        f"{run_dir / what} does not exist: the run is not finished; go on with slora finetune --resume {run_dir}"
    )


def _free_folder(settings: TrainSettings, data: str) -> Path:
    model = (settings.model or "").partition("/")[2].replace("/", "_").replace(":", "_")
    label = Path(data.partition(":")[2]).name if ":" in data else data
    stem = f"{model}-{label}-{settings.method}"
    folder, number = Path("runs") / stem, 2
    while folder.exists():
        folder, number = Path("runs") / f"{stem}-{number}", number + 1
    return folder


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
        ConfigError: `out` exists, or the model or the number of classes is not known.
        CheckpointError: the adapter is missing, damaged, or of another model; or the disk is full.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; choose another file, or remove it first")
    adapter = folder
    if (folder / CONFIG).exists():
        settings = read_settings(folder)
        if settings.method not in ("selective", "lora"):
            raise ConfigError(f"{folder} was trained with method={settings.method}, which leaves nothing to merge")
        adapter = folder / ADAPTER
        model_name, pretrained = model_name or settings.model, pretrained or settings.pretrained
    else:
        settings = TrainSettings()
    if model_name is None:
        raise ConfigError(f"{folder} is an adapter without its run; name its model, such as timm/vit_base_patch16_224")
    models.check_name(model_name, pretrained)
    if not adapter.is_dir():
        raise CheckpointError(f"{adapter} does not exist; give an adapter directory, or a finished run")
    classes = classes or _classes_in(adapter)
    model = rebuild(settings.replace(model=model_name, pretrained=pretrained), classes)[0]
    load_adapter(model, adapter)
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
