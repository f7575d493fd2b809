"""The four methods: what each trains."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import slora
from slora.layers import adapted_layers
from slora.training import TrainSettings, prepare
from slora.training.trainable import heads_of

LAYERS = ("first", "second", "third")
LORA = {f"{layer}.{part}" for layer in LAYERS for part in ("lora_A", "lora_B")}
GATES = {f"{layer}.gate" for layer in LAYERS}
HEAD = {"head.weight", "head.bias"}


def trainable(model: nn.Module) -> set[str]:
    return {name for name, parameter in model.named_parameters() if parameter.requires_grad}


@pytest.mark.parametrize(
    ("method", "expected"),
    [("selective", LORA | GATES | HEAD), ("lora", LORA | HEAD), ("linear", HEAD)],
)
def test_a_method_trains_its_parameters_and_no_others(
    make_model: Callable[[], nn.Module], method: Any, expected: set[str]
) -> None:
    assert trainable(prepare(make_model(), method, TrainSettings(r=2))) == expected


def test_full_fine_tuning_trains_everything(make_model: Callable[[], nn.Module]) -> None:
    model = make_model().requires_grad_(False)
    assert trainable(prepare(model, "full")) == {name for name, _ in model.named_parameters()}


def test_plain_lora_keeps_every_gate_at_one_and_every_block_active(make_model: Callable[[], nn.Module]) -> None:
    model = prepare(make_model(), "lora", TrainSettings(r=2))
    for _, layer in adapted_layers(model):
        assert layer.gate.tolist() == [1.0] * layer.blocks
        with torch.no_grad():
            layer.gate.fill_(-50.0)
    assert all(bool(active.all()) for active in slora.active_blocks(model).values())


def test_the_method_of_the_settings_is_the_default(make_model: Callable[[], nn.Module]) -> None:
    assert trainable(prepare(make_model(), settings=TrainSettings(r=2, method="linear"))) == HEAD


def test_other_modules_can_stand_for_the_head(make_model: Callable[[], nn.Module]) -> None:
    settings = TrainSettings(r=2, modules_to_save=["norm", "head"])
    expected = HEAD | {"norm.weight", "norm.bias"}
    assert trainable(prepare(make_model(), "linear", settings)) == expected
    assert trainable(prepare(make_model(), "selective", settings)) == LORA | GATES | expected


def test_single_parameters_are_trained_beside_the_head(make_model: Callable[[], nn.Module]) -> None:
    settings = TrainSettings(r=2, modules_to_save=["norm.weight", "head"])
    expected = HEAD | {"norm.weight"}
    assert trainable(prepare(make_model(), "linear", settings)) == expected
    assert trainable(prepare(make_model(), "selective", settings)) == LORA | GATES | expected


def test_a_linear_probe_without_a_head_is_refused_with_the_remedy() -> None:
    with pytest.raises(slora.ConfigError, match=r"Sequential has none .* name it in modules_to_save"):
        prepare(nn.Sequential(nn.Linear(4, 4)), "linear")


def test_an_unknown_method_is_refused(make_model: Callable[[], nn.Module]) -> None:
    method: Any = "adapter"
    with pytest.raises(slora.ConfigError, match="method='adapter' is unknown; use one of selective, lora"):
        prepare(make_model(), method)


def test_a_target_that_matches_nothing_is_refused_and_changes_nothing(make_model: Callable[[], nn.Module]) -> None:
    model = make_model()
    with pytest.raises(slora.TargetError, match=r"'secnd' matches no module; near names are 'second'"):
        prepare(model, "selective", TrainSettings(r=2, target_modules="secnd"))
    assert trainable(model) == {name for name, _ in model.named_parameters()}


def test_a_head_inside_another_is_counted_once() -> None:
    class Nested(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.head = nn.Sequential(nn.LayerNorm(4), nn.Linear(4, 2))

        def get_classifier(self) -> nn.Module:
            return self.head[1]

    assert heads_of(Nested()) == ("head",)
