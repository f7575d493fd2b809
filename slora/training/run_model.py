"""The model of a run: built by name, then filled with the result of the run or with a checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn

from slora.adapters.save_load import load_adapter, selective
from slora.adapters.tensors import read_safetensors
from slora.clip import Clip, PromptedClip
from slora.clip.prompts import Prompts, names_of_file, refuse_ids, templates
from slora.clip.towers import require_towers
from slora.errors import CheckpointError, DamagedCheckpointError
from slora.layers import adapted_layers
from slora.models.input_spec import InputSpec
from slora.module_tree.wrappers import unwrapped
from slora.runs import read_results, rundir
from slora.runs.checkpoint_folders import chosen
from slora.runs.rundir import ADAPTER, MODEL, read_settings
from slora.runs.settings import TrainSettings
from slora.sources import models
from slora.sources.data import Source, open_data
from slora.sources.data_names import check_name
from slora.sources.imagenet import prompt_names
from slora.training.checkpoint_load import Checkpoint, check_values
from slora.training.fingerprint import fingerprint
from slora.training.trainable import prepare


def build(settings: TrainSettings, run_dir: Path | None = None) -> tuple[nn.Module, InputSpec, Source]:
    """Return the plain model of a run, the images it takes, and its data set.

    With a zero-shot head the model is a `PromptedClip`.

    Args:
        run_dir: the directory of the run, if it has begun: prompts are those that it recorded, whatever their files
            hold now.

    Raises:
        ConfigError, DataError, CheckpointError: see `open_data`, `models.build` and `slora.clip.prompts`.
    """
    models.check_name(settings.model, settings.pretrained)
    source = open_data(check_name(settings.data), settings.data_root, settings.download)
    source = source.few_shot(settings.shots, settings.seed)
    if settings.head == "zero-shot":
        return *_prompted(settings, source, run_dir), source
    return *rebuild(settings, len(source.classes)), source


def _prompted(settings: TrainSettings, source: Source, run_dir: Path | None) -> models.Built:
    recorded = None if run_dir is None else read_results.prompts(run_dir, len(source.classes))
    if recorded is not None:
        clip, prompts = _clip(settings), Prompts(*recorded)
    else:
        # Files are read before the weights: that is where mistakes are.
        names = _names(settings, source)
        given = settings.templates and templates(settings.templates)
        clip = _clip(settings)
        prompts = Prompts(names, given or templates(None, clip.templates))
    require_towers(clip.model)
    return models.Built(PromptedClip(clip, prompts, settings.tower != "image", settings.contrastive), clip.input)


def _names(settings: TrainSettings, source: Source) -> tuple[str, ...]:
    if settings.class_names is not None:
        return names_of_file(Path(settings.class_names).expanduser(), source.classes, source.name)
    names = prompt_names(source.name, source.classes)
    refuse_ids(names, source.name)
    return names


def _clip(settings: TrainSettings) -> Clip:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return models.build_clip(settings.model or "", settings.pretrained, settings.img_size, settings.model_args)


def rebuild(settings: TrainSettings, classes: int) -> models.Built:
    """Return the plain model of a run and its input format; the initial weights are the same at every call.

    With a zero-shot head that is the CLIP without prompts.
    """
    if settings.head == "zero-shot":
        clip = _clip(settings)
        return models.Built(clip.model, clip.input)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return models.build(settings.model or "", classes, settings.pretrained, settings.img_size, settings.model_args)


def rebuild_for(run_dir: Path, settings: TrainSettings) -> nn.Module:
    """Return the plain model of the run in `run_dir`; its data set is opened only if the run saved no labels.

    Raises:
        ConfigError, DataError, CheckpointError: see `build`.
    """
    labels = read_results.labels(run_dir)
    if settings.head == "zero-shot":
        return rebuild(settings, 0).model
    if labels is None:
        return build(settings)[0]
    return rebuild(settings, len(labels)).model


def load_result(model: nn.Module, settings: TrainSettings, run_dir: Path, folder: Path | None = None) -> nn.Module:
    """Load the result of a run into its plain model, in place, and return it.

    Args:
        settings: the run's, from `rundir.read_settings`.
        folder: one of its checkpoints, see `chosen`; None for the result of a finished run.

    Raises:
        CheckpointError: the run is not finished, or its files are damaged or of another model.
    """
    if folder is not None:
        prepare(model, settings=settings)
        identity = fingerprint(model)
        layers = [layer for _, layer in adapted_layers(model)] if settings.unit == "ranks" else []
        for layer in layers:
            layer.add_rank_gate()
        Checkpoint(folder, model, settings, identity).restore()
        for layer in layers:
            if layer.rank_gate is not None:
                gates = layer.rank_gate.detach()
                layer.fold_rank_gate()
                layer.keep_ranks([block.nonzero().flatten().tolist() for block in gates])
        return model
    if settings.method in ("selective", "lora"):
        if not (run_dir / ADAPTER).is_dir():
            raise read_results.unfinished(run_dir / ADAPTER, run_dir)
        return load_adapter(model, run_dir / ADAPTER)
    path = run_dir / MODEL / rundir.WEIGHTS
    if not path.exists():
        raise read_results.unfinished(path, run_dir)
    found = read_safetensors(path, "use another checkpoint", DamagedCheckpointError)
    state = unwrapped(model).state_dict()
    # Of tied tensors the file holds the first.
    loaded = {_storage(state[name]) for name in found if name in state}
    expected = {name: value for name, value in state.items() if name in found or _storage(value) not in loaded}
    try:
        check_values("tensor", found, expected)
    except ValueError as error:
        raise CheckpointError(f"{path} does not fit this {type(model).__name__} or is damaged: {error}") from error
    with torch.no_grad():
        for name, value in found.items():
            state[name].copy_(value)
    return model


def _storage(value: torch.Tensor) -> tuple[object, ...]:
    return value.data_ptr(), value.shape, value.stride(), value.dtype


def blocks_of(run_dir: Path, which: str) -> tuple[str, dict[str, Any]]:
    """Return the name of a checkpoint of a run, and its blocks as `selective.json` would list them.

    Raises:
        ConfigError: the folder holds no run, or its method has no blocks.
        CheckpointError: see `load_result` and `chosen`.
    """
    settings = read_settings(run_dir)
    if settings.method not in ("selective", "lora"):
        raise read_results.without_blocks(run_dir, settings.method, "to show")
    folder = chosen(run_dir, which)
    model = load_result(rebuild_for(run_dir, settings), settings, run_dir, folder)
    return folder.name, selective(model)
