"""A strategy goes on after an interruption, and is the same in several processes."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import slora
from slora import CheckpointError, ConfigError
from slora.gates.values import gates
from slora.layers import adapted_layers
from slora.selection import Budget, SoloGain
from tests.selection.stepping import Batch, Make, N, count, flags, run


@settings(max_examples=30, deadline=None)
@given(budget=st.integers(0, N) | st.floats(0.1, 1), steps=st.integers(1, 12), at=st.integers(0, 12))
def test_a_resumed_strategy_ends_where_the_uninterrupted_one_ends(budget: float, steps: int, at: int) -> None:
    def started() -> tuple[nn.Module, Budget]:
        torch.manual_seed(0)
        model = slora.inject(nn.Sequential(*[nn.Linear(4, 4) for _ in range(N)]), slora.SelectiveLoRAConfig(r=1))
        return model, Budget(model, budget, steps)

    def step(model: nn.Module, selection: Budget, number: int) -> None:
        with torch.no_grad():
            for i, (_, layer) in enumerate(adapted_layers(model)):
                layer.lora_B.fill_((number * 7 + i * 5) % 11)
        selection.step()

    model, selection = started()
    for number in range(steps):
        if number == at:
            state = json.loads(json.dumps(selection.state_dict()))
        step(model, selection, number)
    other, resumed = started()
    if at < steps:
        resumed.load_state_dict(state)
        for number in range(at, steps):
            step(other, resumed, number)
        assert flags(other) == flags(model)
        assert [gate.tolist() for gate in gates(other)] == [gate.tolist() for gate in gates(model)]


def test_a_state_that_lost_its_scores_is_refused_as_the_blocks_would_be_ranked_again(make: Make, batch: Batch) -> None:
    def started() -> tuple[nn.Module, Budget]:
        model = make()
        return model, Budget(model, 2, 10, ranking=SoloGain(lambda: F.cross_entropy(model(batch[0]), batch[1])))

    model, selection = started()
    run(model, selection, batch, 5)
    state = selection.state_dict()
    assert state["scores"]
    other, resumed = started()
    before = [gate.tolist() for gate in gates(other)]
    with pytest.raises(CheckpointError, match="damaged: 'scores' is null; use another checkpoint"):
        resumed.load_state_dict({**state, "scores": None})
    assert [gate.tolist() for gate in gates(other)] == before
    resumed.load_state_dict(state)


def test_a_run_made_shorter_by_a_resume_gets_its_choice_all_the_same(make: Make, batch: Batch) -> None:
    model = make()
    selection = Budget(model, 2, 100)
    run(model, selection, batch, 20)
    state = selection.state_dict()
    other = make()
    Budget(other, 2, 24).load_state_dict(state)
    assert count(other) == 2


def test_resuming_with_another_budget_is_refused(make: Make) -> None:
    state = Budget(make(), 4, 10).state_dict()
    with pytest.raises(ConfigError, match="has budget=4, this Budget budget=3; resume with the first"):
        Budget(make(), 3, 10).load_state_dict(state)
    with pytest.raises(ConfigError, match="has strategy='budget', this Gates strategy='gates'"):
        slora.selection.Gates(make(), 10).load_state_dict(state)


def chosen(rank: int) -> list[bool]:
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = slora.inject(nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)]), slora.SelectiveLoRAConfig(r=1))
    # Each process would choose otherwise by itself: the mean of both scores decides.
    scores = torch.tensor([[9.0, 1, 2, 3, 4, 5], [0.0, 1, 2, 3, 4, 5]])[rank]
    selection = slora.selection.Budget(model, 2, 3, ranking=lambda _: scores)
    for _ in range(3):
        selection.step()
    return [layer.activity().active != () for _, layer in adapted_layers(model)]


def test_processes_make_the_same_choice(two_processes: Callable[..., list[Any]]) -> None:
    assert two_processes(chosen) == [[True, False, False, False, False, True]] * 2


def test_a_run_made_longer_by_a_resume_is_still_in_its_selection(make: Make, batch: Batch) -> None:
    model = make()
    selection = Budget(model, 2, 40)
    run(model, selection, batch, 13)
    left = count(model)
    assert 2 < left < N
    other = make()
    longer = Budget(other, 2, 200)
    longer.load_state_dict(selection.state_dict())
    assert longer.phase == "selection"
    assert count(other) == left
    assert run(other, longer, batch, 187)[-1] == 2
    longer.finish()
