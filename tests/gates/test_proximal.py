"""`ProximalGates`: the soft threshold, shared by all groups, and what it leaves alone."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import slora
from slora.errors import ConfigError
from slora.gates.values import gates

# Several tests give gates a rule that is not theirs on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::slora.errors.GateRuleWarning")


def test_proximal_penalty_is_shared_by_the_gates_of_all_groups() -> None:
    one, two = nn.Parameter(torch.tensor([0.5, -0.5])), nn.Parameter(torch.tensor([0.5, 0.5, 0.001]))
    optimizer = slora.ProximalGates([{"params": [one]}, {"params": [two], "lr": 0.2}], lr=0.1, penalty=1.0)
    optimizer.step()
    torch.testing.assert_close(one.detach(), torch.tensor([0.48, -0.48]))
    torch.testing.assert_close(two.detach(), torch.tensor([0.46, 0.46, 0.0]))
    assert copy.deepcopy(optimizer).step() is None


def test_proximal_gates_come_to_rest_at_zero_where_a_subgradient_step_oscillates() -> None:
    gate = nn.Parameter(torch.tensor([0.05]))
    optimizer = slora.ProximalGates([gate], lr=0.1, penalty=0.3)
    for _ in range(5):
        gate.grad = torch.zeros(1)
        optimizer.step()
    assert gate.item() == 0.0


def test_a_gate_that_needs_no_gradient_keeps_its_value() -> None:
    gate = nn.Parameter(torch.tensor([0.05, -0.5]), requires_grad=False)
    slora.ProximalGates([gate], lr=0.1, penalty=0.3).step()
    assert gate.tolist() == [pytest.approx(0.05), -0.5]


def test_proximal_step_runs_a_closure_with_gradients_on() -> None:
    gate = nn.Parameter(torch.tensor([0.5]))
    optimizer = slora.ProximalGates([gate], lr=0.1)

    def closure() -> Tensor:
        loss = (gate * 2).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 1.0
    torch.testing.assert_close(gate.detach(), torch.tensor([0.3]))


@pytest.mark.parametrize(("name", "value"), [("lr", -0.1), ("penalty", -1.0), ("lr", math.nan)])
def test_proximal_settings_out_of_range_are_refused(name: str, value: float) -> None:
    with pytest.raises(ConfigError, match=f"{name}="):
        slora.ProximalGates([nn.Parameter(torch.ones(1))], **{name: value})


def test_the_proximal_rule_leaves_gates_alone_that_frozen_has_switched_off(make_mlp: Callable[..., nn.Module]) -> None:
    model = slora.inject(make_mlp(4, 4), slora.SelectiveLoRAConfig(r=1, blocks=2, threshold=-0.1, inactive="frozen"))
    (gate,) = gates(model)
    with torch.no_grad():
        gate.copy_(torch.tensor([0.3, -0.3]))
    # The penalty pulls towards 0, which is above this threshold: the second block would come back.
    rule = slora.ProximalGates([gate], lr=0.1, penalty=100.0)
    model(torch.randn(2, 4)).sum().backward()
    rule.step()
    assert gate.tolist() == pytest.approx([0.0, -0.3])
