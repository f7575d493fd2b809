"""Checkpoints: a resumed run is the uninterrupted one, and what stands on disk is always whole."""

from __future__ import annotations

import dataclasses
import errno
import json
import os
import resource
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import slora.selection
from slora import CheckpointError, ConfigError, WriteError
from slora.layers import adapted_layers
from slora.runs import checkpoint_folders
from slora.training import TrainResult, TrainSettings, checkpoint_save, prepare, train
from slora.training.fingerprint import fingerprint
from slora.training.optimizers import Optimizers

Factory = Callable[[], nn.Module]
Pair = tuple[Tensor, Tensor]

# Gates spread around the threshold, so that blocks come and go during the few steps of these runs.
MOVING = {"gate_lr": 0.4, "penalty": 0.4}
CHOOSING = {"selection_warmup": 0.0}
TRAINING = {"lr": 0.05, "lora_dropout": 0.1, "blocks": 4}
SPREAD = TRAINING | CHOOSING | MOVING


def started(make_model: Factory, settings: TrainSettings) -> nn.Module:
    torch.manual_seed(11)
    model = prepare(make_model(), settings=settings)
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.lora_B.normal_(std=0.3)
            if settings.method == "selective":
                layer.gate.copy_(torch.linspace(0.05, 0.25, layer.blocks))
    return model


def state_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


# An epoch has 8 steps: in the first, where blocks are still chosen, and in the second.
@pytest.mark.parametrize(
    ("changes", "at"),
    [
        ({"inactive": "probe"}, 4),
        ({"inactive": "probe"}, 11),
        ({"inactive": "exact", "gate_rule": "sgd"}, 4),
        ({"inactive": "frozen"}, 4),
        ({"inactive": "frozen"}, 11),
        ({"inactive": "frozen", "gate_rule": "sgd", "optimizer": "sgd"}, 11),
        ({"inactive": "probe", "gradient_accumulation": 2, "batch_size": 4}, 11),
        ({"budget": 3}, 4),
        ({"budget": 3}, 11),
        ({"budget": 0.25, "budget_unit": "parameters", "ranking": "norm", "inactive": "frozen"}, 4),
        ({"budget": 0.25, "budget_unit": "parameters", "ranking": "norm", "inactive": "frozen"}, 11),
        ({"budget": 0.5, "budget_unit": "flops", "gradient_accumulation": 2, "batch_size": 4}, 4),
        ({"strategy": "sensitivity", "budget": 3}, 4),
        ({"strategy": "sensitivity", "budget": 0.5, "budget_unit": "flops", "inactive": "frozen"}, 11),
        ({"strategy": "random", "budget": 0.4, "budget_unit": "parameters"}, 4),
        ({"strategy": "first", "budget": 2, "inactive": "frozen"}, 11),
        ({"strategy": "last", "budget": 2, "gradient_accumulation": 2, "batch_size": 4}, 4),
        ({"strategy": "all"}, 11),
        ({"method": "lora"}, 11),
        ({"method": "full", "optimizer": "sgd"}, 4),
        ({"method": "linear"}, 11),
    ],
    ids=lambda value: "-".join(map(str, value.values())) if isinstance(value, dict) else str(value),
)
def test_a_resumed_run_ends_bit_for_bit_where_the_uninterrupted_one_ends(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path, changes: dict[str, Any], at: int
) -> None:
    spread = TRAINING if "strategy" in changes else TRAINING | CHOOSING if "budget" in changes else SPREAD
    settings = settings.replace(**(spread | {"max_steps": 19, "save_every": at, "keep_last": 9} | changes))
    whole = started(make_model, settings)
    full = train(whole, data, data, settings, tmp_path / "whole")
    again = started(make_model, settings)
    torch.manual_seed(99)
    resumed = train(
        again, data, data, settings, tmp_path / "resumed", resume=tmp_path / f"whole/checkpoints/step-{at:08d}"
    )
    assert same(state_of(whole), state_of(again))
    assert resumed.active_blocks == full.active_blocks
    assert (resumed.accuracy, resumed.best_accuracy, resumed.steps) == (full.accuracy, full.best_accuracy, 19)
    last = [load_file(tmp_path / run / "checkpoints/step-00000019/tensors.safetensors") for run in ("whole", "resumed")]
    assert same(*last)
    if settings.method == "selective" and settings.strategy is None:
        # Otherwise nothing of the selection was put to the test.
        assert len({sum(map(len, blocks.values())) for _, blocks in full.active_blocks}) > 1


def test_a_frozen_run_with_freed_blocks_is_resumed_with_them_freed(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path
) -> None:
    settings = settings.replace(**SPREAD, inactive="frozen", save_every=6, keep_last=9)
    model = started(make_model, settings)
    with torch.no_grad():
        model.get_submodule("second").gate.fill_(0.0)  # type: ignore[union-attr,operator]
    train(model, data, None, settings, tmp_path / "whole")
    again = started(make_model, settings)
    train(again, data, None, settings, tmp_path / "more", resume=tmp_path / "whole/checkpoints/step-00000006")
    freed = [name for name, layer in adapted_layers(again) if layer.released]
    assert "second" in freed
    assert freed == [name for name, layer in adapted_layers(model) if layer.released]
    assert same(state_of(model), state_of(again))


def test_a_checkpoint_is_safetensors_and_json_and_holds_no_frozen_weight(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path
) -> None:
    train(started(make_model, settings), data, None, settings, tmp_path)
    folder = checkpoint_folders.newest(tmp_path)
    assert sorted(path.name for path in folder.iterdir()) == ["sha256sums.txt", "state.json", "tensors.safetensors"]
    json.loads((folder / "state.json").read_text())
    names = {
        key.removeprefix("model.") for key in load_file(folder / "tensors.safetensors") if key.startswith("model.")
    }
    assert names == {
        *(f"{layer}.{part}" for layer in ("first", "second", "third") for part in ("lora_A", "lora_B", "gate")),
        "head.weight",
        "head.bias",
    }


def test_the_last_checkpoints_and_the_most_accurate_are_kept(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path
) -> None:
    settings = settings.replace(max_steps=10, save_every=1, eval_every=1, keep_last=2, method="full", lr=0.3)
    result = train(started(make_model, settings), data, data, settings, tmp_path)
    kept = {int(path.name.removeprefix("step-")) for path in checkpoint_folders.checkpoints(tmp_path / "checkpoints")}
    assert kept == {9, 10, result.best_step}
    assert all(not path.name.startswith(".") for path in (tmp_path / "checkpoints").iterdir())


def saved_once(
    make_model: Factory, data: Pair, settings: TrainSettings, folder: Path
) -> tuple[Path, Callable[[int], Path]]:
    """A run with one checkpoint at step 12, and a function that writes another at a later step."""
    model = started(make_model, settings)
    train(model, data, None, settings, folder)
    identity = fingerprint(model)
    optimizers = Optimizers(model, settings)
    selection = slora.selection.Gates(model, 16)

    def save(step: int) -> Path:
        state = selection.state_dict() | {"taken": step}
        progress = {"step": step, "steps": 16, "processes": 1, "selection": state}
        progress["result"] = dataclasses.asdict(TrainResult())
        longer = settings.replace(max_steps=16)
        return checkpoint_save.save_checkpoint(folder / "checkpoints", model, optimizers, longer, identity, progress)

    return checkpoint_folders.newest(folder), save


@pytest.mark.parametrize("stage", ["first tensors", "tensors", "flushes", "rename", "removal"])
def test_a_process_killed_while_it_writes_leaves_the_last_good_checkpoint(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path, stage: str
) -> None:
    settings = settings.replace(keep_last=1)
    good, save = saved_once(make_model, data, settings, tmp_path)
    before = {path.name: path.read_bytes() for path in good.iterdir()}
    child = os.fork()
    if child == 0:
        # Not monkeypatch: this process ends without a word, as a killed one does.
        def die(*args: Any, **kwargs: Any) -> Any:
            if stage == "first tensors":
                Path(args[1]).write_bytes(b"half a fi")
            os._exit(9)

        if stage == "first tensors":
            checkpoint_save.save_file = die  # type: ignore[attr-defined]
        elif stage == "tensors":
            Path.write_text = die  # type: ignore[method-assign]
        elif stage == "flushes":
            os.fsync = die
        elif stage == "rename":
            os.replace = die
        else:
            checkpoint_save.shutil.rmtree = die  # type: ignore[attr-defined]
        save(13)
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    newest = checkpoint_folders.newest(tmp_path)
    if stage == "removal":
        assert newest.name == "step-00000013"
    else:
        assert newest == good
        assert {path.name: path.read_bytes() for path in good.iterdir()} == before
    settings = settings.replace(max_steps=16)
    model = started(make_model, settings)
    assert train(model, data, None, settings, tmp_path, resume=newest).steps == 16
    assert all(path.name.startswith("step-") for path in (tmp_path / "checkpoints").iterdir())


@pytest.mark.parametrize("where", ["tensors", "state", "flush"])
def test_a_full_disk_is_named_with_the_remedy_and_the_last_good_checkpoint_stays(
    make_model: Factory,
    data: Pair,
    settings: TrainSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    where: str,
) -> None:
    good, save = saved_once(make_model, data, settings, tmp_path)

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    target = {"tensors": (checkpoint_save, "save_file"), "state": (Path, "write_text"), "flush": (os, "fsync")}[where]
    monkeypatch.setattr(*target, full)
    with pytest.raises(CheckpointError) as caught:
        save(13)
    monkeypatch.undo()
    for text in (
        "step-00000013 could not be written",
        "No space left on device",
        str(good),
        "free space or choose another",
    ):
        assert text in str(caught.value)
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step-00000008", good.name]
    assert save(13).name == "step-00000013"


def test_the_first_checkpoint_that_does_not_fit_says_to_start_again(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(checkpoint_save, "save_file", full)
    with pytest.raises(WriteError, match=r"then start the run again\. No checkpoint was written before it\."):
        train(prepare(make_model(), settings=settings), data, None, settings, tmp_path)


@pytest.mark.parametrize(("mask", "file", "folder"), [(0o022, 0o644, 0o755), (0o077, 0o600, 0o700)])
def test_a_checkpoint_has_the_permissions_that_the_umask_asks_for(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path, mask: int, file: int, folder: int
) -> None:
    before = os.umask(mask)
    try:
        train(prepare(make_model(), settings=settings), data, None, settings.replace(max_steps=1), tmp_path / "run")
    finally:
        os.umask(before)
    modes = {path.name: stat.S_IMODE(path.stat().st_mode) for path in (tmp_path / "run").rglob("*")}
    assert set(modes) >= {"tensors.safetensors", "state.json", "metrics.jsonl"}
    for name, mode in modes.items():
        assert mode == (file if "." in name else folder), name


def test_a_real_limit_on_the_size_of_files_is_reported_as_a_full_disk_is(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path
) -> None:
    good, save = saved_once(make_model, data, settings, tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(WriteError, match=r"step-00000013 could not be written .*; free space or choose another"):
            save(13)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert checkpoint_folders.newest(tmp_path) == good


class Wider(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(16, 25), nn.Linear(25, 4)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.first(images.flatten(1)))


def test_a_checkpoint_of_another_model_is_refused_by_name_and_changes_nothing(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path
) -> None:
    train(started(make_model, settings), data, None, settings, tmp_path)
    folder = checkpoint_folders.newest(tmp_path)

    def resumed(model: nn.Module, settings: TrainSettings = settings) -> None:
        before = state_of(model)
        try:
            train(model, data, None, settings, resume=folder)
        finally:
            assert same(before, state_of(model))

    with pytest.raises(CheckpointError, match="is of a TinyNet, this model is a Wider"):
        resumed(prepare(Wider(), settings=settings))
    other = make_model()
    other.head = nn.Linear(16, 5)
    with pytest.raises(
        CheckpointError, match=r"another TinyNet: 'head.weight' has shape \[4, 16\] there and \[5, 16\]"
    ):
        resumed(prepare(other, settings=settings))
    other = make_model()
    with torch.no_grad():
        other.get_parameter("second.weight").add_(1.0)
    with pytest.raises(CheckpointError, match="other frozen weights than this TinyNet has"):
        resumed(prepare(other, settings=settings))
    other = prepare(make_model(), settings=settings)
    other.get_parameter("norm.weight").requires_grad_(True)
    with pytest.raises(CheckpointError, match=r"'norm.weight' is trainable only here"):
        resumed(other)
    narrow = settings.replace(r=1)
    with pytest.raises(CheckpointError, match=r"'first\.lora_A' has shape"):
        resumed(prepare(make_model(), settings=narrow), narrow)
    with pytest.raises(CheckpointError, match=r"was written with batch_size=8, this run has 4; resume with the first"):
        resumed(started(make_model, settings), settings.replace(batch_size=4))


@pytest.mark.parametrize("name", ["tensors.safetensors", "state.json"])
@pytest.mark.parametrize("damage", ["missing", "cut short", "emptied"])
def test_a_damaged_checkpoint_is_named(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path, name: str, damage: str
) -> None:
    train(started(make_model, settings), data, None, settings, tmp_path)
    path = checkpoint_folders.newest(tmp_path) / name
    content = path.read_bytes()
    path.unlink()
    if damage != "missing":
        path.write_bytes(content[: len(content) // 2] if damage == "cut short" else b"")
    with pytest.raises(CheckpointError, match=name):
        train(started(make_model, settings), data, None, settings, resume=path.parent)


def test_a_run_directory_with_later_checkpoints_is_not_written_into(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path
) -> None:
    settings = settings.replace(save_every=4, keep_last=9)
    train(started(make_model, settings), data, None, settings, tmp_path)
    metrics = (tmp_path / "metrics.jsonl").read_bytes()
    for start in (None, tmp_path / "checkpoints/step-00000004"):
        with pytest.raises(ConfigError, match=r"already holds step-00000012; resume from that, or choose another"):
            train(started(make_model, settings), data, None, settings, tmp_path, resume=start)
    assert (tmp_path / "metrics.jsonl").read_bytes() == metrics


def test_a_folder_without_checkpoints_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="holds no checkpoint; give a run directory"):
        checkpoint_folders.newest(tmp_path)
