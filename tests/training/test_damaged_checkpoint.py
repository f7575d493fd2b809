"""A checkpoint that is not what a run wrote is refused, with model, optimizer and random generators as before."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from slora import CheckpointError, ConfigError, SLoRAError
from slora.layers import adapted_layers
from slora.runs import checkpoint_folders
from slora.runs.checkpoint_state import digests_of
from slora.training import TrainSettings, prepare, train
from slora.training.checkpoint_load import Checkpoint
from slora.training.fingerprint import fingerprint
from slora.training.optimizers import Optimizers

pytestmark = pytest.mark.once

Factory = Callable[[], nn.Module]
Pair = tuple[Tensor, Tensor]
Change = Callable[[dict[str, Any], dict[str, Tensor]], None]


def seal(folder: Path) -> None:
    """Let the digests fit what stands in a checkpoint, as one who forges it does."""
    digests = digests_of(folder / "tensors.safetensors", folder / "state.json")
    (folder / "sha256sums.txt").write_text(digests)


def forged(folder: Path, change: Change) -> None:
    state, tensors = json.loads((folder / "state.json").read_text()), load_file(folder / "tensors.safetensors")
    tensors = {name: value.clone() for name, value in tensors.items()}
    change(state, tensors)
    (folder / "state.json").write_text(json.dumps(state))
    save_file(tensors, folder / "tensors.safetensors")
    seal(folder)


def everything(model: nn.Module) -> list[Any]:
    """What a refused resume must leave as it was, bit for bit."""
    numpy = np.random.get_state(legacy=True)
    return [
        {name: value.clone() for name, value in model.state_dict().items()},
        {name: (parameter.requires_grad, parameter.grad) for name, parameter in model.named_parameters()},
        [
            (layer.gate_cache.step, layer.gate_cache.asked, layer.gate_cache.strategy)
            for _, layer in adapted_layers(model)
        ],
        random.getstate(),
        (numpy[0], numpy[1].tolist(), *numpy[2:]),  # type: ignore[index, union-attr]
        torch.get_rng_state(),
    ]


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return bool(a == b)


def put(key: str, value: Any) -> Change:
    """Set an entry of the state; `key` is a path such as "result/steps"."""

    def change(state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        *path, last = key.split("/")
        for part in path:
            state = state[part]
        state[last] = value

    return change


def tensor(key: str, new: Callable[[Tensor], Tensor]) -> Change:
    def change(state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        tensors[key] = new(tensors[key])

    return change


def without(key: str) -> Change:
    def change(state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
        del tensors[key]

    return change


def stateless(state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    for key in ("step", "exp_avg", "exp_avg_sq"):
        del tensors[f"optimizer.{A}.{key}"]


def free_second(state: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    state["freed"] = ["second"]
    for key in [key for key in tensors if "second.lora" in key]:
        del tensors[key]


A = "0.second.lora_A"
CHANGES: dict[str, tuple[Change, str]] = {
    "a state that is too small": (tensor(f"optimizer.{A}.exp_avg", lambda t: t.view(-1)[:1].clone()), "exp_avg"),
    "a state of another shape": (tensor(f"optimizer.{A}.exp_avg_sq", lambda t: t.mT.contiguous()), "exp_avg_sq"),
    "a state of another dtype": (tensor(f"optimizer.{A}.exp_avg", lambda t: t.half()), "float16, expected"),
    "a state of integers": (tensor(f"optimizer.{A}.step", lambda t: t.int()), "'step' of 'second.lora_A'"),
    "a state that is missing": (without(f"optimizer.{A}.exp_avg"), "'exp_avg' of 'second.lora_A' is missing"),
    "no state of a parameter": (
        stateless,
        "'step' of 'second.lora_A' is missing",
    ),
    "a state that no optimizer has": (
        lambda s, t: t.update({f"optimizer.{A}.max_exp_avg_sq": t[f"optimizer.{A}.exp_avg"].clone()}),
        "max_exp_avg_sq",
    ),
    "a state of another optimizer": (lambda s, t: t.update({f"optimizer.7.{A}": torch.zeros(1)}), "7.0.second"),
    "a NaN in a state": (tensor(f"optimizer.{A}.exp_avg", lambda t: t * float("nan")), "is not finite"),
    "a negative mean of squares": (tensor(f"optimizer.{A}.exp_avg_sq", lambda t: -t - 1), "is negative"),
    "more steps than the run": (tensor(f"optimizer.{A}.step", lambda t: t + 100), "is 112 after 12 steps"),
    "a NaN in a weight": (tensor("model.head.bias", lambda t: t + float("inf")), "'head.bias' is not finite"),
    "a NaN in a gate": (tensor("model.third.gate", lambda t: t * float("nan")), "'third.gate' is not finite"),
    "a NaN in a buffer": (tensor("buffer.norm.running_mean", lambda t: t * float("nan")), "running_mean' is not fin"),
    "a weight of another dtype": (tensor("model.head.bias", lambda t: t.double()), "float64"),
    "a weight that is missing": (without("model.third.lora_B"), "'third.lora_B' is missing"),
    "a weight without a place": (
        lambda s, t: t.update({"model.extra": torch.zeros(1)}),
        "'extra' is not in this model",
    ),
    "a tensor of no kind": (lambda s, t: t.update({"extra": torch.zeros(1)}), "'extra', which does not belong"),
    "no random state": (without("random.torch"), "torch"),
    "a short random state": (tensor("random.torch", lambda t: t[:-1]), "random generator 'torch'"),
    "a random state beyond its words": (
        tensor("random.torch", lambda t: torch.cat([t[:16], torch.tensor([111, 2] + [0] * 6).byte(), t[24:]])),
        "random generator 'torch'",
    ),
    "a random state of a GPU that is none": (
        lambda s, t: t.update({"random.cuda.0": torch.zeros(3, dtype=torch.uint8)}),
        "cuda.0",
    ),
    "words that are none": (tensor("random.python", lambda t: t + (1 << 32)), "'python'"),
    "a position beyond the words": (tensor("random.numpy", lambda t: torch.cat([t[:-1], t[:1] | 1024])), "'numpy'"),
    "a random state in halves": (tensor("random.numpy", lambda t: t.double()), "'numpy'"),
    "a random state of text": (put("random/numpy", "abc"), "is damaged"),
    "gates that never moved together": (put("gates_moved/second", 3), "'gates_moved'"),
    "a freed layer that is not frozen": (free_second, "'second' is not a layer that inactive='frozen'"),
    "a layer that is freed and there": (put("freed", ["second"]), "'second.lora_A' is not in this model"),
    "a negative step": (put("step", -4), "'step' is -4"),
    "a step beyond the end": (put("step", 1_000_000), "'step' is 1000000"),
    "another end": (lambda s, t: s.update(steps=10**6), "max_steps is 12"),
    "another step than the strategy": (put("selection/taken", 3), "'taken' of 'selection' is 3 at step 12 of 12"),
    "another end of the strategy": (put("selection/steps", True), "'steps' of 'selection' is true"),
    "no strategy": (put("selection", None), "no strategy"),
    "another end of the selection": (put("selection/last", 3), "'last' is 3"),
    "a strategy of text": (put("selection/last", "soon"), "'last' is 'soon'"),
    "a result that is none": (put("result/seconds", None), "'result' is"),
    "a best step to come": (lambda s, t: s["result"].update(best_step=99, best_accuracy=0.5), "'best_step' is 99"),
    "blocks that are not there": (put("result/active_blocks", [[12, [[0], [7], [0]]]]), "'active_blocks'"),
    "blocks of other layers": (put("result/active_blocks", [[12, [[0]]]]), "'active_blocks'"),
    "settings that are none": (put("settings", []), "'settings' is"),
    "a shape that is none": (put("model/shapes/head.bias", ["4"]), "'model' is"),
    "too much": (put("extra", 1), "it holds 'extra'"),
    "too little": (lambda s, t: s.pop("freed"), "'freed' is missing"),
}


@pytest.fixture
def written(make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path) -> Path:
    """A checkpoint of step 12."""
    torch.manual_seed(0)
    train(prepare(make_model(), settings=settings), data, data, settings, tmp_path / "run")
    return checkpoint_folders.newest(tmp_path / "run")


@pytest.mark.parametrize("name", CHANGES)
def test_what_cannot_be_of_this_run_is_refused_by_name_and_nothing_changes(
    make_model: Factory, data: Pair, settings: TrainSettings, written: Path, name: str
) -> None:
    change, named = CHANGES[name]
    forged(written, change)
    model = prepare(make_model(), settings=settings)
    before = everything(model)
    with pytest.raises(CheckpointError, match=named) as caught:
        train(model, data, None, settings, resume=written)
    assert len(str(caught.value)) < 600
    assert equal(before, everything(model))


@pytest.mark.parametrize("changes", [{"budget": 1}, {"budget": 0.4, "budget_unit": "flops"}], ids=["blocks", "flops"])
@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("ranks", [0, 0, 1]),
        ("ranks", [0, 1]),
        ("ranks", None),
        ("left", 9),
        ("left", "1"),
        ("left", 3),
        ("scores", [1.0]),
        ("scores", [None] * 3),
        ("rows", [8, 8]),
        ("rows", [-1, 8, 8]),
        ("last", -1),
        ("steps", None),
    ],
)
def test_a_budget_that_cannot_be_is_refused_and_nothing_changes(
    make_model: Factory,
    data: Pair,
    settings: TrainSettings,
    tmp_path: Path,
    key: str,
    value: Any,
    changes: dict[str, Any],
) -> None:
    settings = settings.replace(**changes, ranking="norm")
    train(prepare(make_model(), settings=settings), data, None, settings, tmp_path)
    forged(checkpoint_folders.newest(tmp_path), put(f"selection/{key}", value))
    model = prepare(make_model(), settings=settings)
    before = everything(model)
    with pytest.raises(CheckpointError, match=f"'{key}'"):
        train(model, data, None, settings, resume=checkpoint_folders.newest(tmp_path))
    assert equal(before, everything(model))


def test_a_refused_run_leaves_the_gates_to_the_next_one(
    make_model: Factory, data: Pair, settings: TrainSettings
) -> None:
    model = prepare(make_model(), settings=settings)
    before = everything(model)
    with pytest.raises(ConfigError):
        train(model, data, None, settings.replace(budget=99))
    assert equal(before, everything(model))


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
def test_a_bit_that_has_turned_over_is_found(
    make_model: Factory, data: Pair, settings: TrainSettings, written: Path, name: str
) -> None:
    content = bytearray((written / name).read_bytes())
    content[-20] ^= 1
    (written / name).write_bytes(content)
    with pytest.raises(CheckpointError, match=rf"{name} is damaged: its SHA-256 is not the one"):
        train(prepare(make_model(), settings=settings), data, None, settings, resume=written)


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json", "sha256sums.txt"])
def test_a_pipe_in_the_place_of_a_file_is_named(
    make_model: Factory, data: Pair, settings: TrainSettings, written: Path, name: str
) -> None:
    import os

    (written / name).unlink()
    os.mkfifo(written / name)
    with pytest.raises(CheckpointError, match=f"{name} is a pipe, expected a file"):
        train(prepare(make_model(), settings=settings), data, None, settings, resume=written)


@pytest.mark.parametrize(
    "changes", [{}, {"optimizer": "sgd"}, {"gate_rule": "sgd"}, {"method": "full"}, {"momentum": 0.0}], ids=str
)
def test_every_optimizer_of_a_run_takes_back_the_state_that_it_gave(
    make_model: Factory, data: Pair, settings: TrainSettings, changes: dict[str, Any]
) -> None:
    settings = settings.replace(**changes)
    model = prepare(make_model(), settings=settings)
    names: dict[Tensor, str] = {parameter: name for name, parameter in model.named_parameters()}
    optimizers = Optimizers(model, settings)
    assert optimizers.stateless(names) == (
        [] if settings.optimizer == "sgd" and not settings.momentum else [*names_of(optimizers, names)]
    )
    optimizers.check_state(names, {}, optimizers.stateless(names), 0)
    model(data[0]).sum().backward()
    for optimizer in optimizers.all:
        optimizer.step()
    state = optimizers.state(names)
    optimizers.check_state(names, state, optimizers.stateless(names), 1)
    for key in state:
        with pytest.raises(ValueError, match="is missing"):
            optimizers.check_state(names, {k: v for k, v in state.items() if k != key}, [], 1)


def names_of(optimizers: Optimizers, names: dict[Tensor, str]) -> list[str]:
    return [names[parameter] for group in optimizers.weights.param_groups for parameter in group["params"]]


def test_a_forged_checkpoint_is_refused_where_it_is_evaluated_too(
    make_model: Factory, settings: TrainSettings, written: Path
) -> None:
    forged(written, tensor("model.third.gate", lambda t: t * float("nan")))
    model = prepare(make_model(), settings=settings)
    before = everything(model)
    with pytest.raises(SLoRAError, match="third"):
        Checkpoint(written, model, settings, fingerprint(model)).restore()
    assert equal(before, everything(model))
