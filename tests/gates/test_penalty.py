"""The penalty on the gates, and their values in one tensor."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import slora
from slora.errors import ConfigError
from slora.gates.values import gate_values, gates
from slora.layers import adapted_layers
from tests.gates.gated_models import POLICIES, adapted

# Several tests give gates a rule that is not theirs on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::slora.errors.GateRuleWarning")


@pytest.mark.parametrize("policy", POLICIES)
def test_penalty_is_the_mean_absolute_score_over_all_blocks(policy: str, vit: nn.Module) -> None:
    model = slora.inject(vit, slora.SelectiveLoRAConfig(r=2, inactive=policy))
    scores = iter([0.3, -0.2, 0.05, 0.1, 0.0, -0.7, 1.0, 0.2, 0.15, 0.15, 0.12, -0.01])
    with torch.no_grad():
        for gate in gates(model):
            gate.copy_(torch.tensor([next(scores) for _ in gate]))
    assert next(scores, None) is None, "3 + 1 + 1 + 1 blocks in each of two layers"
    penalty = slora.gate_penalty(model)
    assert penalty.dtype == torch.float32
    torch.testing.assert_close(penalty, torch.tensor(2.98 / 12))
    penalty.backward()
    for gate in gates(model):
        moves = gate.detach() >= 0.1 if policy == "frozen" else torch.ones_like(gate, dtype=torch.bool)
        torch.testing.assert_close(gate.grad, torch.where(moves, gate.detach().sign() / 12, 0.0))


def test_the_values_of_all_gates_come_in_the_order_of_the_layers(vit: nn.Module) -> None:
    model = slora.inject(vit, slora.SelectiveLoRAConfig(r=2))
    with torch.no_grad():
        for i, parameter in enumerate(gates(model)):
            parameter.copy_(torch.arange(len(parameter)) + 10 * i)
    found = gate_values(model)
    assert list(found) == [name for name, _ in adapted_layers(model)]
    assert found["blocks.0.attn.qkv"] == [0.0, 1.0, 2.0]
    assert found["blocks.1.mlp.fc2"] == [70.0]
    assert gate_values(nn.Linear(2, 2)) == {}


@pytest.mark.gpu
def test_the_values_of_all_gates_come_in_one_copy(vit: nn.Module) -> None:
    model = slora.inject(vit, slora.SelectiveLoRAConfig(r=2)).cuda()
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as caught:
            gate_values(model)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len([w for w in caught if "synchronizing" in str(w.message)]) == 1


def test_penalty_of_a_plain_model_is_refused(vit: nn.Module) -> None:
    with pytest.raises(ConfigError, match=r"no gates; call slora.inject"):
        slora.gate_penalty(vit)


@pytest.mark.parametrize("backward", [True, False])
def test_without_task_gradient_only_the_penalty_would_move_a_gate(backward: bool, make_mlp: Any) -> None:
    # B = 0 at the start: why a warm-up is needed.
    model = adapted(make_mlp, 6, 6)
    loss = model(torch.randn(3, 6)).sum() + (slora.gate_penalty(model) if backward else 0.0)
    loss.backward()
    assert float(model.fc0.gate.grad) == (1.0 if backward else 0.0)
