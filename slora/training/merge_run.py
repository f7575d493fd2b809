"""The `merge` command: writes a run or an adapter as one file of plain weights, with metadata."""

from __future__ import annotations

import json
import warnings
from pathlib import Path

from safetensors.torch import save_model
from torch import nn

from slora import __version__
from slora.adapters.save_load import fingerprint, load_adapter
from slora.adapters.selective_json import PREFIX, read_selective
from slora.adapters.tensors import is_finite, read_adapter
from slora.clip import ClipClassifier
from slora.errors import BaseModelWarning, CheckpointError, ConfigError
from slora.io.atomic import write_atomically
from slora.layers import adapted_layers
from slora.merging import merge_and_unload
from slora.runs import read_results, rundir
from slora.runs.checkpoint_folders import chosen
from slora.runs.settings import TrainSettings
from slora.sources.model_names import is_clip
from slora.training.run_model import load_result, rebuild, rebuild_for


def merge_adapter(
    folder: Path,
    out: Path,
    model_name: str | None = None,
    pretrained: bool | str | None = None,
    classes: int | None = None,
    scale: float = 1.0,
    which: str | None = None,
) -> int:
    """Merge the adapter in `folder` into its model, write `out`, and return the number of blocks merged.

    The file has metadata, all of them strings: `safe_open(out, "pt").metadata()` holds

        format              "pt"
        slora_version       that wrote the file
        model               as for `models.build`
        pretrained          "true" or "false": whether training started from pretrained weights; or their tag or file
        img_size            side of the model's images in pixels, if it was set
        model_args          JSON object, if there are any
        active_blocks       number of blocks merged
        scale               factor on the update
        base_fingerprint    digest of the base weights, `slora.adapters.save_load.fingerprint`; only with blocks
        data, method        of the run
        classes             JSON list of the classes' names, in the order of the outputs
        head                with a zero-shot head: "zero-shot"
        tower, loss         with a zero-shot head: what was trained, and on which loss
        names, templates    with a zero-shot head: JSON lists, what the class embeddings are made of

    Those from `data` on only of a run: an adapter directory does not hold them. With a zero-shot head the file holds
    both towers, and `open_clip.create_model(ARCH, pretrained=FILE)` loads it.

    Args:
        folder: an adapter directory, or a run directory, which names its model.
        out: safetensors file for the plain state dict.
        model_name: as for `models.build`; None for that of the run.
        pretrained: the weights that the adapter belongs to, as for `models.build`; None for those of the run, or none.
        classes: outputs of the head; None for those of the run, or of the head in the adapter.
        scale: factor on the update.
        which: None for the result of a finished run; else a checkpoint of a run, finished or not: "best", "last" or a
            step number. A checkpoint of a run without blocks gives its plain weights.

    Raises:
        ConfigError: `out` exists, the run has no blocks, or the model or the number of classes is unknown.
        CheckpointError: the run is not finished or has no such checkpoint, the adapter is missing, damaged, or of
            another model, or a weight that would be written is not finite.
        WriteError: the disk is full or the folder cannot be written.
    """
    if out.exists():
        raise ConfigError(f"{out} exists; choose another file, or remove it first")
    run = which is not None or (folder / rundir.CONFIG).exists()
    settings = rundir.read_settings(folder) if run else TrainSettings()
    model_name = model_name or settings.model
    if model_name is None:
        if not folder.exists():
            raise ConfigError(f"{folder} does not exist; give an adapter directory, or a run made by slora finetune")
        raise ConfigError(
            f"{folder} is an adapter without the config.yaml of its run; name its model with --model, such as "
            f"timm/vit_base_patch16_224"
        )
    settings = settings.replace(model=model_name, **({} if pretrained is None else {"pretrained": pretrained}))
    labels = read_results.labels(folder) if run else None
    classes = classes or (len(labels) if labels else None)
    if which is None:
        model = _with_adapter(read_results.adapter_of(folder), settings, classes)
    else:
        model = _with_checkpoint(folder, which, settings, classes)
    layers = dict(adapted_layers(model))
    if not layers and scale != 1.0:
        raise read_results.without_blocks(folder, settings.method, f"that scale={scale} could act on; leave it out")
    count = sum(len(layer.activity().active) for layer in layers.values())
    metadata = _of_model(settings) | {"active_blocks": str(count), "scale": str(scale)}
    if run:
        metadata |= {"data": settings.data or "", "method": settings.method}
        metadata |= _of_head(folder, settings, len(labels or ()))
    if labels:
        metadata["classes"] = json.dumps(labels)
    if layers:
        metadata["base_fingerprint"] = fingerprint(model)["digest"]
        merge_and_unload(model, scale)
    _refuse_not_finite(model)
    write_atomically(out, lambda path: save_model(model, str(path), metadata))
    return count


def _refuse_not_finite(model: nn.Module) -> None:
    """Refuse weights that are not finite, including those that merging does not read."""
    trained = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    for name, value in model.state_dict().items():
        if not is_finite(value, name not in trained):
            raise CheckpointError(
                f"{name!r} holds NaN or infinity, from the base model or from the result of the run; check the "
                f"pretrained weights, or merge an earlier checkpoint (--checkpoint)"
            )


def _of_model(settings: TrainSettings) -> dict[str, str]:
    """The metadata about the base model and the version of slora."""
    values = {
        "format": "pt",
        "slora_version": __version__,
        "model": settings.model or "",
        "pretrained": settings.pretrained if isinstance(settings.pretrained, str) else json.dumps(settings.pretrained),
    }
    if settings.img_size is not None:
        values["img_size"] = str(settings.img_size)
    if settings.model_args:
        values["model_args"] = json.dumps(settings.model_args)
    return values


def _of_head(run_dir: Path, settings: TrainSettings, classes: int) -> dict[str, str]:
    """The metadata about a zero-shot head."""
    recorded = read_results.prompts(run_dir, classes) if settings.head == "zero-shot" else None
    if recorded is None:
        return {}
    names, templates = map(json.dumps, recorded)
    loss = "contrastive" if settings.contrastive else "cross-entropy"
    return {"head": settings.head, "tower": settings.tower, "loss": loss, "names": names, "templates": templates}


def _with_checkpoint(run_dir: Path, which: str, settings: TrainSettings, classes: int | None) -> nn.Module:
    folder = chosen(run_dir, which)
    model = rebuild_for(run_dir, settings) if classes is None else rebuild(settings, classes).model
    return load_result(model, settings, run_dir, folder)


def _with_adapter(adapter: Path, settings: TrainSettings, classes: int | None) -> nn.Module:
    if is_clip(settings.model) and read_selective(adapter).base_class != ClipClassifier.__name__:
        # Of both towers, without a head.
        settings = settings.replace(head="zero-shot")
    without_head = settings.head == "zero-shot"
    model = rebuild(settings, 0 if without_head else classes or _classes_in(adapter)).model
    try:
        with warnings.catch_warnings():
            # Merged into the wrong base the file would be useless, so here this is an error.
            warnings.simplefilter("error", BaseModelWarning)
            return load_adapter(model, adapter)
    except BaseModelWarning as error:
        raise CheckpointError(f"{error} On the command line --pretrained does that.") from error


def _classes_in(adapter: Path) -> int:
    """The number of outputs of the head in an adapter."""
    content, tensors = read_adapter(adapter)
    weights = [f"{PREFIX}{name}.weight" for name in content.config.modules_to_save or ()]
    shapes = [tensors[key].shape for key in weights if key in tensors and tensors[key].dim() > 0]
    if not shapes:
        raise ConfigError(f"{adapter} holds no classifier head; give the number of outputs of the model with --classes")
    return int(shapes[-1][0])
