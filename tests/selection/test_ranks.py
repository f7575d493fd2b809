"""Rank-wise strategies end with exactly their budget, and what they leave is an adapter like any other."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slora
from slora import ConfigError, StateError
from slora.layers import adapted_layers
from slora.selection import AdaLoRA, Budget, IncreLoRA, SoRA
from tests.selection.conftest import Net
from tests.selection.rank_runs import KINDS, TOTAL, Kind, count, optimizer_of, ranks, train
from tests.selection.stepping import Batch, Make


@pytest.fixture
def net(make: Make) -> Any:
    """A factory of equal adapted models of six blocks of rank 4."""
    return lambda **config: make(r=4, **config)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("budget", "left"), [(0, 0), (1, 1), (5, 5), (13, 13), (TOTAL, TOTAL), (0.3, 7), (1.0, TOTAL)])
def test_exactly_the_budget_is_left(kind: Kind, budget: float, left: int, net: Any, batch: Batch) -> None:
    model = net()
    selection = kind(model, budget, 12)
    train(model, selection, optimizer_of(model), batch, 12)
    selection.finish()
    assert count(model) == left
    for _, layer in adapted_layers(model):
        kept = layer.block_ranks()
        assert layer.r == max(1, *kept)
        assert layer.activity().active == tuple(i for i, each in enumerate(kept) if each)
        assert layer.scaling == pytest.approx(4.0)
        assert layer.rank_gate is None


@pytest.mark.parametrize("kind", KINDS)
def test_after_finish_model_files_peft_and_merged_weights_agree_with_the_model_before(
    kind: Kind, net: Any, batch: Batch, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model = net()
    selection = kind(model, 7, 12)
    train(model, selection, optimizer_of(model, 0.05), batch, 12)
    model.eval()
    with torch.no_grad():
        before = model(batch[0])
        selection.finish()
        # Only the order of sums differs: errors of fp32 in sums of up to 64 terms.
        near = {"rtol": 1e-4, "atol": 1e-5}
        torch.testing.assert_close(model(batch[0]), before, **near)
        slora.save_adapter(model, tmp_path)
        content = json.loads((tmp_path / "selective.json").read_text())
        assert content["asked"] == "budget=7 ranks"
        layers = dict(adapted_layers(model))
        assert len({layer.r for layer in layers.values()}) > 1
        for name, layer in layers.items():
            assert content["config"]["rank_pattern"].get(f"^{name}$", 4) == layer.r
            assert content["config"]["alpha_pattern"].get(f"^{name}$", 16) == layer.lora_alpha
        torch.manual_seed(3)
        base = Net().eval()
        loaded = slora.load_adapter(copy.deepcopy(base), tmp_path)
        torch.testing.assert_close(loaded(batch[0]), before, **near)
        assert ranks(loaded) == ranks(model)
        with warnings.catch_warnings():
            warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
            theirs = peft.PeftModel.from_pretrained(copy.deepcopy(base), tmp_path)
        torch.testing.assert_close(theirs(batch[0]), before, **near)
        plain = slora.merge_and_unload(model)
    assert type(plain.qkv) is nn.Linear
    torch.testing.assert_close(plain(batch[0]), before, **near)


@pytest.mark.parametrize("kind", KINDS)
def test_removed_ranks_stay_away_while_the_others_train_on(kind: Kind, net: Any, batch: Batch) -> None:
    model = net()
    selection = kind(model, 7, 30)
    optimizer = optimizer_of(model, 0.05)
    train(model, selection, optimizer, batch, selection.last)
    chosen = ranks(model)
    gates = selection.values()
    assert sum(map(sum, chosen)) == 7
    train(model, selection, optimizer, batch, 30 - selection.last)
    assert ranks(model) == chosen
    assert torch.equal(selection.values() == 0, gates == 0)
    assert not torch.equal(selection.values(), gates)


def test_training_goes_on_after_finish_with_a_new_optimizer(net: Any, batch: Batch) -> None:
    model = net()
    selection = SoRA(model, 7, 12)
    train(model, selection, optimizer_of(model), batch, 12)
    selection.finish()
    before = [layer.lora_B.detach().clone() for _, layer in adapted_layers(model)]
    optimizer = torch.optim.AdamW(slora.parameter_groups(model, lr=0.01))
    torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()
    assert any(not torch.equal(a, layer.lora_B) for a, (_, layer) in zip(before, adapted_layers(model), strict=True))
    assert count(model) == 7


@pytest.mark.parametrize("kind", KINDS)
def test_a_strategy_that_ends_early_leaves_the_output_as_it_is(kind: Kind, net: Any, batch: Batch) -> None:
    model = net()
    weights = [p for name, p in model.named_parameters() if name.endswith("weight") and "head" not in name]
    selection = kind(model, 7, 12)
    train(model, selection, optimizer_of(model), batch, 3)
    model(batch[0])
    before = model(batch[0])
    slora.freeze_gates(model)
    assert torch.equal(model(batch[0]), before)
    assert all(layer.rank_gate is None and layer.r == 4 for _, layer in adapted_layers(model))
    assert not any(weight.requires_grad for weight in weights)
    with pytest.raises(StateError, match=f"this {type(selection).__name__} has ended"):
        selection.step()


@pytest.mark.parametrize("kind", KINDS)
def test_a_strategy_that_is_given_up_before_the_first_step_has_changed_nothing(kind: Kind, net: Any) -> None:
    model = net()
    before = {name: value.clone() for name, value in model.state_dict().items() if not name.endswith("gate")}
    kind(model, 7, 12)
    slora.freeze_gates(model)
    after = {name: value for name, value in model.state_dict().items() if not name.endswith("gate")}
    assert before.keys() == after.keys()
    assert all(torch.equal(value, after[name]) for name, value in before.items())


def test_an_optimizer_made_before_the_strategy_is_an_error_at_the_first_step(net: Any, batch: Batch) -> None:
    model = net()
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    selection = SoRA(model, 7, 12)
    with pytest.raises(StateError, match=r"no optimizer moves the rank gates of this SoRA.*before the optimizer"):
        train(model, selection, optimizer, batch, 1)


def test_rank_gates_may_have_an_optimizer_of_their_own(net: Any, batch: Batch) -> None:
    model = net()
    selection = AdaLoRA(model, 7, 12)
    groups = {group["name"]: group for group in slora.parameter_groups(model, lr=0.01)}
    own = torch.optim.SGD(groups.pop("rank_gates")["params"], lr=0.1)
    rest = torch.optim.AdamW(list(groups.values()))
    for _ in range(12):
        torch.nn.functional.cross_entropy(model(batch[0]), batch[1]).backward()
        own.step()
        rest.step()
        own.zero_grad()
        rest.zero_grad()
        selection.step()
    selection.finish()
    assert count(model) == 7


def test_budgets_and_models_that_do_not_fit_are_refused_by_name(net: Any, batch: Batch, make: Make) -> None:
    with pytest.raises(ConfigError, match="budget=25 ranks is out of range; use 0 to 24, the number of ranks"):
        SoRA(net(), 25, 12)
    with pytest.raises(ConfigError, match=r"budget=0.01 of 24 ranks rounds to none; the smallest share that keeps one"):
        SoRA(net(), 0.01, 12)
    with pytest.raises(ConfigError, match="threshold=-1 is negative or not a finite number"):
        SoRA(net(), 7, 12, threshold=-1)
    for kind in (AdaLoRA, IncreLoRA):
        with pytest.raises(ConfigError, match=f"{kind.name} needs a budget of ranks, such as 40 or 0.1"):
            kind(net(), None, 12)
    with pytest.raises(StateError, match=r"'first' is trained already \(B is not 0\)"):
        SoRA(make(trained=True), 2, 12)
    with pytest.raises(ConfigError, match="unit='ranks' is of the strategies that choose single ranks"):
        Budget(net(), 4, 12, unit="ranks")
    with pytest.raises(ConfigError, match="unit='ranks' is of the strategies that choose single ranks"):
        slora.keep_blocks(make(trained=True), 4, unit="ranks")


def test_an_adapter_is_not_loaded_under_a_strategy_that_would_scale_it(net: Any, batch: Batch, tmp_path: Path) -> None:
    slora.save_adapter(net(), tmp_path)
    model = net()
    SoRA(model, 7, 12)
    with pytest.raises(StateError, match="a rank-wise strategy is at work on the model"):
        slora.load_adapter(model, tmp_path)


def test_blocks_that_frozen_has_freed_have_no_rank(net: Any, batch: Batch) -> None:
    model = net(inactive="frozen")
    selection = SoRA(model, 2, 12)
    optimizer = optimizer_of(model)
    train(model, selection, optimizer, batch, 8)
    assert slora.release_frozen(model, optimizer) > 0
    train(model, selection, optimizer, batch, 4)
    selection.finish()
    assert count(model) == 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_the_model_computes_the_same_and_has_no_strategy(kind: Kind, net: Any, batch: Batch) -> None:
    model = net()
    selection = kind(model, 7, 12)
    train(model, selection, optimizer_of(model), batch, 3)
    other = copy.deepcopy(model)
    before = other(batch[0])
    before.sum().backward()
    assert not any(p.requires_grad for name, p in other.named_parameters() if name.endswith("qkv.weight"))
    slora.freeze_gates(other)
    assert all(layer.rank_gate is None for _, layer in adapted_layers(other))
    assert torch.equal(other(batch[0]), before)
    train(model, selection, optimizer_of(model), batch, 9)
    selection.finish()
    assert count(model) == 7


def test_increlora_without_gradients_of_the_weights_says_so(net: Any, batch: Batch) -> None:
    model = net().eval()
    selection = IncreLoRA(model, 7, 12)
    with pytest.raises(StateError, match="increlora needs the gradients of the base weights, and no layer has one"):
        train(model, selection, optimizer_of(model), batch, 1)


def test_rank_gates_made_after_ddp_are_noticed_before_the_first_step(net: Any, batch: Batch) -> None:
    torch.distributed.init_process_group("gloo", store=torch.distributed.HashStore(), rank=0, world_size=1)
    try:
        model = net()
        wrapped = nn.parallel.DistributedDataParallel(model)
        selection = SoRA(model, 7, 12)
        before = [layer.lora_B.detach().clone() for _, layer in adapted_layers(model)]
        with pytest.raises(StateError, match=r"would not know the rank gates.*before the model is wrapped"):
            train(wrapped, selection, optimizer_of(model), batch, 1)
        assert all(torch.equal(a, layer.lora_B) for a, (_, layer) in zip(before, adapted_layers(model), strict=True))
        slora.freeze_gates(model)
        model = net()
        selection = SoRA(model, 7, 12)
        train(nn.parallel.DistributedDataParallel(model), selection, optimizer_of(model), batch, 1)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("kind", [AdaLoRA, IncreLoRA])
@pytest.mark.parametrize("every", [0, 0.5, 2.7, True, -1])
def test_a_distance_of_allocations_that_is_no_count_is_refused(kind: Kind, every: Any, net: Any) -> None:
    with pytest.raises(ConfigError, match=f"every={every} is not a positive integer"):
        kind(net(), 7, 12, every=every)
