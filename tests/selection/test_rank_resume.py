"""Rank-wise strategies go on after an interruption in a loop of the user's own, and agree in several processes."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

import slora
from slora import CheckpointError, ConfigError, StateError
from slora.layers import adapted_layers
from slora.selection import AdaLoRA, CoDyRA, IncreLoRA, SoRA
from tests.selection.rank_runs import KINDS, Kind, count, optimizer_of, ranks, train
from tests.selection.stepping import Batch, Make


@pytest.fixture
def net(make: Make) -> Any:
    """A factory of equal adapted models of six blocks of rank 4."""
    return lambda: make(r=4)


@pytest.mark.parametrize("at", [1, 9, 12, 15])
@pytest.mark.parametrize("kind", KINDS)
def test_a_resumed_strategy_ends_where_the_uninterrupted_one_ends(kind: Kind, at: int, net: Any, batch: Batch) -> None:
    def started() -> tuple[nn.Module, Any, torch.optim.Optimizer]:
        model = net()
        selection = kind(model, 7, 20, settling=0.4)
        return model, selection, optimizer_of(model)

    model, selection, optimizer = started()
    assert selection.last == 12
    train(model, selection, optimizer, batch, at)
    file = io.BytesIO()
    torch.save([part.state_dict() for part in (model, optimizer, selection)], file)
    file.seek(0)
    other, resumed, others = started()
    for part, state in zip((other, others, resumed), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    parts = [(model, selection, optimizer), (other, resumed, others)]
    for each in parts[::-1]:
        train(*each, batch, 20 - at)
        each[1].finish()
    assert ranks(other) == ranks(model)
    assert all(torch.equal(a, b) for a, b in zip(other.state_dict().values(), model.state_dict().values(), strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_made_shorter_or_longer_by_a_resume_ends_with_its_budget(kind: Kind, net: Any, batch: Batch) -> None:
    model = net()
    selection = kind(model, 7, 40)
    train(model, selection, optimizer_of(model), batch, 12)
    for steps in (16, 60):
        other = net()
        resumed = kind(other, 7, steps)
        other.load_state_dict(model.state_dict())
        resumed.load_state_dict(selection.state_dict())
        train(other, resumed, optimizer_of(other), batch, steps - 12)
        resumed.finish()
        assert count(other) == 7


def test_states_that_do_not_fit_are_refused_by_name(net: Any, batch: Batch) -> None:
    model = net()
    selection = SoRA(model, 7, 12)
    train(model, selection, optimizer_of(model), batch, 9)
    state = selection.state_dict()
    with pytest.raises(ConfigError, match="has budget=7, this SoRA budget=8; resume with the first"):
        SoRA(net(), 8, 12).load_state_dict(state)
    with pytest.raises(ConfigError, match="has strategy='sora', this CoDyRA strategy='codyra'"):
        CoDyRA(net(), 7, 12).load_state_dict(state)
    for kept in (None, [0, 1], [*range(6), 24], [1, 0, 2, 3, 4, 5, 6]):
        with pytest.raises(CheckpointError, match="damaged: 'kept' is"):
            SoRA(net(), 7, 12).load_state_dict({**state, "kept": kept})
    state = AdaLoRA(net(), 7, 12).state_dict()
    broken = {**state["tensors"], "mean.first.P": torch.full((1, 16, 4), torch.nan)}
    with pytest.raises(CheckpointError, match=r"damaged: 'mean\.first\.P' is"):
        AdaLoRA(net(), 7, 12).load_state_dict({**state, "tensors": broken})
    state = IncreLoRA(net(), 7, 12).state_dict()
    with pytest.raises(CheckpointError, match="damaged: 'ranks' is"):
        IncreLoRA(net(), 7, 12).load_state_dict({**state, "ranks": [5] * 6})


def in_processes(rank: int) -> list[Any]:
    """The ranks that each strategy leaves where each process has other data and another seed, and the output."""
    torch.distributed.init_process_group("gloo")
    found = []
    for kind in KINDS:
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 6))
        model = slora.inject(net, slora.SelectiveLoRAConfig(r=4, blocks=2, target_modules=["0", "2"]))
        torch.manual_seed(rank)
        # With one rank a whole layer is off at the end, whose parameters DDP waits for all the same.
        selection = kind(model, 1, 12)
        wrapped = DistributedDataParallel(model)
        optimizer = torch.optim.AdamW(slora.parameter_groups(model, lr=0.05))
        x, y = torch.randn(8, 6), torch.randint(6, (8,))
        for _ in range(12):
            (F.cross_entropy(wrapped(x), y) + selection.penalty()).backward()
            optimizer.step()
            optimizer.zero_grad()
            selection.step()
        selection.finish()
        found.append((ranks(model), [layer.lora_B.tolist() for _, layer in adapted_layers(model)]))
    try:
        SoRA(
            DistributedDataParallel(slora.inject(nn.Sequential(nn.Linear(6, 8)), slora.SelectiveLoRAConfig(r=2))), 5, 12
        )
    except StateError as error:
        found.append(str(error))
    return found


def test_processes_keep_the_same_ranks_and_a_model_that_is_wrapped_first_is_refused(
    two_processes: Callable[..., list[Any]],
) -> None:
    one, two = two_processes(in_processes)
    assert one == two
    assert [sum(map(sum, kept)) for kept, _ in one[:-1]] == [1] * 4
    assert one[-1].startswith("DistributedDataParallel would not know the rank gates")
