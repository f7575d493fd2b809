"""Learning rates over the run, and the gates' own rule."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import nn

import slora
from slora.training import TrainSettings, prepare
from slora.training.optimizers import Optimizers
from slora.training.schedule import lr_scale


@pytest.mark.parametrize("floor", [0.0, 0.1])
def test_the_schedule_is_a_linear_warm_up_and_then_half_a_cosine(floor: float) -> None:
    steps, warmup = 100, 20
    for step in range(warmup):
        assert lr_scale(step, steps, warmup, floor) == pytest.approx((step + 1) / 20)
    for step in range(warmup, steps):
        cosine = math.cos(math.pi * (step - 20) / 80)
        assert lr_scale(step, steps, warmup, floor) == pytest.approx(floor + (1 - floor) * (1 + cosine) / 2)
    assert lr_scale(steps, steps, warmup, floor) == pytest.approx(floor)


def test_without_warm_up_the_schedule_starts_at_the_top() -> None:
    assert lr_scale(0, 10, 0) == 1.0
    assert lr_scale(5, 10, 0) == pytest.approx(0.5)


def test_a_run_that_is_all_warm_up_has_a_schedule() -> None:
    assert [lr_scale(step, 4, 4) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]


def test_the_proximal_rule_gives_the_gates_an_optimizer_of_their_own(make_model: Callable[[], nn.Module]) -> None:
    settings = TrainSettings(r=2, gate_lr=0.5, lr=0.25)
    optimizers = Optimizers(prepare(make_model(), settings=settings), settings)
    assert isinstance(optimizers.gates, slora.ProximalGates)
    assert not optimizers.penalty_in_loss
    assert "gates" not in [group["name"] for group in optimizers.weights.param_groups]
    optimizers.set(0.5, penalty=3.0)
    assert {group["lr"] for group in optimizers.weights.param_groups} == {0.125}
    assert [(group["lr"], group["penalty"]) for group in optimizers.gates.param_groups] == [(0.5, 3.0)]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_the_sgd_rule_puts_the_gates_into_a_group_of_the_optimizer(
    make_model: Callable[[], nn.Module], optimizer: str
) -> None:
    settings = TrainSettings.from_dict({"r": 2, "gate_rule": "sgd", "gate_lr": 0.5, "optimizer": optimizer})
    optimizers = Optimizers(prepare(make_model(), settings=settings), settings)
    assert optimizers.gates is None
    assert optimizers.penalty_in_loss
    (group,) = [group for group in optimizers.weights.param_groups if group["name"] == "gates"]
    assert (group["lr"], group["weight_decay"], group["momentum"]) == (0.5, 0.0, 0.0)


@pytest.mark.parametrize("method", ["lora", "full", "linear"])
def test_methods_without_trained_gates_have_one_optimizer_and_no_penalty(
    make_model: Callable[[], nn.Module], method: str
) -> None:
    settings = TrainSettings.from_dict({"r": 2, "method": method})
    model = prepare(make_model(), settings=settings)
    optimizers = Optimizers(model, settings)
    assert len(optimizers.all) == 1
    assert not optimizers.penalty_in_loss
    weights, gates = optimizers.parameters()
    assert set(weights) == {parameter for parameter in model.parameters() if parameter.requires_grad}
    assert gates == []


def test_matrices_decay_and_biases_do_not(make_model: Callable[[], nn.Module]) -> None:
    settings = TrainSettings(method="full", weight_decay=0.3)
    model = prepare(make_model(), settings=settings)
    for group in Optimizers(model, settings).weights.param_groups:
        assert group["weight_decay"] == (0.3 if all(p.dim() > 1 for p in group["params"]) else 0.0)


def test_freeing_blocks_leaves_the_penalty_on_the_others_as_it_was(make_model: Callable[[], nn.Module]) -> None:
    settings = TrainSettings(r=2, inactive="frozen", gate_lr=1.0)
    model = prepare(make_model(), settings=settings)
    optimizers = Optimizers(model, settings)
    with torch.no_grad():
        model.get_submodule("first").gate.fill_(0.01)  # type: ignore[union-attr,operator]
    assert optimizers.release(model) > 0
    optimizers.set(1.0, penalty=0.06)
    for optimizer in optimizers.all:
        optimizer.step()
    # lr * penalty / blocks = 0.06 / 3, over all blocks and not only those that are left.
    assert model.get_submodule("second").gate.item() == pytest.approx(0.15 - 0.02)  # type: ignore[union-attr,operator]
