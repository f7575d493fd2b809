"""`train`: checks everything, then runs the `Trainer`. An error before the first step leaves the model unchanged."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from slora.layers import adapted_layers
from slora.runs.checkpoint_folders import refuse_newer
from slora.runs.lock import locked
from slora.runs.rundir import CHECKPOINTS
from slora.runs.settings import TrainSettings
from slora.selection.strategy import active_strategy, end_strategy
from slora.sources.batches import Data
from slora.training import random_states
from slora.training.loss import Criterion
from slora.training.make_terms import Terms
from slora.training.process import make_accelerator
from slora.training.result import TrainResult
from slora.training.trainer import Trainer

if TYPE_CHECKING:
    from rich.console import Console


def train(
    model: nn.Module,
    train_data: Data,
    eval_data: Data | None = None,
    settings: TrainSettings | None = None,
    run_dir: str | Path | None = None,
    console: Console | None = None,
    *,
    resume: str | Path | None = None,
    criterion: Criterion | None = None,
    retain: Tensor | None = None,
    terms: Terms | None = None,
    accepted: Callable[[], None] | None = None,
) -> TrainResult:
    """Train the parameters of `model` that require gradients (see `slora.training.prepare`), in place.

    On the CPU a resumed run ends bit for bit where the uninterrupted one ends. Started by torchrun or
    `accelerate launch` in several processes, each takes `batch_size` images of every step: the run equals, to rounding,
    that of one process with the batch of all. Only the first process writes.

    Args:
        model: takes images `[n, ...]` and returns logits `[n, classes]`, or an object with `logits`. If it has a true
            attribute `takes_labels`, training calls it with `(images, labels)`, and it returns an object with its
            `loss`, a scalar, and `logits`, which may be None. Its methods `before_training()` and `after_step()` are
            called before the first and after each optimizer step, if it has them.
        train_data: `(images, labels)`, a `TensorDataset` of the two, or a map-style data set of `(image, label)`.
        eval_data: the same; evaluated as `settings.eval_every` says, and at the end.
        settings: by default `TrainSettings()`.
        run_dir: folder for `metrics.jsonl`, TensorBoard events and `checkpoints/`; None writes nothing.
        console: where a progress bar is drawn; None draws none.
        resume: a checkpoint folder of the same model, data and settings.
        criterion: `(logits, labels) -> scalar`; by default cross-entropy with `settings.label_smoothing`.
        retain: inputs `[n, ...]` on which the features should stay those of the base model (`slora.retention`).
        terms: `model -> [slora.retention.Term, ...]`, further terms of the loss; called once, with the model on the
            device of the run.
        accepted: called before the first step, once everything is checked, including the checkpoint.

    Raises:
        ConfigError: a setting does not fit the data, nothing is trainable, or `run_dir` holds another run, or one that
            is still running.
        NonFiniteLossError: the loss became NaN or infinite; no checkpoint was written since.
        StateError: a parameter to train is not finite from the start.
        CheckpointError: the checkpoint is of another model or damaged, or the disk is full.
        Interrupted: Ctrl-C or SIGTERM with a `run_dir`, in a run of one process: the step was finished and a
            checkpoint written.
    """
    settings = TrainSettings() if settings is None else settings
    accelerator = make_accelerator(settings)
    before = active_strategy(model)
    with contextlib.ExitStack() as stack:
        if run_dir is not None and accelerator.is_main_process:
            stack.enter_context(locked(Path(run_dir)))
            refuse_newer(Path(run_dir) / CHECKPOINTS, resume)
        try:
            with unchanged_on_error(model):
                trainer = Trainer(
                    accelerator, model, train_data, eval_data, settings, run_dir, console, resume, criterion, retain,
                    terms,
                )  # fmt: skip
                if accepted is not None:
                    accepted()
            return trainer.run()
        finally:
            # An active strategy that a failed run leaves would block the next run.
            if active_strategy(model) is not before:
                end_strategy(model)


@contextlib.contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Restore on an exception what a `Trainer` changes before its first step: gates, strategy, random generators."""
    randomness, strategy = random_states.present(), active_strategy(model)
    before = [(m, m.gate.detach().clone(), m.gate.requires_grad, m.gate.grad) for _, m in adapted_layers(model)]
    notes = {layer.gate_cache: (layer.gate_cache.step, layer.gate_cache.asked) for layer, *_ in before}
    try:
        yield
    except BaseException:
        if active_strategy(model) is not strategy:
            end_strategy(model)
        for layer, values, requires_grad, grad in before:
            with torch.no_grad():
                layer.gate.copy_(values)
            layer.gate.requires_grad_(requires_grad)
            layer.gate.grad = grad
            layer.discard_activity()
        for cache, (step, asked) in notes.items():
            cache.step, cache.asked, cache.strategy = step, asked, strategy
        randomness.restore()
        raise
