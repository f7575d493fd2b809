"""Checkpoints of a run, read where `slora.training.train` goes on from one."""

from __future__ import annotations

import copy
import hashlib
import json
import random
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load
from torch import Tensor, nn

import slora
from slora.layers import adapted_layers
from slora.runs.checkpoint_state import DIGESTS, STATE, TENSORS
from slora.training import TrainSettings, prepare, random_states, train
from slora.training.entry import unchanged_on_error
from slora.training.process import make_accelerator
from slora.training.trainer import Trainer
from tests.mutations.adapters import bits, differences, snapshot
from tests.mutations.generator import Files, read
from tests.mutations.trials import Kind

NAME = "step-00000004"
COMMON: dict[str, Any] = {
    "r": 1, "max_steps": 4, "batch_size": 4, "num_workers": 0, "device": "cpu", "precision": "fp32", "log_every": 4,
    "tensorboard": False, "count_flops": False, "head_first": 0, "progress": False,
}  # fmt: skip
# Gates that move, with a layer that is freed; and a budget, whose state is its ranks and scores.
GATES = TrainSettings(**COMMON, inactive="frozen", gate_rule="sgd", gate_lr=0.05, penalty=2.0, selection_warmup=0.0)
BUDGET = TrainSettings(**COMMON, budget=0.5, optimizer="sgd", blocks=2)


class Net(nn.Module):
    """Images [n, 1, 2, 2] to logits [n, 2], with a norm whose buffers a run changes."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Linear(4, 6)
        self.norm = nn.BatchNorm1d(6)
        self.second = nn.Linear(6, 4)
        self.head = nn.Linear(4, 2)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.second(self.norm(self.first(images.flatten(1))).relu()))


def data() -> tuple[Tensor, Tensor]:
    """Eight images."""
    images = torch.rand(8, 1, 2, 2, generator=torch.Generator().manual_seed(1))
    return images, (images[:, 0, 0, 0] > 0.5).long()


def fresh(settings: TrainSettings) -> nn.Module:
    """The same model at every call, ready for a run."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        model = prepare(Net(), settings=settings)
    if settings.budget is None:
        with torch.no_grad():
            model.get_parameter("second.gate").fill_(0.0)
    return model


def _files(settings: TrainSettings, seed: int) -> Files:
    randomness = random_states.present()
    try:
        random.seed(seed)
        np.random.seed(seed)
        with tempfile.TemporaryDirectory() as folder:
            train(fresh(settings), data(), data(), settings.replace(seed=seed), folder)
            files = read(Path(folder) / "checkpoints" / NAME)
    finally:
        randomness.restore()
    return files


def sealed(files: Files) -> Files:
    """Let the digests fit, where there are files for them."""
    if STATE not in files or TENSORS not in files:
        return files
    digests = [f"{hashlib.sha256(files[name]).hexdigest()}  {name}\n" for name in (TENSORS, STATE)]
    return {**files, DIGESTS: "".join(digests).encode()}


def gates() -> Kind:
    """Return checkpoints of a run without a budget as a kind of files."""
    return Kind(_files(GATES, 0), _files(GATES, 1), sealed, Attempt(GATES))


def budget() -> Kind:
    """Return checkpoints of a run with one."""
    return Kind(_files(BUDGET, 0), _files(BUDGET, 1), sealed, Attempt(BUDGET))


class Attempt:
    """Goes on from a checkpoint with a model that is used again as long as it stays as it was."""

    def __init__(self, settings: TrainSettings) -> None:
        self.settings = settings
        self.accelerator = make_accelerator(settings)
        self.data = data()
        self._start = fresh(settings)
        self._ready: nn.Module | None = None
        self._before: dict[str, Any] = {}

    def __call__(self, folder: Path) -> bool:
        """See `Kind.attempt`."""
        model, self._ready = self._ready, None
        if model is None:
            model = copy.deepcopy(self._start)
            self._before = snapshot(model)
        moved = [layer.gate_cache.step for _, layer in adapted_layers(model)]
        randomness = random_states.present()
        trainer = None
        try:
            with unchanged_on_error(model):
                trainer = Trainer(
                    self.accelerator, model, self.data, None, self.settings, None, None, folder, None, None, None
                )
        except slora.SLoRAError:
            changed = differences(self._before, snapshot(model))
            assert not changed, f"refused, but the model has another {changed}"
            assert moved == [layer.gate_cache.step for _, layer in adapted_layers(model)], "gates have moved"
            assert slora.selection.strategy.active_strategy(model) is None, "a strategy is active"
            assert _same(randomness, random_states.present()), "the random generators are others"
            self._ready = model
            return False
        try:
            check(trainer, folder)
            # A state of a wrong size or kind shows in a step at the latest.
            images, labels = self.data
            nn.functional.cross_entropy(model(images), labels).backward()
            for optimizer in trainer.optimizers.all:
                optimizer.step()
        finally:
            randomness.restore()
        return True


def _same(a: random_states.RandomStates, b: random_states.RandomStates) -> bool:
    one, two = a.tensors(), b.tensors()
    return a.values() == b.values() and all(torch.equal(one[name], two[name]) for name in one)


def check(trainer: Trainer, folder: Path) -> None:
    """Compare a run that goes on with what the files say, read here once more."""
    state = json.loads((folder / STATE).read_text())
    tensors = load((folder / TENSORS).read_bytes())
    model = trainer.model
    gone = {p for _, layer in adapted_layers(model) if layer.released for p in (layer.lora_A, layer.lora_B)}
    for name, parameter in model.named_parameters():
        saved = tensors.get(f"model.{name}")
        if parameter.requires_grad or name.endswith("gate"):
            assert saved is not None, name
        if saved is not None and parameter not in gone and trainer.settings.budget is None:
            assert torch.equal(parameter.detach(), saved), name
        assert parameter.isfinite().all(), name
    for name, buffer in model.named_buffers():
        assert torch.equal(bits(buffer), bits(tensors[f"buffer.{name}"])), name
        assert buffer.isfinite().all(), name
    names = {parameter: name for name, parameter in model.named_parameters()}
    for key, value in trainer.optimizers.state(names).items():
        assert torch.equal(value, tensors[f"optimizer.{key}"]), key
        assert value.isfinite().all(), key
    present = random_states.present()
    assert present.values() == state["random"], "the random generators"
    for key, value in present.tensors().items():
        assert torch.equal(value, tensors[f"random.{key}"]), f"the random generator {key!r}"
    assert trainer.step == trainer.schedule.steps == state["step"] == state["steps"], "the step"
    assert trainer.selection is not None
    for key, value in trainer.selection.state_dict().items():
        assert value == state["selection"][key], key
    result = vars(trainer.result) | {"active_blocks": state["result"]["active_blocks"]}
    assert result == state["result"], "the result"
    for name, layer in adapted_layers(model):
        active = [i for i, value in enumerate(layer.gate.tolist()) if value >= layer.threshold]
        assert active == list(layer.activity().active), f"active blocks of {name!r}"
