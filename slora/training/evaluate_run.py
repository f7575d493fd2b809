"""The `evaluate` command: what a model can do, and what it knew before fine-tuning and still knows."""

from __future__ import annotations

import dataclasses
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from slora.errors import BaseModelWarning, CheckpointError, ConfigError
from slora.evaluation.accuracy import accuracy
from slora.evaluation.knn import NEIGHBOURS
from slora.io.atomic import write_json
from slora.runs.checkpoint_folders import chosen
from slora.runs.eval_table import forgetting, means
from slora.runs.rundir import EVALUATION, read_settings
from slora.runs.settings import TrainSettings
from slora.sources.batches import make_batches
from slora.sources.captions import Captions, open_captions
from slora.sources.data import Source, open_data
from slora.sources.data_names import FOLDER, check_name
from slora.sources.eval_sets import EvalSet, open_eval_set
from slora.sources.model_names import is_clip
from slora.sources.suites import open_suite
from slora.training.eval_models import Classifiers, before_and_after
from slora.training.eval_rows import Batched, Measured
from slora.training.run_model import build, load_result


def evaluate(
    run_dir: Path,
    source: str | None = None,
    k: Sequence[int] = NEIGHBOURS,
    which: str | None = None,
    *,
    suites: Mapping[str, Path | None] | None = None,
    eval_root: str | Path | None = None,
    zero_shot: Sequence[str] = (),
    retrieval: Sequence[str] = (),
    shots: Sequence[int] = (),
    **overrides: Any,
) -> dict[str, Any]:
    """Evaluate a run, write `evaluation.json` into its directory, and return the same.

    Everything is measured with the model after fine-tuning, and with the initial one, built again.

    Args:
        source: data set of the pretraining, for weighted k-NN on the features: its training images vote, its evaluation
            images are classified.
        k: numbers of neighbours.
        which: None for the result of a finished run; else a checkpoint of a run, finished or not: "best", "last" or a
            step number. Its file is `evaluation-step-<step>.json`.
        suites: ImageNet and its shifted test sets, from `slora.sources.suite_names.check_suites`; for a run on
            ImageNet's classes, or of a CLIP.
        eval_root: folder of the suites; None for the run's `data_root`.
        zero_shot: image folders, or data sets by name, for a CLIP; see `slora.sources.eval_sets.open_eval_set`.
        retrieval: images with captions, for a CLIP; see `slora.sources.captions.open_captions`.
        shots: with `source`, numbers of its training images per class for few-shot classification on the features.
        overrides: settings of the run to change, such as `data_root` or `eval_batch_size`.

    Returns:
        `{"checkpoint", "accuracy": {"data", "top1", "top5", "per_class", "loss", "count", "calibration_error"}, "knn":
        {"source", "bank", "queries", "before": {k: share}, "after": {k: share}}, "request", "rows", "means",
        "forgetting"}`; shares are from 0 to 1. "knn" is None without `source`, "checkpoint" is the name of its folder
        or None, "request" holds the arguments. The others are those of `slora.runs.eval_table`.

    Raises:
        ConfigError: the folder holds no run, a name is unknown, a k is below 1 or exceeds the images that vote, or the
            model cannot classify a set.
        CheckpointError: the run is not finished or has no such checkpoint, or its files are damaged or of another
            model.
        DataError: a data set is missing, empty or damaged.
    """
    if min(k) < 1:
        raise ConfigError(f"k={min(k)} is not a number of neighbours; use 1 or more")
    if min(shots, default=1) < 1:
        raise ConfigError(f"shots={min(shots)} is not a number of images per class; use 1 or more")
    settings = read_settings(run_dir).replace(**overrides)
    folder = None if which is None else chosen(run_dir, which)
    if shots and source is None:
        raise ConfigError(f"shots={list(shots)} needs source, the data set whose images they are")
    check_clip("zero_shot", zero_shot, settings)
    check_clip("retrieval", retrieval, settings)
    if source is not None:
        source = check_name(source)
    # Everything is opened before anything is computed.
    root = Path(settings.data_root if eval_root is None else eval_root)
    sets = [open_suite(name, root, place) for name, place in (suites or {}).items()]
    prompted = open_prompted(zero_shot, settings)
    captions = [open_captions(path) for path in retrieval]
    known = None if source is None else open_data(source, settings.data_root, settings.download)
    _check_votes(known, k, shots)
    model, spec, own = build(settings, run_dir)
    made = Classifiers(settings, own)
    made.check(sets)
    try:
        with warnings.catch_warnings():
            # Compared with the wrong base, before and after would mean nothing.
            warnings.simplefilter("error", BaseModelWarning)
            load_result(model, settings, run_dir, folder)
    except BaseModelWarning as warning:
        raise CheckpointError(f"{run_dir} was trained on another base: {warning}") from warning
    device = device_of(settings)
    model.to(device)
    batched = batched_for(settings, device)
    data = own.data(spec, training=False)
    scores = accuracy(model, batched(data).epoch(), device)
    measured = Measured(*before_and_after(model, settings, own, spec), spec, batched, device)
    rows = [] if any(made.task(each) == "id" for each in sets) else measured.own(own.name, data, scores)
    rows += _of_sets(measured, made, sets, prompted, captions)
    result: dict[str, Any] = {
        "checkpoint": None if folder is None else folder.name,
        "accuracy": {"data": own.name, **dataclasses.asdict(scores)},
        "knn": None,
    }
    if known is not None:
        neighbours, few = measured.source(known, k, shots, settings.seed)
        result["knn"] = {
            "source": known.name,
            "bank": len(known.training),
            "queries": len(known.evaluation),
            "before": {str(n): row["before"] for n, row in zip(k, neighbours, strict=True)},
            "after": {str(n): row["after"] for n, row in zip(k, neighbours, strict=True)},
        }
        rows += [*neighbours, *few]
    result["request"] = {
        "source": source,
        "k": list(k),
        "suites": list(suites or {}),
        "zero_shot": list(zero_shot),
        "retrieval": [str(path) for path in retrieval],
        "shots": list(shots),
    }
    result |= {"rows": rows, "means": means(rows), "forgetting": forgetting(rows, own.name)}
    write_json(run_dir / (EVALUATION if folder is None else f"evaluation-{folder.name}.json"), result)
    return result


def _of_sets(
    measured: Measured,
    made: Classifiers,
    sets: Sequence[EvalSet],
    prompted: Sequence[EvalSet],
    captions: Sequence[Captions],
) -> list[dict[str, Any]]:
    rows = [row for each in sets for row in measured.suite(made, each)]
    rows.sort(key=lambda row: row["task"] != "id")
    rows += [row for each in prompted for row in measured.zero_shot(made, each)]
    return rows + [row for each in captions for row in measured.retrieval(each)]


def check_clip(option: str, given: Sequence[str], settings: TrainSettings) -> None:
    """Check that a run is of a CLIP, if what is `given` for `option` needs one, and that nothing is given twice.

    Raises:
        ConfigError: it is not; or something is given twice.
    """
    if given and not is_clip(settings.model):
        raise ConfigError(
            f"{option}={list(given)} needs a CLIP, but the run is of {settings.model}; measure how well its "
            f"features keep other classes apart with source (on the command line --source)"
        )
    for i, each in enumerate(given):
        if each in given[:i]:
            raise ConfigError(f"{option} holds {each!r} twice; write each once")


def open_prompted(names: Sequence[str], settings: TrainSettings) -> list[EvalSet]:
    """Open sets to classify by prompts; see `slora.sources.eval_sets.open_eval_set`."""
    return [_opened(name, settings) for name in names]


def _opened(name: str, settings: TrainSettings) -> EvalSet:
    """An evaluation set; the folder that the run was trained on has the name that it has there."""
    found = open_eval_set(name, settings.data_root, settings.download)
    data = settings.data or ""
    given, trained = (Path(each.removeprefix(FOLDER)).expanduser().resolve() for each in (name, data))
    return dataclasses.replace(found, name=data) if data.startswith(FOLDER) and given == trained else found


def _check_votes(source: Source | None, k: Sequence[int], shots: Sequence[int]) -> None:
    if source is None:
        return
    if max(k) > len(source.training):
        raise ConfigError(
            f"k={max(k)} exceeds the {len(source.training)} images of {source.name} that vote; use "
            f"{len(source.training)} or less"
        )
    if shots:
        source.few_shot(max(shots), 0)


def batched_for(settings: TrainSettings, device: torch.device) -> Batched:
    """Return a function from a data set to its batches, in order, as the settings of an evaluation ask for."""
    return lambda data: make_batches(data, settings.eval_batch_size, device, num_workers=settings.workers())


def device_of(settings: TrainSettings) -> torch.device:
    """Return the device that a run's settings ask for."""
    cuda = settings.device == "auto" and torch.cuda.is_available()
    return torch.device("cuda" if cuda else "cpu")
