"""`Gates`: the penalty acts in its phase, then the gates stand still."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slora
from slora import ConfigError
from slora.gates.values import gates
from slora.selection import Gates

Make = Callable[..., nn.Module]
Batch = tuple[Tensor, Tensor]


def test_the_penalty_has_its_phase_and_the_gates_then_stand_still(make: Make, batch: Batch) -> None:
    model = make()
    selection = Gates(model, 12, penalty=0.3, warmup=0.25)
    optimizer = torch.optim.AdamW(slora.parameter_groups(model, gate_lr=0.5))
    weights, values = [], []
    for _ in range(12):
        weights.append(selection.weight)
        loss = F.cross_entropy(model(batch[0]), batch[1]) + selection.penalty()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        selection.step()
        values.append(torch.cat([gate.detach().clone() for gate in gates(model)]))
    assert weights == [0.0] * 3 + [0.3] * 5 + [0.0] * 4
    assert not torch.equal(values[6], values[7])
    assert all(torch.equal(values[7], later) for later in values[8:])
    selection.finish()


def test_the_penalty_is_that_of_all_gates(make: Make) -> None:
    model = make(gate_init=0.2)
    selection = Gates(model, 3, penalty=2.0, warmup=0.0)
    penalty = selection.penalty()
    assert isinstance(penalty, Tensor)
    assert penalty.item() == pytest.approx(0.4)


def test_gates_that_were_frozen_learn_again(make: Make) -> None:
    model = make()
    slora.freeze_gates(model)
    Gates(model, 3)
    assert all(gate.requires_grad for gate in gates(model))


@pytest.mark.parametrize("at", [2, 9])
def test_a_resumed_strategy_is_in_the_phase_it_was_in(make: Make, at: int) -> None:
    model, other = make(), make()
    selection, resumed = Gates(model, 12), Gates(other, 12)
    for _ in range(at):
        selection.step()
    resumed.load_state_dict(selection.state_dict())
    assert resumed.phase == selection.phase
    assert [g.requires_grad for g in gates(other)] == [g.requires_grad for g in gates(model)]


@pytest.mark.parametrize("penalty", [-1.0, float("nan"), float("inf"), "a", None])
def test_a_bad_penalty_is_refused(make: Make, penalty: Any) -> None:
    with pytest.raises(ConfigError, match="penalty="):
        Gates(make(), 3, penalty=penalty)
