"""However a rank-wise strategy ends, its choice of ranks stays, and nothing of it stays on the model."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import slora
from slora import StateError
from slora.layers import adapted_layers
from slora.selection import Budget, Last, Sensitivity, SoRA
from tests.selection.conftest import Net
from tests.selection.rank_runs import KINDS, Kind, count, optimizer_of, ranks, train
from tests.selection.stepping import Batch, Make


@pytest.fixture
def net(make: Make) -> Any:
    """A factory of equal adapted models of six blocks of rank 4."""
    return lambda **config: make(r=4, **config)


def chosen(kind: Kind, model: Any, batch: Batch, budget: int = 7) -> None:
    """Train to the end, without `finish`."""
    train(model, kind(model, budget, 12), optimizer_of(model, 0.05), batch, 12)


@pytest.mark.parametrize("kind", KINDS)
def test_a_choice_without_finish_is_what_is_saved(kind: Kind, net: Any, batch: Batch, tmp_path: Path) -> None:
    model = net()
    chosen(kind, model, batch)
    slora.save_adapter(model, tmp_path)
    torch.manual_seed(3)
    loaded = slora.load_adapter(Net(), tmp_path)
    assert ranks(loaded) == ranks(model)
    assert count(loaded) == 7
    entries = json.loads((tmp_path / "selective.json").read_text())["layers"].values()
    assert sum(sum(entry.get("ranks", [4] * len(entry["active"]))) for entry in entries) == 7
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(batch[0]), model.eval()(batch[0]), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", KINDS)
def test_a_choice_without_finish_outlives_another_strategy_and_its_training(kind: Kind, net: Any, batch: Batch) -> None:
    model = net()
    # Of six blocks with four ranks each, so that every block keeps one.
    chosen(kind, model, batch, 21)
    assert all(map(all, ranks(model)))
    before, left = model(batch[0]), ranks(model)
    selection = Last(model, 6, 8)
    assert ranks(model) == left
    assert torch.equal(model(batch[0]), before)
    train(model, selection, optimizer_of(model, 0.05), batch, 8)
    selection.finish()
    assert ranks(model) == left
    assert not torch.equal(model(batch[0]), before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_choice_without_finish_outlives_freeze_gates_and_merging(kind: Kind, net: Any, batch: Batch) -> None:
    model = net()
    chosen(kind, model, batch)
    left, other = ranks(model), copy.deepcopy(model)
    before = model.eval()(batch[0])
    slora.freeze_gates(model)
    assert ranks(model) == left
    assert torch.equal(model(batch[0]), before)
    plain = slora.merge_and_unload(other).eval()
    torch.testing.assert_close(plain(batch[0]), before, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("end", [slora.unload, slora.merge_and_unload])
@pytest.mark.filterwarnings("ignore::slora.UnfinishedSelectionWarning")
def test_a_model_unloaded_before_the_choice_has_nothing_of_the_strategy(
    kind: Kind, end: Any, net: Any, batch: Batch
) -> None:
    model = net()
    train(model, kind(model, 7, 12), optimizer_of(model), batch, 3)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    plain = end(model).train()
    assert not plain._forward_pre_hooks
    x = batch[0].clone().requires_grad_()
    F.cross_entropy(plain(x), batch[1]).backward()
    frozen = [parameter for name, parameter in plain.named_parameters() if not name.startswith("head")]
    assert not any(parameter.requires_grad or parameter.grad is not None for parameter in frozen)
    assert not any(parameter._post_accumulate_grad_hooks for parameter in frozen)


def test_blocks_that_have_no_rank_left_are_no_candidates_of_another_choice(net: Any, batch: Batch) -> None:
    for finished in (True, False):
        model = net()
        selection = SoRA(model, 2, 12)
        train(model, selection, optimizer_of(model), batch, 12)
        if finished:
            selection.finish()
        empty = sum(rank == 0 for each in ranks(model) for rank in each)
        message = f"{empty} of 6 blocks, the first in '.*', have no rank left .*use slora.keep_blocks.*inject again"
        with pytest.raises(StateError, match=message):
            Last(model, 2, 12)
        with pytest.raises(StateError, match=message):
            Budget(model, 2, 12)
        assert count(model) == 2
        slora.keep_blocks(model, 1)
        assert sum(layer.activity().active != () for _, layer in adapted_layers(model)) == 1


def test_a_strategy_at_work_is_named_before_the_model_runs_for_another(net: Any, batch: Batch) -> None:
    model = net()
    SoRA(model, 7, 12)

    def loss(x: Any, y: Any) -> Any:
        raise AssertionError("the model ran")

    with pytest.raises(StateError, match=r"SoRA is active on this model \(step 0 of 12\)"):
        Sensitivity(model, 2, 12, batches=[batch], loss=loss)
