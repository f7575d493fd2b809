"""`train`: the run itself, on Hugging Face accelerate."""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slora.errors import CheckpointError, ConfigError, DamagedCheckpointError, NonFiniteLossError, StateError
from slora.evaluation.accuracy import logits_of, tally
from slora.gates.penalty import gate_penalty
from slora.gates.values import gate_values
from slora.layers import adapted_layers
from slora.module_tree.wrappers import named_parameters
from slora.ops.flops import count_flops
from slora.retention import Distillation
from slora.runs.recorder import Recorder
from slora.runs.rundir import CHECKPOINTS, claimed
from slora.runs.settings import TrainSettings
from slora.selection import Budget, Gates, Strategy
from slora.selection.strategy import at_work, release
from slora.sources.batches import Batches, Data, make_batches
from slora.training import checkpoint, random_states
from slora.training.head_first import train_head
from slora.training.measure import Clock, Window
from slora.training.nonfinite import origin
from slora.training.optimizers import Optimizers, finite, lr_scale
from slora.training.process import interruptible, make_accelerator, prepared, train_mode
from slora.training.strategies import first_images, strategy

if TYPE_CHECKING:
    from accelerate import Accelerator
    from rich.console import Console

Criterion = Callable[[Tensor, Tensor], Tensor]
Blocks = dict[str, tuple[int, ...]]


class Interrupted(KeyboardInterrupt):
    """The run was asked to stop (Ctrl-C, SIGTERM) and has written a checkpoint.

    Attributes:
        checkpoint: the folder to resume from.
    """

    def __init__(self, folder: Path) -> None:
        super().__init__(f"stopped; the last checkpoint is {folder}")
        self.checkpoint = folder


@dataclass
class TrainResult:
    """What a run achieved.

    Attributes:
        history: the records of the run, as in `metrics.jsonl`: every `log_every` steps `step, epoch, loss,
            accuracy, lr, penalty, grad_norm, active, blocks, mean_gate, images_per_second, seconds, flops`, under
            method "selective" `gates: {layer: [...]}`, and at evaluations `step, eval_loss, eval_accuracy`.
        accuracy: on the evaluation data after the last step, 0 to 1; None without evaluation data.
        best_accuracy: the highest since the choice of blocks was made, at `best_step`.
        steps: optimizer steps taken, those before a resume included.
        seconds: time spent in them, without evaluations, checkpoints and the counting of FLOPs.
        flops: of all training steps, forward and backward; 0 with `count_flops=False`.
        active_blocks: `[(step, {layer: numbers of its active blocks}), ...]`: at the start, and at each record that
            found others than the one before; empty for methods without blocks.
    """

    history: list[dict[str, Any]] = field(default_factory=list)
    accuracy: float | None = None
    best_accuracy: float | None = None
    best_step: int | None = None
    steps: int = 0
    seconds: float = 0.0
    flops: int = 0
    active_blocks: list[tuple[int, Blocks]] = field(default_factory=list)


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
    accepted: Callable[[], None] | None = None,
) -> TrainResult:
    """Train what requires gradients in `model` (see `slora.training.prepare`), in place.

    On the CPU a run resumed from a checkpoint ends bit for bit where the uninterrupted one ends. Started by
    torchrun or `accelerate launch` in several processes, each takes `batch_size` images of every step: the run is that
    of one process with as many times the batch, to rounding. Only the first process writes.

    Args:
        model: takes images `[n, ...]` and returns logits `[n, classes]`, or an object with `logits`.
        train_data: `(images, labels)`, a `TensorDataset` of the two, or a map-style data set of `(image, label)`.
        eval_data: the same; evaluated as `settings.eval_every` says, and at the end.
        settings: the knobs of the run; by default those of `TrainSettings()`.
        run_dir: folder for `metrics.jsonl`, TensorBoard events and `checkpoints/`; None writes nothing.
        console: where a progress bar is drawn; None draws none.
        resume: a checkpoint folder of the same model, data and settings.
        criterion: `(logits, labels) -> scalar`; by default cross-entropy with `settings.label_smoothing`.
        retain: inputs `[n, ...]` whose features are held where the base model has them (`slora.retention`).
        accepted: called before the first step, once everything is checked, the checkpoint included.

    Raises:
        ConfigError: a setting does not fit the data, nothing is trainable, or `run_dir` holds another run, or one that
            is going on.
        NonFiniteLossError: the loss became NaN or infinite; no checkpoint was written since.
        StateError: what is to be trained is not finite from the start.
        CheckpointError: the checkpoint is of another model or damaged, or the disk is full.
        Interrupted: Ctrl-C or SIGTERM with a `run_dir`, in a run of one process: the step was finished and a
            checkpoint written.
    """
    settings = TrainSettings() if settings is None else settings
    accelerator = make_accelerator(settings)
    before = at_work(model)
    with contextlib.ExitStack() as stack:
        if run_dir is not None and accelerator.is_main_process:
            stack.enter_context(claimed(Path(run_dir)))
            checkpoint.refuse_newer(Path(run_dir) / CHECKPOINTS, resume)
        try:
            with unchanged_on_error(model):
                trainer = Trainer(
                    accelerator, model, train_data, eval_data, settings, run_dir, console, resume, criterion, retain
                )
                if accepted is not None:
                    accepted()
            return trainer.run()
        finally:
            # A run that breaks off leaves no strategy behind that would keep the next one from starting.
            if at_work(model) is not before:
                release(model)


@contextlib.contextmanager
def unchanged_on_error(model: nn.Module) -> Iterator[None]:
    """Put gates and random generators back if an exception passes: what a `Trainer` changes before its first step."""
    randomness, strategy = random_states.present(), at_work(model)
    before = [(m, m.gate.detach().clone(), m.gate.requires_grad, m.gate.grad) for _, m in adapted_layers(model)]
    notes = {layer.gate_cache: (layer.gate_cache.step, layer.gate_cache.asked) for layer, *_ in before}
    try:
        yield
    except BaseException:
        if at_work(model) is not strategy:
            release(model)
        for layer, values, requires_grad, grad in before:
            with torch.no_grad():
                layer.gate.copy_(values)
            layer.gate.requires_grad_(requires_grad)
            layer.gate.grad = grad
            layer.discard_activity()
        for cache, (step, asked) in notes.items():
            cache.step, cache.asked, cache.strategy = step, asked, strategy
        randomness.put()
        raise


class Trainer:
    """One run; `train` is its only caller. Reads from top to bottom in the order in which things happen."""

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
    ) -> None:
        self.settings = settings
        self.model = model
        self.run_dir = None if run_dir is None else Path(run_dir)
        self.own_criterion = criterion is not None
        self.criterion = criterion or _cross_entropy(settings.label_smoothing)
        self.accelerator = accelerator
        device = self.device = self.accelerator.device
        rank, world = self.accelerator.process_index, self.accelerator.num_processes
        workers = settings.workers()
        self.train_batches = make_batches(
            train_data, settings.batch_size, device, seed=settings.seed, num_workers=workers, rank=rank, world=world
        )
        self.eval_batches: Batches | None = None
        if eval_data is not None:
            self.eval_batches = make_batches(
                eval_data, settings.eval_batch_size, device, num_workers=workers, rank=rank, world=world
            )
        self.accumulation = settings.gradient_accumulation
        self.steps_per_epoch = len(self.train_batches) // self.accumulation
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"gradient_accumulation={self.accumulation} times batch_size={settings.batch_size} exceeds the "
                f"{self.train_batches.count} training images; lower one of them"
            )
        self.steps = settings.max_steps or settings.epochs * self.steps_per_epoch
        self.warmup = round(settings.warmup * self.steps)

        torch.manual_seed(settings.seed)
        model.to(device)
        broken = None if resume is not None else finite(_trainable(model))
        if broken is not None:
            raise StateError(f"{broken!r} is not finite before the first step; load or initialise it again")
        self.fingerprint = checkpoint.fingerprint(model)
        self.layers = dict(adapted_layers(model))
        self.may_release = any(layer.inactive == "frozen" for layer in self.layers.values())
        self.selection: Strategy | None = None
        if self.layers:
            self.selection = strategy(
                model,
                self.steps,
                settings,
                lambda count: first_images(self._first_epoch(), count),
                self.criterion,
                self.accelerator.autocast,
                retains=retain is not None and settings.retain_weight > 0,
            )
        if settings.lr_hold is not None:
            self.hold = round(settings.lr_hold * self.steps)
        else:
            # The few blocks that a budget leaves would hardly learn at what a cosine has left of the rate by then.
            self.hold = self.selection.last if isinstance(self.selection, Budget) else 0
        self.optimizers = Optimizers(model, settings)
        self.keep: Distillation | None = None
        if retain is not None and settings.retain_weight:
            self.keep = Distillation(model, retain, settings.retain_weight, seed=settings.seed)
        self.result = TrainResult()
        self.step = 0
        self.start = self.last_checkpoint = None if resume is None else Path(resume)
        found = None if self.start is None else self._found(self.start)
        main = self.accelerator.is_main_process
        self.recorder = Recorder(
            self.run_dir if main else None,
            self.steps,
            self.step,
            console if main and settings.progress else None,
            settings.tensorboard,
            earlier=None if self.start is None else self.start.parent.parent,
        )
        if found is not None:
            self._put(found)
        self.window = Window(settings.log_every * self.accumulation, device)
        self.flops_of: dict[Any, int] = {}
        self.clock = Clock(self.result.seconds, self.step)
        self.stop_requested = False
        # On a GPU a loss is looked at when a record is due, and where processes wait for each other, too.
        self.checks_each_loss = device.type == "cpu" and world == 1

    def run(self) -> TrainResult:
        """Run to the end and return the result."""
        with contextlib.ExitStack() as stack:
            stack.enter_context(contextlib.closing(self.recorder))
            if self.start is None and self.settings.head_first:
                # Before the model is wrapped, so that several processes go on from the head of the first.
                train_head(
                    self.model,
                    self.train_batches.epoch(0),
                    self.settings.head_first,
                    self.criterion,
                    self.settings.seed,
                    gather=self.accelerator.gather,
                )
            if self.run_dir is not None and self.accelerator.num_processes == 1:
                stack.enter_context(interruptible(self._request_stop))
            self.wrapped, self.prepared = stack.enter_context(
                prepared(self.accelerator, self.model, self.optimizers.all)
            )
            train_mode(self.model)
            self._note_blocks()
            while self.step < self.steps:
                epoch, done = divmod(self.step, self.steps_per_epoch)
                batches = self.train_batches.epoch(epoch, done * self.accumulation)
                for _ in range(min(self.steps_per_epoch - done, self.steps - self.step)):
                    self._step(batches)
                    self._after_step()
            if self.selection is not None:
                self.selection.finish()
        self.result.steps = self.step
        self.result.seconds = self.clock.seconds()
        self.result.history = self.recorder.history
        return self.result

    def _first_epoch(self) -> Iterator[tuple[Tensor, Tensor]]:
        """The batches of all processes, as one process would have them."""
        for images, labels in self.train_batches.epoch(0):
            yield self.accelerator.gather(images), self.accelerator.gather(labels)

    def _mean(self, value: Tensor) -> Tensor:
        mean: Tensor = self.accelerator.reduce(value, "mean")
        return mean

    def _request_stop(self) -> None:
        self.stop_requested = True

    def _step(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        state = self._activity()
        if self.may_release and self.optimizers.release(self.model):
            state = self._activity()
        settings = self.settings
        gates = self.selection if isinstance(self.selection, Gates) else None
        self.penalty = 0.0 if gates is None else gates.weight
        scale = lr_scale(self.step, self.steps, self.warmup, settings.min_lr_ratio, self.hold)
        self.optimizers.set(scale, self.penalty)
        work = (state, None if self.selection is None else self.selection.phase, self._keeps())
        if settings.count_flops and work not in self.flops_of:
            with self.clock.excluded():
                flops = count_flops(self._forward_backward, batches)
            self.flops_of[work] = flops * self.accelerator.num_processes
        else:
            self._forward_backward(batches)
        self.result.flops += self.flops_of.get(work, 0)
        self._select()
        self.step += 1

    def _select(self) -> None:
        if self.selection is None:
            return
        if self.selection.taken + 1 != self.selection.first:
            self.selection.step()
            return
        # Solo gains are forward passes, too.
        with self.clock.apart():
            if self.settings.count_flops:
                self.result.flops += count_flops(self.selection.step) * self.accelerator.num_processes
            else:
                self.selection.step()

    def _keeps(self) -> bool:
        """Whether this step has the term of the retained samples."""
        return self.keep is not None and self.step % self.keep.every == 0

    def _forward_backward(self, batches: Iterator[tuple[Tensor, Tensor]]) -> None:
        for part in range(self.accumulation):
            images, labels = next(batches)
            with self.accelerator.accumulate(self.wrapped):
                logits = logits_of(self.wrapped(images))
                loss = self.criterion(logits, labels)
                self.window.add(loss, logits, labels)
                if self.checks_each_loss and not math.isfinite(loss.item()):
                    self._refuse_loss(loss.item(), self.step + 1, images)
                if self.optimizers.penalty_in_loss and self.penalty:
                    loss = loss + self.penalty * gate_penalty(self.model)
                if part == 0 and self._keeps():
                    assert self.keep is not None
                    with self.accelerator.autocast():
                        # accelerate divides every part's loss by their number.
                        loss = loss + self.accumulation * self.keep(self.step)
                self.accelerator.backward(loss)
                if self.accelerator.sync_gradients:
                    self._clip()
                for optimizer in self.prepared:
                    optimizer.step()
                    optimizer.zero_grad()

    def _clip(self) -> None:
        if self.settings.clip_norm:
            # The gates follow a rule of their own, so their gradients neither shrink the others nor are shrunk.
            # torch's own function: without loss scaling accelerate adds nothing to it but 0.2 ms a step.
            weights, gates = self.optimizers.parameters()
            norm = nn.utils.clip_grad_norm_(weights, self.settings.clip_norm)
            self.window.add_norm(norm)
            if self.settings.optimizer == "adamw":
                # Its kernel leaves such a step out, without a wait: the weights stay what they were when it broke.
                self.optimizers.weights.found_inf = (~torch.isfinite(norm)).float()  # type: ignore[attr-defined]
            nn.utils.clip_grad_norm_(gates, self.settings.clip_norm)

    def _activity(self) -> Any:
        """What decides the work of a step: the active blocks and whether the others are probed."""
        activity = [layer.activity() for layer in self.layers.values()]
        return tuple((entry.active, entry.probe and entry.inactive != ()) for entry in activity)

    def _note_blocks(self) -> bool:
        """Note the active blocks if they differ from those noted last; return whether they do."""
        blocks = {name: layer.activity().active for name, layer in self.layers.items()}
        noted = self.result.active_blocks
        if not blocks or (noted and noted[-1][1] == blocks):
            return False
        noted.append((self.step, blocks))
        return True

    def _after_step(self) -> None:
        self.clock.step()
        last = self.step == self.steps
        if self.window.full or last:
            self._log()
        evaluate = self.eval_batches is not None and (last or self._due(self.settings.eval_every))
        save = last or self._due(self.settings.save_every)
        if evaluate:
            improved = self._evaluate()
            save = save or (improved and self.settings.save_every != 0)
        if self.run_dir is not None and (save or self.stop_requested):
            self._save()
            if self.stop_requested and not last:
                assert self.last_checkpoint is not None
                raise Interrupted(self.last_checkpoint)

    def _due(self, every: int | None) -> bool:
        every = self.steps_per_epoch if every is None else every
        return every > 0 and self.step % every == 0

    def _log(self) -> None:
        """Read the losses since the last time, the only wait for the device, and record their mean."""
        if not self.window.filled:
            return
        losses, accuracy, norm = self.window.read(self._mean)
        lr = self.optimizers.weights.param_groups[0]["lr"]
        bad = [i for i, loss in enumerate(losses) if not math.isfinite(loss)]
        if bad:
            part = self.step * self.accumulation - len(losses) + bad[0]
            step = part // self.accumulation + 1
            epoch, number = divmod(part, self.steps_per_epoch * self.accumulation)
            images, _ = next(iter(self.train_batches.epoch(epoch, number)))
            self._refuse_loss(losses[bad[0]], step, images)
        if norm is not None and not math.isfinite(norm):
            self._refuse(f"the gradient is not finite at or shortly before step {self.step}", self.step)
        self.clock.read()
        record: dict[str, Any] = {
            "step": self.step,
            "epoch": round(self.step / self.steps_per_epoch, 4),
            "loss": sum(losses) / len(losses),
            "accuracy": accuracy,
            "lr": lr,
            "grad_norm": norm,
        }
        if self.layers:
            record |= {"penalty": self.penalty} | self._of_blocks()
            if not math.isfinite(record["mean_gate"]):
                ruined = [name for name, gate in gate_values(self.model).items() if not all(map(math.isfinite, gate))]
                others = f" and {len(ruined) - 3} more layers" if len(ruined) > 3 else ""
                named = ", ".join(map(repr, ruined[:3])) + others
                self._refuse(f"a gate of {named} is not finite at or shortly before step {self.step}", self.step)
        images = self.settings.batch_size * self.accumulation * self.accelerator.num_processes
        record |= {
            "images_per_second": images * self.clock.rate(),
            "seconds": self.clock.seconds(),
            "flops": self.result.flops,
        }
        self.recorder.add(record)

    def _of_blocks(self) -> dict[str, Any]:
        """What a record says of blocks and gates."""
        changed = self._note_blocks() or not self.recorder.history
        blocks, values = self.result.active_blocks[-1][1], gate_values(self.model)
        record: dict[str, Any] = {
            "active": sum(map(len, blocks.values())),
            "blocks": sum(layer.blocks for layer in self.layers.values()),
            "mean_gate": fmean(abs(value) for scores in values.values() for value in scores),
        }
        if self.settings.method == "selective":
            record["gates"] = {name: [round(value, 7) for value in scores] for name, scores in values.items()}
        if changed:
            record["active_blocks"] = {name: list(active) for name, active in blocks.items()}
        return record

    def _refuse_loss(self, loss: float, step: int, images: Tensor) -> None:
        found = origin(self.model, images)
        remedy = found.remedy
        if not found.what and self.own_criterion:
            remedy = "check the criterion"
        clause = f": {found.what}" if found.what else ", though every layer is finite on its batch"
        self._refuse(f"the loss is {loss} at step {step}{clause}", step, remedy)

    def _refuse(self, what: str, step: int, remedy: str = "") -> None:
        """Break the run off, for what a lower learning rate may help against where nothing else is the remedy."""
        self.recorder.add({"step": step, "error": what})
        last = self.last_checkpoint
        if remedy:
            kept = f"resume from {last}" if last else "start again: no checkpoint was written before it"
            raise NonFiniteLossError(f"{what}; {remedy}, then {kept}. Nothing was overwritten.", diverged=False)
        lr = lr_scale(step - 1, self.steps, self.warmup, self.settings.min_lr_ratio) * self.settings.lr
        if last is None:
            remedy = "no checkpoint was written before it; start again with a lower lr, or a longer warmup"
        elif last != self.start:
            remedy = f"the last good checkpoint is {last}; resume from it with a lower lr"
        else:
            # Ruined weights are finite for a while, and saved as such.
            earlier = checkpoint.before(last)
            back = f"go back to the one before it, {earlier}" if earlier else "start anew"
            remedy = (
                f"no checkpoint was written since {last}; resume from it with a lower lr. If that does not help, this "
                f"checkpoint itself may be spoilt: {back}"
            )
        raise NonFiniteLossError(f"{what} (learning rate {lr:.3g}); {remedy}. Nothing was overwritten.")

    def _evaluate(self) -> bool:
        """Evaluate, record, and return whether the accuracy is the best so far."""
        self._log()
        assert self.eval_batches is not None
        with self.clock.paused(self.device):
            # Not the wrapped model: processes may have different numbers of batches, and need not wait for each other.
            counts = tally(self.model, self.eval_batches.epoch(), self.device)
            correct, loss, count = self.accelerator.reduce(counts).tolist()
            train_mode(self.model)
        accuracy = correct / count
        self.result.accuracy = accuracy
        self.recorder.add({"step": self.step, "eval_loss": loss / count, "eval_accuracy": accuracy})
        # Before the choice of blocks is made, the model is another one than the run is asked for.
        chosen = self.selection is None or self.selection.taken >= self.selection.last
        improved = chosen and (self.result.best_accuracy is None or accuracy > self.result.best_accuracy)
        if improved:
            self.result.best_accuracy, self.result.best_step = accuracy, self.step
        return improved

    def _save(self) -> None:
        self._log()
        broken = finite(_trainable(self.model))
        if broken is not None:
            self._refuse(f"{broken!r} is not finite after step {self.step}", self.step)
        with self.clock.paused(self.device):
            if self.accelerator.is_main_process:
                assert self.run_dir is not None
                result = dataclasses.asdict(self.result) | {"seconds": self.clock.seconds()}
                result["active_blocks"] = [(step, list(blocks.values())) for step, blocks in self.result.active_blocks]
                self.last_checkpoint = checkpoint.save(
                    self.run_dir / CHECKPOINTS,
                    self.model,
                    self.optimizers,
                    self.settings,
                    self.fingerprint,
                    {
                        "step": self.step,
                        "steps": self.steps,
                        "processes": self.accelerator.num_processes,
                        "selection": None if self.selection is None else self.selection.state_dict(),
                        "result": result,
                    },
                )
            self.accelerator.wait_for_everyone()

    def _found(self, folder: Path) -> checkpoint.Checkpoint:
        """The checkpoint to go on from, checked."""
        found = checkpoint.Checkpoint(folder, self.model, self.settings, self.fingerprint, self.optimizers)
        state = found.state
        now = self.accelerator.num_processes
        if state.processes != now:
            raise CheckpointError(
                f"{folder} is of a run in {state.processes} process{'es' * (state.processes > 1)}, this one has {now}: "
                f"other images would form a step; resume with as many (torchrun --nproc_per_node {state.processes})"
            )
        if state.step > self.steps:
            raise ConfigError(
                f"{folder} is at step {state.step}, beyond max_steps={self.steps}; resume with more steps, or "
                f"from an earlier checkpoint"
            )
        if (self.selection is None) != (state.selection is None):
            raise DamagedCheckpointError(
                f"{folder} is damaged: it has no strategy, or one too many; use another checkpoint"
            )
        if self.selection is not None and state.selection is not None:
            self.selection.check_state(state.selection)
        self.step = state.step
        return found

    def _put(self, found: checkpoint.Checkpoint) -> None:
        """Go on from a checkpoint; nothing can fail any more."""
        found.put()
        state = found.state
        if self.selection is not None and state.selection is not None:
            self.selection.load_state_dict(state.selection)
        self.result = TrainResult(**state.result)
        self.result.active_blocks = [
            (step, dict(zip(self.layers, map(tuple, blocks), strict=True)))
            for step, blocks in state.result["active_blocks"]
        ]


def _trainable(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in named_parameters(model) if p.requires_grad}


def _cross_entropy(label_smoothing: float) -> Criterion:
    return lambda logits, labels: F.cross_entropy(logits, labels, label_smoothing=label_smoothing)
