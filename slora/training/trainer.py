"""`Trainer`: the training loop, on Hugging Face accelerate."""

from __future__ import annotations

import contextlib
import math
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slora.errors import ConfigError, StateError
from slora.evaluation.accuracy import tally
from slora.gates.values import gate_values
from slora.layers import adapted_layers
from slora.retention import feature_drift
from slora.runs.recorder import Recorder
from slora.runs.rundir import CHECKPOINTS, run_dir_of
from slora.runs.settings import TrainSettings
from slora.selection import Strategy
from slora.sources.batches import Batches, Data, make_batches
from slora.training.checkpoint_load import Checkpoint
from slora.training.checkpoint_save import save_checkpoint
from slora.training.fingerprint import fingerprint
from slora.training.head_first import train_head
from slora.training.loss import Criterion, takes_labels, task_loss
from slora.training.make_strategy import Given, first_images, strategy
from slora.training.make_terms import Terms, loss_terms
from slora.training.measure import BlockLog, Clock, Flops, Window
from slora.training.nonfinite import origin, ruined_gates, ruined_parameter, run_error
from slora.training.optimizers import Optimizers
from slora.training.process import interruptible, prepared, train_mode
from slora.training.result import Interrupted, TrainResult
from slora.training.schedule import Schedule

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.console import Console


class Trainer:
    """One run, checked when it is made and started by `run`; `slora.training.train` is its only caller."""

    def __init__(
        self,
        accelerator: Accelerator,
        model: nn.Module,
        train_data: Data,
        eval_data: Data | None,
        settings: TrainSettings,
        run_dir: str | Path | None,
        console: Console | None,
        resume: str | Path | None,
        criterion: Criterion | None,
        retain: Tensor | None,
        terms: Terms | None,
    ) -> None:
        self.settings = settings
        self.model = model
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.own_criterion = criterion is not None
        self.criterion = criterion or _cross_entropy(settings.label_smoothing)
        self.own_loss = takes_labels(model)
        if self.own_loss and criterion is not None:
            raise ConfigError(
                f"criterion has no effect on a {type(model).__name__}, which computes its own loss; leave it out"
            )
        self.after_step = getattr(model, "after_step", None)
        self.accelerator = accelerator
        device = self.device = self.accelerator.device
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        workers = settings.workers()
        batches = make_batches(
            train_data, settings.batch_size, device, seed=settings.seed, num_workers=workers, rank=rank, world=world
        )
        schedule = self.schedule = Schedule(settings, batches)
        self.eval_batches: Batches | None = None
        if eval_data is not None:
            self.eval_batches = make_batches(
                eval_data, settings.eval_batch_size, device, num_workers=workers, rank=rank, world=world
            )
        torch.manual_seed(settings.seed)
        model.to(device)
        broken = "" if resume is not None else ruined_parameter(model)
        if broken:
            raise StateError(f"{broken!r} is not finite before the first step; load or initialise it again")
        if prepare := getattr(model, "before_training", None):
            prepare()
        self.fingerprint = fingerprint(model)
        self.layers = dict(adapted_layers(model))
        self.may_release = any(layer.inactive == "frozen" for layer in self.layers.values())
        self.selection: Strategy | None = None

        def sample(count: int) -> tuple[Tensor, Tensor]:
            return first_images(self._first_epoch(), count)

        if self.layers:
            self.selection = strategy(
                Given(
                    model,
                    schedule.steps,
                    settings,
                    sample,
                    self.criterion,
                    self.accelerator.autocast,
                    retains=retain is not None and settings.retain_weight > 0,
                    retain=retain,
                )
            )
        if settings.lr_hold is None and self.selection is not None and self.selection.hold:
            # The cosine starts once the choice is made: earlier, little of the rate is left for what was chosen.
            schedule.hold = self.selection.last
        self.optimizers = Optimizers(model, settings)
        self.terms, self.drift = loss_terms(model, settings, retain, sample, terms)
        self.term_values: dict[str, Tensor] = {}
        self.result = TrainResult()
        self.step = 0
        self.start = self.last_checkpoint = None if resume is None else Path(resume)
        checkpoint = None
        if self.start is not None:
            checkpoint = Checkpoint(self.start, model, settings, self.fingerprint, self.optimizers)
            checkpoint.check_run(schedule.steps, world, self.selection)
            self.step = checkpoint.state.step
        main = self.accelerator.is_main_process
        self.recorder = Recorder(
            self.run_dir if main else None,
            schedule.steps,
            self.step,
            console if main and settings.progress else None,
            settings.tensorboard,
            earlier=None if self.start is None else run_dir_of(self.start),
        )
        if checkpoint is not None:
            # Everything was checked above; from here on the model changes.
            checkpoint.restore()
            if self.selection is not None and checkpoint.state.selection is not None:
                self.selection.load_state_dict(checkpoint.state.selection)
            self.result = TrainResult.from_state(checkpoint.state.result, self.layers)
        self.blocks = BlockLog(self.layers, self.result.active_blocks)
        self.window = Window(settings.log_every * schedule.accumulation, device)
        self.clock = Clock(self.result.seconds, self.step)
        self.flops = Flops(settings.count_flops, world, self.clock)
        self.stop_requested = False
        # On a GPU, or with several processes, reading a loss means waiting: there losses are read once per `log_every`.
        self.checks_each_loss = device.type == "cpu" and world == 1

    def run(self) -> TrainResult:
        """Run to the end and return the result."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.closing(self.recorder))
            if self.start is None and self.settings.head_first:
                # Before the model is wrapped: DDP then copies the head of the first process to all.
                train_head(
                    self.model,
                    self.schedule.batches.epoch(0),
                    self.settings.head_first,
                    self.criterion,
                    self.settings.seed,
                    gather=self.accelerator.gather,
                )
            if self.start is None and self.selection is not None:
                with self.clock.once_only():
                    self.result.flops += self.flops.of(self.selection.begin)
            if self.run_dir is not None and self.accelerator.num_processes == 1:
                stack.enter_context(interruptible(self._request_stop))
            self.wrapped, self.prepared = stack.enter_context(
                prepared(self.accelerator, self.model, self.optimizers.all)
            )
            train_mode(self.model)
            self.blocks.note(self.step)
            while self.step < self.schedule.steps:
                batches, left = self.schedule.rest_of_epoch(self.step)
                for _ in range(left):
                    self._step(batches)
                    self._after_step()
            if self.selection is not None:
                self.selection.finish()
            if self.settings.log_drift and self.drift is not None:
                self._log_feature_drift(self.drift.samples)
        self.result.steps = self.step
        self.result.seconds = self.clock.seconds()
        self.result.history = self.recorder.history
        return self.result

    def _first_epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of the first epoch, each gathered from all processes."""
        for images, labels in self.schedule.batches.epoch(0):
            yield self.accelerator.gather(images), self.accelerator.gather(labels)

    def _request_stop(self) -> None:
        self.stop_requested = True

    def _step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        state = self._activity()
        if self.may_release and self.optimizers.release(self.model):
            state = self._activity()
        self.penalty = 0.0 if self.selection is None else self.selection.penalty_on_gates
        self.optimizers.set(self.schedule.scale(self.step), self.penalty)
        due = tuple(term.due(self.step) for term in self.terms)
        work = (state, None if self.selection is None else self.selection.phase, due)
        self.result.flops += self.flops.of_step(work, self._forward_backward, batches)
        if self.after_step is not None:
            self.after_step()
        self._select()
        self.step += 1

    def _select(self) -> None:
        if self.selection is None:
            return
        # All steps but the one that ends the warm-up, where blocks are ranked.
        if self.selection.taken + 1 != self.selection.first:
            self.selection.step()
            return
        # `SoloGain` runs forward passes here, once.
        with self.clock.once_only():
            self.result.flops += self.flops.of(self.selection.step)

    def _forward_backward(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        for i in range(self.schedule.accumulation):
            images, labels = next(batches)
            with self.accelerator.accumulate(self.wrapped):
                loss, logits = task_loss(self.wrapped, images, labels, self.criterion, self.own_loss)
                self.window.add(loss, logits, labels)
                if self.checks_each_loss and not math.isfinite(loss.item()):
                    self._refuse_loss(loss.item(), self.step + 1, images)
                # A penalty on block gates may be the optimizer's.
                if self.selection is not None and (self.optimizers.penalty_in_loss or not self.penalty):
                    loss = loss + self.selection.penalty()
                for term in self.terms if i == 0 else ():
                    if term.due(self.step):
                        with self.accelerator.autocast():
                            value = term(self.step)
                        self.term_values[term.name] = value.detach()
                        # accelerate divides the loss of each batch by their number; a term is in one of them.
                        loss = loss + self.schedule.accumulation * value
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self._clip()
                for optimizer in self.prepared:
                    optimizer.step()
                    optimizer.zero_grad()

    def _clip(self) -> None:
        if self.settings.clip_norm:
            # Separately: the gates have their own optimizer, so neither gradient should scale the other.
            # torch's function: accelerate's does the same without loss scaling, 0.2 ms slower.
            weights, gates = self.optimizers.parameters()
            norm = nn.utils.clip_grad_norm_(weights, self.settings.clip_norm)
            self.window.add_norm(norm)
            if self.settings.optimizer == "adamw":
                # If the norm is not finite, the fused kernel skips the step on the device.
                self.optimizers.weights.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
            nn.utils.clip_grad_norm_(gates, self.settings.clip_norm)

    def _activity(self) -> Any:
        """What determines the FLOPs of a step: the active blocks and whether the others are probed."""
        activity = [layer.activity() for layer in self.layers.values()]
        return tuple((entry.active, entry.probe and entry.inactive != ()) for entry in activity)

    def _after_step(self) -> None:
        self.clock.step()
        last = self.step == self.schedule.steps
        if self.window.full or last:
            self._log()
        evaluate = self.eval_batches is not None and (last or self.schedule.due(self.settings.eval_every, self.step))
        save = last or self.schedule.due(self.settings.save_every, self.step)
        if evaluate:
            improved = self._evaluate()
            save = save or (improved and self.settings.save_every != 0)
        if self.run_dir is not None and (save or self.stop_requested):
            self._save()
            if self.stop_requested and not last:
                assert self.last_checkpoint is not None
                raise Interrupted(self.last_checkpoint)

    def _log(self) -> None:
        """Read the losses since the last record, the only synchronisation with the device, and record their mean."""
        if not self.window.filled:
            return
        losses, accuracy, norm = self.window.read(lambda value: self.accelerator.reduce(value, "mean"))
        lr = self.optimizers.weights.param_groups[0]["lr"]
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            batch = self.step * self.schedule.accumulation - len(losses) + bad[0]
            step = batch // self.schedule.accumulation + 1
            self._refuse_loss(losses[bad[0]], step, self.schedule.images(batch))
        if norm is not None and not math.isfinite(norm):
            self._refuse(f"the gradient is not finite at or shortly before step {self.step}", self.step)
        self.clock.read()
        record: dict[str, Any] = {
            "step": self.step,
            "epoch": round(self.step / self.schedule.steps_per_epoch, 4),
            "loss": sum(losses) / len(losses),
            "accuracy": accuracy,
            "lr": lr,
            "grad_norm": norm,
        }
        if self.layers:
            values = gate_values(self.model)
            if named := ruined_gates(values):
                self._refuse(f"a gate of {named} is not finite at or shortly before step {self.step}", self.step)
            record |= {"penalty": self.penalty}
            record |= self.blocks.record(self.step, values, first=not self.recorder.history)
            if self.settings.method == "selective":
                record["gates"] = {name: [round(value, 7) for value in scores] for name, scores in values.items()}
        if self.term_values:
            terms = {name: value.item() for name, value in self.term_values.items()}
            for name, value in terms.items():
                if not math.isfinite(value):
                    self._refuse(f"the loss term {name!r} is {value} at or shortly before step {self.step}", self.step)
            record["retention"] = terms
        if self.drift is not None and self.settings.log_drift:
            record["drift"] = {name: values.tolist() for name, values in self.drift.per_block().items()}
        images = self.settings.batch_size * self.schedule.accumulation * self.accelerator.num_processes
        record |= {
            "images_per_second": images * self.clock.rate(),
            "seconds": self.clock.seconds(),
            "flops": self.result.flops,
        }
        self.recorder.add(record)

    def _log_feature_drift(self, samples: Tensor) -> None:
        """Record how far each active block of the result moves the final features; one forward pass for each."""
        with self.clock.paused(self.device), self.accelerator.autocast():
            try:
                drift = feature_drift(self.model, samples)
            except ConfigError:
                # The model has no final features that slora finds.
                return
        record = {name: values.tolist() for name, values in drift.items()}
        self.recorder.add({"step": self.step, "feature_drift": record})

    def _refuse_loss(self, loss: float, step: int, images: Tensor) -> None:
        found = origin(self.model, images)
        remedy = found.remedy
        if not found.what and self.own_criterion:
            remedy = "check the criterion"
        clause = f": {found.what}" if found.what else ", though every layer is finite on its batch"
        self._refuse(f"the loss is {loss} at step {step}{clause}", step, remedy)

    def _refuse(self, what: str, step: int, remedy: str = "") -> None:
        """End the run with an error; without a `remedy` it advises a lower learning rate."""
        self.recorder.add({"step": step, "error": what})
        lr = self.schedule.scale(step - 1) * self.settings.lr
        raise run_error(what, remedy, self.last_checkpoint, self.start, lr)

    def _evaluate(self) -> bool:
        """Evaluate, record, and return whether the accuracy is the best so far."""
        self._log()
        assert self.eval_batches is not None
        with self.clock.paused(self.device):
            # Not the wrapped model: processes may have different numbers of batches, which DDP would wait for.
            counts = tally(self.model, self.eval_batches.epoch(), self.device)
            correct, loss, count = self.accelerator.reduce(counts).tolist()
        accuracy = correct / count
        self.result.accuracy = accuracy
        self.recorder.add({"step": self.step, "eval_loss": loss / count, "eval_accuracy": accuracy})
        # Until the blocks are chosen, more are active than in the result: such an accuracy is not the best of the run.
        chosen = self.selection is None or self.selection.taken >= self.selection.last
        improved = chosen and (self.result.best_accuracy is None or accuracy > self.result.best_accuracy)
        if improved:
            self.result.best_accuracy, self.result.best_step = accuracy, self.step
        return improved

    def _save(self) -> None:
        self._log()
        broken = ruined_parameter(self.model)
        if broken:
            self._refuse(f"{broken!r} is not finite after step {self.step}", self.step)
        with self.clock.paused(self.device):
            if self.accelerator.is_main_process:
                assert self.run_dir is not None
                self.last_checkpoint = save_checkpoint(
                    self.run_dir / CHECKPOINTS,
                    self.model,
                    self.optimizers,
                    self.settings,
                    self.fingerprint,
                    {
                        "step": self.step,
                        "steps": self.schedule.steps,
                        "processes": self.accelerator.num_processes,
                        "selection": None if self.selection is None else self.selection.state_dict(),
                        "result": self.result.state(self.clock.seconds()),
                    },
                )
            self.accelerator.wait_for_everyone()


def _cross_entropy(label_smoothing: float) -> Criterion:
    return lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
