"""What blocks are ranked by."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slora
from slora import ConfigError
from slora.gates.values import gates
from slora.layers import adapted_layers
from slora.selection import Budget, SoloGain, keep_blocks, update_norm
from slora.selection.solo_gain import depths
from tests.selection.stepping import Batch, Make, N, flags, run


def test_the_largest_updates_stay(make: Make) -> None:
    model = make(trained=True)
    products = [layer.lora_B[i] @ layer.lora_A[i] for _, layer in adapted_layers(model) for i in range(layer.blocks)]
    norms = torch.stack([layer_product.norm() for layer_product in products]) * (16 / 2)
    torch.testing.assert_close(update_norm(model), norms, rtol=1e-5, atol=1e-6)
    keep_blocks(model, 3)
    best = set(norms.topk(3).indices.tolist())
    assert {i for i, on in enumerate(flags(model)) if on} == best


def test_solo_gains_are_losses_saved_by_one_block_alone(make: Make, batch: Batch) -> None:
    model = make(trained=True).train()
    rank = SoloGain(lambda: F.cross_entropy(model(batch[0]), batch[1]), depth_price=0.0)
    before = [gate.clone() for gate in gates(model)]
    scores = rank(model)
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before, gates(model), strict=True))
    with slora.disabled(model):
        base = F.cross_entropy(model(batch[0]), batch[1])
    expected = []
    for number in range(N):
        alone = make(trained=True)
        alone.load_state_dict(model.state_dict())
        with torch.no_grad():
            at = 0
            for _, layer in adapted_layers(alone):
                for i in range(layer.blocks):
                    layer.gate[i] = 1.0 if at == number else -1.0
                    at += 1
        expected.append(base - F.cross_entropy(alone(batch[0]), batch[1]))
    torch.testing.assert_close(scores, torch.stack(expected).detach(), rtol=1e-4, atol=1e-5)


def test_a_price_on_drift_divides_the_gains(make: Make, batch: Batch) -> None:
    model = make(trained=True)
    loss = lambda: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    plain = SoloGain(loss)(model)
    priced = SoloGain(loss, features=lambda: model(batch[0]), price=1.0)(model)
    positive = plain > 0
    assert positive.any()
    assert torch.equal(plain[~positive], priced[~positive])
    ratio = plain[positive] / priced[positive]
    assert (ratio > 0).all()
    assert len(ratio.unique()) == len(ratio)


def test_a_score_that_is_not_a_number_ranks_last(make: Make, batch: Batch) -> None:
    model = make()
    selection = Budget(model, 5, 3, ranking=lambda _: torch.tensor([1.0, 2.0, float("nan"), 3.0, 4.0, 5.0]))
    run(model, selection, batch, 3)
    assert flags(model) == [True, True, False, True, True, True]
    json.dumps(selection.state_dict(), allow_nan=False)


def test_a_ranking_of_another_shape_is_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"the ranking returned shape \[2\]; expected .* each of 6 blocks"):
        keep_blocks(make(), 2, ranking=lambda _: torch.ones(2))


@pytest.mark.parametrize(("loss", "found"), [(lambda: torch.ones(3), r"a tensor \[3\]"), (lambda: 1.0, "float")])
def test_a_loss_that_is_no_scalar_is_refused_and_the_gates_are_left_as_they_were(
    make: Make, loss: Callable[[], Any], found: str
) -> None:
    model = make()
    with pytest.raises(ConfigError, match=f"the loss of SoloGain returned {found}; expected a scalar"):
        keep_blocks(model, 2, ranking=SoloGain(loss))
    assert all((gate == 0.15).all() for gate in gates(model))


def test_a_ranking_of_nothing_but_nan_is_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match="returned NaN for every block"):
        keep_blocks(make(trained=True), 2, ranking=lambda _: torch.full((N,), float("nan")))


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["blocks.0.qkv", "blocks.0.fc1", "blocks.1.qkv", "blocks.2.qkv"], [0.0, 0.0, 0.5, 1.0]),
        (["stages.0.0.fc", "stages.0.1.fc", "stages.1.0.fc"], [0.0, 0.5, 1.0]),
        (["visual.blocks.0.fc", "visual.blocks.1.fc", "text.0.fc", "text.1.fc"], [0.0, 1.0, 0.0, 1.0]),
        (["first", "second", "third"], [0.0, 0.5, 1.0]),
        (["stem", "blocks.0.fc", "blocks.1.fc", "neck"], [0.0, 0.0, 1.0, 1.0]),
        (["only"], [1.0]),
    ],
    ids=lambda value: value[0] if isinstance(value[0], str) else "",
)
def test_depth_goes_by_the_numbers_in_the_names(names: list[str], expected: list[float]) -> None:
    model = nn.Module()
    for name in names:
        *parents, last = name.split(".")
        inner = model
        for parent in parents:
            if not hasattr(inner, parent):
                inner.add_module(parent, nn.Module())
            inner = inner.get_submodule(parent)
        inner.add_module(last, nn.Linear(4, 4))
    slora.inject(model, slora.SelectiveLoRAConfig(r=1, target_modules=".*"))
    assert depths(model) == expected


def test_an_early_block_has_to_gain_more_than_a_late_one(make: Make, batch: Batch) -> None:
    model = make(trained=True)
    loss = lambda: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    gains, priced = SoloGain(loss, depth_price=0.0)(model), SoloGain(loss, depth_price=0.5)(model)
    factors = 200.0 ** (0.5 * (1 - torch.tensor(depths(model))))
    torch.testing.assert_close(priced, torch.where(gains > 0, gains / factors, gains))
    assert factors[0] > factors[-1] == 1
    assert SoloGain(loss).depth_price == 0.75
    assert SoloGain(loss, features=loss).depth_price == 0.0
    with pytest.raises(ConfigError, match="depth_price=-1 is negative"):
        SoloGain(loss, depth_price=-1)
