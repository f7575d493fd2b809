"""The `evaluate` command: accuracy on the new data, and k-NN on other data before and after fine-tuning."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from slora.errors import ConfigError
from slora.evaluation.accuracy import accuracy
from slora.evaluation.knn import NEIGHBOURS, features, knn_accuracy
from slora.io.atomic import write_json
from slora.models.disabled import disabled
from slora.models.input_spec import InputSpec
from slora.runs.checkpoint_folders import chosen
from slora.runs.rundir import EVALUATION, read_settings
from slora.runs.settings import TrainSettings
from slora.sources.batches import make_batches
from slora.sources.data import Source, open_data
from slora.sources.data_names import check_name
from slora.training.run_model import build, load_result, rebuild


def evaluate(
    run_dir: Path,
    source: str | None = None,
    k: Sequence[int] = NEIGHBOURS,
    which: str | None = None,
    **overrides: Any,
) -> dict[str, Any]:
    """Evaluate a run, write `evaluation.json` into its directory, and return the same.

    Accuracy is that of the trained model on the evaluation images of the run's data set. With `source`, also weighted
    k-NN on the features of that data set, with the model before and after fine-tuning: its training images vote, its
    evaluation images are classified.

    Args:
        source: data set of the pretraining; None evaluates accuracy only.
        k: numbers of neighbours.
        which: None for the result of a finished run; else a checkpoint of a run, finished or not: "best", "last" or a
            step number. Its file is `evaluation-step-<step>.json`.
        overrides: settings of the run to change, such as `data_root` or `eval_batch_size`.

    Returns:
        `{"checkpoint", "accuracy": {"data", "top1", "top5", "per_class", "loss", "count"}, "knn": {"source", "bank",
        "queries", "before": {k: share}, "after": {k: share}}}`; shares are from 0 to 1, "knn" is None without
        `source`, "checkpoint" is the name of its folder or None.

    Raises:
        ConfigError: the folder holds no run, a name is unknown, or a k is below 1 or exceeds the images that vote.
        CheckpointError: the run is not finished or has no such checkpoint, or its files are damaged or of another
            model.
        DataError: a data set is missing or damaged.
    """
    if min(k) < 1:
        raise ConfigError(f"k={min(k)} is not a number of neighbours; use 1 or more")
    settings = read_settings(run_dir).replace(**overrides)
    folder = None if which is None else chosen(run_dir, which)
    if source is not None:
        source = check_name(source)
    model, spec, own = build(settings, run_dir)
    known = None if source is None else open_data(source, settings.data_root, settings.download)
    if known is not None and max(k) > len(known.training):
        raise ConfigError(
            f"k={max(k)} exceeds the {len(known.training)} images of {source} that vote; use smaller numbers"
        )
    load_result(model, settings, run_dir, folder)
    device = device_of(settings)
    model.to(device)
    result: dict[str, Any] = {"checkpoint": None if folder is None else folder.name, "knn": None}
    batches = make_batches(
        own.data(spec, training=False), settings.eval_batch_size, device, num_workers=settings.workers()
    )
    measured = accuracy(model, batches.epoch(), device)
    result["accuracy"] = {"data": own.name, **dataclasses.asdict(measured)}
    if known is not None:
        after = knn_of(model, known, spec, k, settings, device)
        before_model, context = model_before(model, settings, len(own.classes))
        with context:
            before = knn_of(before_model.to(device), known, spec, k, settings, device)
        result["knn"] = {
            "source": known.name,
            "bank": len(known.training),
            "queries": len(known.evaluation),
            "before": {str(neighbours): share for neighbours, share in before.items()},
            "after": {str(neighbours): share for neighbours, share in after.items()},
        }
    write_json(run_dir / (EVALUATION if folder is None else f"evaluation-{folder.name}.json"), result)
    return result


def model_before(
    model: nn.Module, settings: TrainSettings, classes: int
) -> tuple[nn.Module, contextlib.AbstractContextManager[Any]]:
    """Return the model before fine-tuning, and the context to use it in."""
    if settings.method in ("selective", "lora") and settings.modules_to_save is None:
        return model, disabled(model)
    # Other weights than blocks and head were trained, so the initial model is built again.
    return rebuild(settings, classes).model, contextlib.nullcontext()


def knn_of(
    model: nn.Module, source: Source, spec: InputSpec, k: Sequence[int], settings: TrainSettings, device: torch.device
) -> dict[int, float]:
    """Return the accuracy of k-NN on the features of `source`, 0 to 1, for each of `k`."""
    found: list[Tensor] = []
    for training in (True, False):
        data = source.data(spec, training=training)
        batches = make_batches(data, settings.eval_batch_size, device, num_workers=settings.workers())
        found += features(model, batches.epoch(), device)
    return knn_accuracy(found[0], found[1], found[2], found[3], k)


def device_of(settings: TrainSettings) -> torch.device:
    """Return the device that a run's settings ask for."""
    cuda = settings.device == "auto" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")
