"""Runs with rank-wise strategies: resumed bit for bit, loaded from checkpoints, and undone where they fail to start."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import slora
from slora import CheckpointError, ConfigError
from slora.layers import adapted_layers
from slora.runs.checkpoint_state import DIGESTS, STATE, TENSORS, digests_of
from slora.training import TrainSettings, prepare, train
from slora.training.run_model import load_result

Factory = Callable[[], nn.Module]
Pair = tuple[Tensor, Tensor]
NAMES = ["sora", "codyra", "increlora", "adalora"]


def started(make_model: Factory, settings: TrainSettings) -> nn.Module:
    torch.manual_seed(11)
    return prepare(make_model(), settings=settings)


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def ranks(model: nn.Module) -> list[list[int]]:
    return [layer.block_ranks() for _, layer in adapted_layers(model)]


# In the warm-up, in the selection, at its end, and while what is left trains on.
@pytest.mark.parametrize("at", [1, 4, 8, 10])
@pytest.mark.parametrize("name", NAMES)
def test_a_resumed_run_ends_bit_for_bit_where_the_uninterrupted_one_ends(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path, name: str, at: int
) -> None:
    settings = settings.replace(
        strategy=name, budget=5, blocks=4, lr=0.05, lora_dropout=0.1, save_every=at, keep_last=20, selection_warmup=0.2,
        settling=0.4, max_steps=14,
    )  # fmt: skip
    whole = started(make_model, settings)
    train(whole, data, None, settings, tmp_path / "whole")
    assert sum(map(sum, ranks(whole))) == 5
    resumed = started(make_model, settings)
    train(resumed, data, None, settings, tmp_path / "resumed", resume=tmp_path / f"whole/checkpoints/step-{at:08d}")
    assert ranks(resumed) == ranks(whole)
    assert same(resumed.state_dict(), whole.state_dict())


def test_a_run_with_blocks_freed_and_gradients_accumulated_is_resumed_too(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path
) -> None:
    settings = settings.replace(
        strategy="adalora", budget=0.2, inactive="frozen", gradient_accumulation=2, batch_size=4, save_every=10,
        keep_last=9, lr=0.05,
    )  # fmt: skip
    whole = started(make_model, settings)
    train(whole, data, None, settings, tmp_path / "whole")
    assert any(layer.released for _, layer in adapted_layers(whole))
    resumed = started(make_model, settings)
    train(resumed, data, None, settings, tmp_path / "resumed", resume=tmp_path / "whole/checkpoints/step-00000010")
    assert same(resumed.state_dict(), whole.state_dict())
    slora.save_adapter(whole, tmp_path / "adapter")
    loaded = slora.load_adapter(make_model(), tmp_path / "adapter")
    assert ranks(loaded) == ranks(whole)


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("at", [2, 12])
def test_a_checkpoint_is_loaded_without_the_strategy(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path, name: str, at: int
) -> None:
    settings = settings.replace(strategy=name, budget=3, lr=0.05, save_every=2, keep_last=9)
    model = started(make_model, settings)
    train(model, data, None, settings, tmp_path)
    folder = tmp_path / f"checkpoints/step-{at:08d}"
    loaded = load_result(make_model(), settings, tmp_path, folder)
    values = load_file(folder / TENSORS)
    x = data[0]
    first: Any = loaded.get_submodule("first")
    B = values["model.first.lora_B"][0] * values["model.first.rank_gate"][0]
    # lora_alpha / r = 2
    on = float(values["model.first.gate"] >= 0.1)
    weight = first.weight + on * 2.0 * B @ values["model.first.lora_A"][0]
    torch.testing.assert_close(first(x.flatten(1)), x.flatten(1) @ weight.T + first.bias, rtol=1e-4, atol=1e-5)
    if at == 12:
        # The checkpoint of the last step is the result of the run.
        assert ranks(loaded) == ranks(model)
        torch.testing.assert_close(loaded.eval()(x), model.eval()(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_fails_before_its_first_step_leaves_the_model_as_it_was(
    make_model: Factory, data: Pair, settings: TrainSettings, name: str
) -> None:
    settings = settings.replace(strategy=name, budget=3)
    model = started(make_model, settings)
    before = {name: value.clone() for name, value in model.state_dict().items()}

    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(model, data, None, settings, accepted=stop)
    assert same(model.state_dict(), before)
    train(model, data, None, settings)
    assert sum(map(sum, ranks(model))) == 3


@pytest.mark.parametrize("name", ["sora", "codyra"])
def test_without_a_budget_the_threshold_decides(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path, name: str
) -> None:
    model = started(make_model, settings.replace(strategy=name))
    train(model, data, None, settings.replace(strategy=name), tmp_path)
    slora.save_adapter(model, tmp_path / "adapter")
    assert json.loads((tmp_path / "adapter/selective.json").read_text())["asked"] == name
    assert "plain LoRA" not in str(slora.summary(slora.load_adapter(make_model(), tmp_path / "adapter")))


def test_settings_that_do_not_fit_are_refused_by_name(make_model: Factory, data: Pair, settings: TrainSettings) -> None:
    with pytest.raises(ConfigError, match="strategy='adalora' needs a budget"):
        settings.replace(strategy="adalora")
    with pytest.raises(ConfigError, match="budget_unit='blocks' is not of strategy='sora'; use 'ranks'"):
        settings.replace(strategy="sora", budget=3, budget_unit="blocks")
    with pytest.raises(ConfigError, match=r"penalty=0\.5 has no effect on strategy='sora'"):
        settings.replace(strategy="sora", penalty=0.5)
    assert settings.replace(strategy="increlora", budget=0.3).unit == "ranks"
    model = started(make_model, settings)
    with pytest.raises(ConfigError, match="budget=99 ranks is out of range; use 0 to 6"):
        train(model, data, None, settings.replace(strategy="sora", budget=99))


def test_a_checkpoint_without_what_the_strategy_has_smoothed_is_damaged(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path
) -> None:
    settings = settings.replace(strategy="adalora", budget=3, save_every=4)
    train(started(make_model, settings), data, None, settings, tmp_path)
    folder = tmp_path / "checkpoints/step-00000008"
    tensors = load_file(folder / TENSORS)
    del tensors["selection.mean.first.P"]
    save_file(tensors, folder / TENSORS)
    (folder / DIGESTS).write_text(digests_of(folder / TENSORS, folder / STATE))
    with pytest.raises(CheckpointError, match="damaged: 'tensors' is"):
        train(started(make_model, settings), data, None, settings, resume=folder)
