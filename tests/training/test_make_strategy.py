"""Which strategy settings ask for, and what its ranking is measured on."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slora
from slora import ConfigError, StateError
from slora.gates.values import gates
from slora.layers import adapted_layers
from slora.models.features import final_features
from slora.selection import All, Budget, First, Gates, Last, Random, Sensitivity, SoloGain, update_norm
from slora.sources.batches import make_batches
from slora.training import TrainSettings, prepare, train
from slora.training.head_first import train_head
from slora.training.make_strategy import Given, first_images, strategy

Factory = Callable[[], nn.Module]
Pair = tuple[Tensor, Tensor]


def made(model: nn.Module, settings: TrainSettings, data: Pair, retains: bool = False) -> Any:
    def sample(count: int) -> Pair:
        return data[0][:count], data[1][:count]

    return strategy(Given(model, 10, settings, sample, F.cross_entropy, contextlib.nullcontext, retains))


@pytest.mark.parametrize("price", [0.0, 0.5, 1.5])
def test_drift_has_the_price_that_is_set(
    make_model: Factory, data: Pair, settings: TrainSettings, price: float
) -> None:
    settings = settings.replace(budget=2, drift_price=price)
    made_of = made(prepare(make_model(), settings=settings), settings, data)
    assert isinstance(made_of, Budget)
    assert isinstance(made_of.ranking, SoloGain)
    assert made_of.ranking.price == price
    assert (made_of.ranking.features is None) == (price == 0)


@pytest.mark.parametrize(("retains", "drift", "depth"), [(False, 0.0, 0.75), (True, 0.5, 0.0)])
def test_depth_has_its_price_where_nothing_holds_the_features_and_drift_where_something_does(
    make_model: Factory, data: Pair, settings: TrainSettings, retains: bool, drift: float, depth: float
) -> None:
    settings = settings.replace(budget=2)
    ranking = made(prepare(make_model(), settings=settings), settings, data, retains).ranking
    assert (ranking.price, ranking.depth_price) == (drift, depth)
    settings = settings.replace(drift_price=1.5, depth_price=0.25)
    ranking = made(prepare(make_model(), settings=settings), settings, data, retains).ranking
    assert (ranking.price, ranking.depth_price) == (1.5, 0.25)


def test_drift_is_measured_on_the_retained_samples_where_that_is_asked_for(
    make_model: Factory, data: Pair, settings: TrainSettings
) -> None:
    settings = settings.replace(budget=2, drift_data="retained")
    model = prepare(make_model(), settings=settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.3)

    def ranking(settings: TrainSettings, retain: Tensor | None) -> Any:
        chosen: Any = strategy(
            Given(model, 10, settings, lambda n: (data[0][:n], data[1][:n]), F.cross_entropy, contextlib.nullcontext,
                  retain=retain)
        )  # fmt: skip
        slora.freeze_gates(model)
        return chosen.ranking

    on_old = ranking(settings, data[0][40:])
    assert (on_old.price, on_old.depth_price) == (0.5, 0.0)
    features = final_features(model.eval())
    assert torch.equal(on_old.features(), features(data[0][40:]))
    assert torch.equal(ranking(settings.replace(drift_data="generic", drift_price=1.0), data[0][40:]).features(),
                       ranking(settings.replace(drift_data="generic", drift_price=1.0), None).features())  # fmt: skip
    with pytest.raises(ConfigError, match="drift_data='retained' needs retained samples"):
        ranking(settings, None)


def test_a_ranking_changes_nothing_of_the_model(make_model: Factory, data: Pair, settings: TrainSettings) -> None:
    settings = settings.replace(budget=2)
    model = prepare(make_model(), settings=settings)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("lora_B"):
                parameter.normal_(std=0.3)
    made_of = made(model.train(), settings, data)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    scores = made_of.ranking(model)
    assert scores.shape == (3,)
    assert torch.equal(scores, made_of.ranking(model))
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    assert model.training


def test_norm_and_gates_are_there_too(make_model: Factory, data: Pair, settings: TrainSettings) -> None:
    by_norm = settings.replace(budget=0.5, ranking="norm", selection_warmup=0.2)
    made_of = made(prepare(make_model(), settings=by_norm), by_norm, data)
    assert made_of.ranking is update_norm
    assert (made_of.first, made_of.last, made_of.budget) == (2, 4, 0.5)
    assert isinstance(made(prepare(make_model(), settings=settings), settings, data), Gates)
    lora = settings.replace(method="lora")
    assert made(prepare(make_model(), settings=lora), lora, data) is None


def test_a_budget_above_the_blocks_of_the_model_is_refused_before_anything_is_trained(
    make_model: Factory, data: Pair, settings: TrainSettings
) -> None:
    model = prepare(make_model(), settings=settings)
    before = model.get_parameter("head.weight").clone()
    with pytest.raises(ConfigError, match="budget=4 blocks is out of range; use 0 to 3"):
        train(model, data, None, settings.replace(budget=4, head_first=5))
    assert torch.equal(before, model.get_parameter("head.weight"))


@pytest.mark.parametrize("budget", [0, 1, 3, 0.5])
def test_a_run_ends_with_its_budget_and_counts_what_ranking_costs(
    make_model: Factory, data: Pair, settings: TrainSettings, budget: float
) -> None:
    settings = settings.replace(budget=budget, log_every=1, count_flops=True)
    result = train(prepare(make_model(), settings=settings), data, None, settings)
    counts = [record["active"] for record in result.history]
    assert counts[-1] == {0: 0, 1: 1, 3: 3, 0.5: 2}[budget]
    # All up to the warm-up of 0.3 * 12 steps, the choice by step 12 - 8.
    assert counts[:3] == [3] * 3
    assert set(counts[3:]) == {counts[-1]}
    steps = [b["flops"] - a["flops"] for a, b in zip(result.history, result.history[1:], strict=False)]
    if budget not in (0, 3):
        # Step 4 ends with the gains: 4 forward passes over 64 images, where a step takes 8.
        assert steps[2] > 4 * steps[0]


def test_a_price_needs_final_features(data: Pair, settings: TrainSettings) -> None:
    settings = settings.replace(budget=1, modules_to_save=[], drift_price=0.5)
    model = prepare(nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.Linear(8, 4)), settings=settings)
    with pytest.raises(ConfigError, match=r"drift_price=0.5: Sequential has neither .*; or set drift_price to 0"):
        train(model, data, None, settings)
    slora.freeze_gates(model)
    train(model, data, None, settings.replace(drift_price=0.0))


def test_a_choice_that_is_made_stands_without_a_budget(
    make_model: Factory, data: Pair, settings: TrainSettings
) -> None:
    model = prepare(make_model(), settings=settings)
    slora.keep_blocks(model, 1)
    before = slora.active_blocks(model)
    train(model, data, None, settings.replace(penalty=100.0, gate_lr=1.0))
    assert all(torch.equal(on, before[name]) for name, on in slora.active_blocks(model).items())


def test_a_run_that_breaks_off_leaves_the_way_free_for_the_next(
    make_model: Factory, data: Pair, settings: TrainSettings
) -> None:
    settings = settings.replace(budget=1)
    model = prepare(make_model(), settings=settings)
    steps = []

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        steps.append(1)
        if len(steps) == 5:
            raise KeyboardInterrupt
        return F.cross_entropy(logits, labels)

    with pytest.raises(KeyboardInterrupt):
        train(model, data, None, settings, criterion=criterion)
    train(model, data, None, settings)
    assert sum(int(on.sum()) for on in slora.active_blocks(model).values()) == 1


@pytest.mark.parametrize(
    ("name", "kind"),
    [("sensitivity", Sensitivity), ("random", Random), ("first", First), ("last", Last), ("all", All)],
)
def test_a_strategy_that_is_named_chooses_before_the_first_step(
    make_model: Factory, data: Pair, settings: TrainSettings, name: Any, kind: type
) -> None:
    settings = settings.replace(strategy=name, budget=None if name == "all" else 2, seed=5, log_every=1)
    model = prepare(make_model(), settings=settings)
    chosen = made(model, settings, data)
    assert type(chosen) is kind
    assert (chosen.first, chosen.last) == (0, 0)
    assert chosen.begun == (name == "all")
    assert getattr(chosen, "seed", 5) == 5
    slora.freeze_gates(model)
    result = train(model, data, None, settings)
    left = 3 if name == "all" else 2
    assert [record["active"] for record in result.history] == [left] * 12
    assert [step for step, _ in result.active_blocks] == [0]
    trained = [bool(B.any()) for _, layer in adapted_layers(model) for B in layer.lora_B]
    assert trained == torch.cat(list(slora.active_blocks(model).values())).tolist()


def test_sensitivities_are_measured_on_the_trained_head_and_their_cost_counts(
    make_model: Factory, data: Pair, settings: TrainSettings
) -> None:
    def fresh() -> nn.Module:
        model = prepare(make_model(), settings=settings)
        with torch.no_grad():
            model.get_parameter("head.weight").zero_()
        return model

    settings = settings.replace(strategy="sensitivity", budget=1)
    model = fresh()
    with pytest.raises(StateError, match="the gradient of every base weight is zero: train the head first"):
        train(model, data, None, settings)
    # The next run may choose by gates.
    assert all(gate.requires_grad for gate in gates(model))
    settings = settings.replace(head_first=20, count_flops=True, max_steps=1)
    model = fresh()
    result = train(model, data, None, settings)
    other = fresh()
    train_head(other, make_batches(data, 8, torch.device("cpu"), seed=settings.seed).epoch(0), 20, F.cross_entropy)
    images, labels = first_images(make_batches(data, 8, torch.device("cpu"), seed=settings.seed).epoch(0), 64)
    batches = zip(images.split(32), labels.split(32), strict=True)
    Sensitivity(other, 1, 1, batches=batches, loss=lambda x, y: F.cross_entropy(other(x), y))
    assert all(torch.equal(on, slora.active_blocks(model)[name]) for name, on in slora.active_blocks(other).items())
    first = train(fresh(), data, None, settings.replace(strategy="last"))
    # All 64 images, forward and backward with the gradients of the weights, beside one step on 8.
    assert result.flops > 5 * first.flops


def test_sensitivity_has_a_price_on_depth_only_if_it_is_set(
    make_model: Factory, data: Pair, settings: TrainSettings
) -> None:
    for price, expected in ((None, 0.0), (0.75, 0.75)):
        settings = settings.replace(strategy="sensitivity", budget=1, depth_price=price)
        assert made(prepare(make_model(), settings=settings), settings, data).depth_price == expected


def test_gates_are_what_chooses_under_their_own_name_too(
    make_model: Factory, data: Pair, settings: TrainSettings
) -> None:
    settings = settings.replace(strategy="gates")
    assert isinstance(made(prepare(make_model(), settings=settings), settings, data), Gates)
    settings = settings.replace(strategy="budget", budget=0.5)
    assert isinstance(made(prepare(make_model(), settings=settings), settings, data), Budget)


@pytest.mark.parametrize("name", ["budget", "sensitivity", "random", "first", "last"])
def test_a_share_too_small_for_the_model_is_refused_before_the_head_is_trained(
    make_model: Factory, data: Pair, settings: TrainSettings, name: Any
) -> None:
    model = prepare(make_model(), settings=settings)
    before = model.get_parameter("head.weight").clone()
    for unit in ("blocks", "parameters", "flops"):
        small = settings.replace(strategy=name, budget=0.01, budget_unit=unit, head_first=5)
        with pytest.raises(ConfigError, match="the smallest share that keeps one is"):
            train(model, data, None, small)
    assert torch.equal(before, model.get_parameter("head.weight"))
    assert all(gate.requires_grad for gate in gates(model))


def test_a_sample_is_what_a_pass_begins_with(data: Pair) -> None:
    read = []

    def batches() -> Iterator[Pair]:
        for i in range(0, 64, 8):
            read.append(i)
            yield data[0][i : i + 8], data[1][i : i + 8]

    images, labels = first_images(batches(), 20)
    assert torch.equal(images, data[0][:20])
    assert torch.equal(labels, data[1][:20])
    assert read == [0, 8, 16]
    assert len(first_images(batches(), 1000)[0]) == 64
