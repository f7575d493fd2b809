"""The sweep of the `merge` command: target against retention over the factor on the update."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn

from slora.errors import BaseModelWarning, CheckpointError, ConfigError
from slora.evaluation.accuracy import accuracy
from slora.evaluation.knn import knn_accuracy
from slora.io.atomic import write_json
from slora.merging import merged
from slora.models.disabled import disabled
from slora.runs import read_results
from slora.runs.checkpoint_folders import chosen
from slora.runs.rundir import SWEEP, read_settings
from slora.runs.settings import TrainSettings
from slora.sources.data import open_data
from slora.sources.data_names import check_name
from slora.training.eval_models import Classifiers, Evaluated, before_and_after
from slora.training.eval_rows import source_features
from slora.training.evaluate_run import batched_for, check_clip, device_of, open_prompted
from slora.training.run_model import build, load_result, rebuild

# Neighbours of the k-NN; fewer where fewer images vote.
K = 20


def sweep(
    run_dir: Path,
    scales: Sequence[float],
    source: str | None = None,
    which: str | None = None,
    *,
    zero_shot: Sequence[str] = (),
    **overrides: Any,
) -> dict[str, Any]:
    """Evaluate a run with its update scaled by each of `scales`, write `sweep.json` into its directory, and return it.

    Interpolates the weights between the base model and the trained one (WiSE-FT, arXiv 2109.01903); the head, which the
    base model does not have, stays as trained. Each scale is merged and unmerged bit for bit. Costs an evaluation of
    the run's data, of `source` and of `zero_shot`, per scale; nothing is trained.

    Args:
        scales: factors on the update, each once; 0 is the base model with the trained head, 1 the trained model.
        source: data set of the pretraining, for k-NN with 20 neighbours; None measures the target only.
        which: None for the result of a finished run; else a checkpoint: "best", "last" or a step number. Its file is
            `sweep-step-<step>.json`.
        zero_shot: as for `slora.training.evaluate_run.evaluate`, for a CLIP.
        overrides: settings of the run to change, such as `data_root` or `eval_batch_size`.

    Returns:
        `{"checkpoint", "data", "source", "k", "before", "zero_shot", "scales": [{"scale", "top1", "loss", "knn",
        "zero_shot"}, ...]}`; `before` is the k-NN accuracy before training. Shares are from 0 to 1, losses in nats;
        "source", "k", "before" and "knn" are None without `source`. "zero_shot" is `{set: top-1 accuracy}`, outside of
        "scales" that before training.

    Raises:
        ConfigError: a scale is not finite or given twice, the folder holds no run, the run has no blocks, or it is not
            of a CLIP and `zero_shot` is given.
        CheckpointError: the run is not finished, its files are damaged, or the base weights are not those that it was
            trained on; names both.
        DataError: a data set is missing or damaged.
    """
    check_scales(scales)
    settings = read_settings(run_dir).replace(**overrides)
    if settings.method not in ("selective", "lora"):
        raise read_results.without_blocks(run_dir, settings.method, "to scale")
    folder = None if which is None else chosen(run_dir, which)
    source = None if source is None else check_name(source)
    check_clip("zero_shot", zero_shot, settings)
    prompted = open_prompted(zero_shot, settings)
    model, spec, own = build(settings, run_dir)
    known = None if source is None else open_data(source, settings.data_root, settings.download)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", BaseModelWarning)
            load_result(model, settings, run_dir, folder)
    except BaseModelWarning as error:
        raise CheckpointError(str(error)) from error
    device = device_of(settings)
    model.to(device)
    batched = batched_for(settings, device)
    k = None if known is None else min(K, len(known.training))

    def knn_of(found: nn.Module, neighbours: int) -> float:
        assert known is not None
        pair = source_features(found, known, spec, batched, device)
        return knn_accuracy(*pair, k=[neighbours])[neighbours]

    made = Classifiers(settings, own)

    def shares_of(state: Evaluated) -> dict[str, float]:
        return {
            each.name: accuracy(made.zero_shot(state, each).to(device), batched(each.data(spec)).epoch(), device).top1
            for each in prompted
        }

    result: dict[str, Any] = {
        "checkpoint": None if folder is None else folder.name,
        "data": own.name,
        "source": None if known is None else known.name,
        "k": k,
        "before": None,
        "zero_shot": {},
        "scales": [],
    }
    if known is not None and k is not None:
        before, context = _model_before(model, settings, len(own.classes))
        with context:
            result["before"] = knn_of(before.to(device), k)
    if prompted:
        initial, present = before_and_after(model, settings, own, spec)
        result["zero_shot"] = shares_of(initial)
    batches = batched(own.data(spec, training=False))
    for scale in scales:
        with merged(model, scale):
            measured = accuracy(model, batches.epoch(), device)
            entry: dict[str, Any] = {"scale": scale, "top1": measured.top1, "loss": measured.loss, "knn": None}
            entry["zero_shot"] = shares_of(present) if prompted else {}
            if known is not None and k is not None:
                entry["knn"] = knn_of(model, k)
        result["scales"].append(entry)
    write_json(run_dir / (SWEEP if folder is None else f"sweep-{folder.name}.json"), result)
    return result


def _model_before(
    model: nn.Module, settings: TrainSettings, classes: int
) -> tuple[nn.Module, contextlib.AbstractContextManager[Any]]:
    """The model before fine-tuning, and the context to use it in."""
    if settings.method in ("selective", "lora") and settings.modules_to_save is None:
        return model, disabled(model)
    # Other weights than blocks and head were trained, so the initial model is built again.
    return rebuild(settings, classes).model, contextlib.nullcontext()


def check_scales(scales: Sequence[float]) -> None:
    """Check the scales of a sweep.

    Raises:
        ConfigError: there is none, or one is not finite or given twice.
    """
    if not scales:
        raise ConfigError("sweep holds no scale; write some, such as 0,0.25,0.5,0.75,1")
    for i, scale in enumerate(scales):
        if not math.isfinite(scale):
            raise ConfigError(f"sweep holds {scale}, which is not finite; write factors such as 0,0.25,0.5,0.75,1")
        if scale in scales[:i]:
            raise ConfigError(f"sweep holds {scale:g} twice; write each scale once")
