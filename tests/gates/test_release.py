"""Layers whose matrices were freed because they are off for good."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import slora
from slora.errors import StateError
from slora.gates.values import gates
from slora.layers import adapted_layers
from tests.gates.gated_models import adapted, deep, off, pickled, set_gates

# Several tests give gates a rule that is not theirs on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::slora.errors.GateRuleWarning")


def test_released_layers_free_their_matrices_gradients_and_optimizer_state(make_mlp: Any, randomise: Any) -> None:
    model = randomise(adapted(make_mlp, 6, 8, 6, inactive="frozen"))
    optimizer = torch.optim.AdamW(slora.parameter_groups(model))
    x = torch.randn(5, 6)
    model(x).sum().backward()
    optimizer.step()
    set_gates(model, False, True)
    expected = model(x)
    layer = model.fc0
    elements = layer.lora_A.numel() + layer.lora_B.numel()
    gone = [layer.lora_A, layer.lora_B, layer.gate]
    freed = slora.release_frozen(model, optimizer)
    # A and B with their gradients; exp_avg, exp_avg_sq of A, B and the gate, and three step counters.
    assert freed == 4 * (2 * elements + 2 * (elements + 1) + 3)
    held = [p for group in optimizer.param_groups for p in group["params"]]
    assert not any(p is q for p in gone for q in held)
    assert not any(p is q for p in gone for q in optimizer.state)
    assert layer.lora_A.numel() == layer.lora_B.numel() == 0
    assert not any(p.requires_grad for p in gone)
    assert torch.equal(model(x), expected)
    model(x).sum().backward()
    optimizer.step()
    assert slora.release_frozen(model, optimizer) == 0


@pytest.mark.parametrize("policy", ["exact", "probe"])
def test_only_the_policy_frozen_releases(policy: str, make_mlp: Any) -> None:
    model = adapted(make_mlp, 6, 8, 6, inactive=policy, gate_init=0.0)
    assert slora.release_frozen(model) == 0
    assert not any(layer.released for _, layer in adapted_layers(model))


def test_a_layer_with_one_active_block_is_not_released(make_mlp: Any) -> None:
    model = adapted(make_mlp, 6, 8, inactive="frozen", blocks=2)
    with torch.no_grad():
        model.fc0.gate[0] = 0.0
    assert slora.release_frozen(model) == 0


def test_a_gate_raised_after_its_matrices_were_freed_is_an_error_not_a_silent_base_layer(make_mlp: Any) -> None:
    model = off(adapted(make_mlp, 6, 8, inactive="frozen"))
    slora.release_frozen(model)
    model(torch.randn(2, 6))
    set_gates(model, True)
    with pytest.raises(StateError, match=r"raised above the threshold after its LoRA matrices were freed"):
        model(torch.randn(2, 6))
    with slora.disabled(model):
        model(torch.randn(2, 6))


@pytest.mark.parametrize("copied", [deep, pickled], ids=["deepcopy", "pickle"])
def test_a_released_model_can_be_copied_saved_and_loaded(copied: Any, make_mlp: Any, randomise: Any) -> None:
    model = randomise(adapted(make_mlp, 6, 8, 6, inactive="frozen"))
    set_gates(model, False, True)
    slora.release_frozen(model)
    x = torch.randn(2, 6)
    assert torch.equal(copied(model)(x), model(x))
    fresh = adapted(make_mlp, 6, 8, 6, inactive="frozen")
    fresh.load_state_dict(model.state_dict())
    assert fresh.fc0.released
    assert not fresh.fc1.released
    assert torch.equal(fresh(x), model(x))


def test_released_gates_still_count_in_both_forms_of_the_penalty(make_mlp: Any) -> None:
    model = adapted(make_mlp, 6, 6, 6, inactive="frozen")
    set_gates(model, False, True)
    optimizer = slora.ProximalGates(gates(model), lr=0.1, penalty=1.0)
    penalty = slora.gate_penalty(model).item()
    slora.release_frozen(model, optimizer)
    assert slora.gate_penalty(model).item() == penalty
    optimizer.step()
    torch.testing.assert_close(model.fc1.gate.detach(), torch.tensor([0.15 - 0.1 / 2]))
    torch.testing.assert_close(model.fc0.gate.detach(), torch.tensor([0.05]))
