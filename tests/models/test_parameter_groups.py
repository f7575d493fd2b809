"""Optimizer groups: every trainable parameter once, and the rule by which each optimizer moves the gates."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import slora
from slora.errors import ConfigError
from slora.gates.values import gates


def test_groups_hold_every_trainable_parameter_once(model: nn.Module) -> None:
    groups = slora.parameter_groups(model, lr=1e-3, gate_lr=2e-2, weight_decay=0.1)
    assert [group["name"] for group in groups] == ["lora", "saved", "saved_no_decay", "gates"]
    held = [id(p) for group in groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in model.parameters() if p.requires_grad)
    by_name = {group["name"]: group for group in groups}
    assert {name: (group["lr"], group["weight_decay"]) for name, group in by_name.items()} == {
        "lora": (1e-3, 0.1),
        "saved": (1e-3, 0.1),
        "saved_no_decay": (1e-3, 0.0),
        "gates": (2e-2, 0.0),
    }
    assert [p is model.head.weight for p in by_name["saved"]["params"]] == [True]
    assert [p is model.head.bias for p in by_name["saved_no_decay"]["params"]] == [True]
    assert {id(p) for p in by_name["gates"]["params"]} == {id(p) for p in gates(model)}


def test_groups_without_members_are_left_out(vit: nn.Module) -> None:
    model = slora.inject(vit, slora.SelectiveLoRAConfig(r=2))
    assert [group["name"] for group in slora.parameter_groups(model)] == ["lora", "gates"]
    for gate in gates(model):
        gate.requires_grad_(False)
    assert [group["name"] for group in slora.parameter_groups(model)] == ["lora"]


def test_without_a_rate_the_gates_are_left_out(model: nn.Module) -> None:
    groups = slora.parameter_groups(model, gate_lr=None)
    assert [group["name"] for group in groups] == ["lora", "saved", "saved_no_decay"]
    held = {id(p) for group in groups for p in group["params"]}
    assert held == {id(p) for p in model.parameters() if p.requires_grad} - {id(gate) for gate in gates(model)}
    assert {key for group in groups for key in group} == {"name", "params", "lr", "weight_decay"}


ADAMS = {
    "Adam": lambda groups: torch.optim.Adam(groups),
    "AdamW": lambda groups: torch.optim.AdamW(groups, weight_decay=0.5),
    "AdamW foreach": lambda groups: torch.optim.AdamW(groups, foreach=True),
    "AdamW fused": lambda groups: torch.optim.AdamW(groups, fused=True),
}


@pytest.mark.parametrize("name", ADAMS)
def test_under_adam_gates_take_lr_grad_over_one_plus_grad_at_every_step(name: str, model: nn.Module) -> None:
    optimizer = ADAMS[name](slora.parameter_groups(model, gate_lr=0.1))
    gate = model.get_submodule("blocks.0.attn.qkv").gate
    expected = gate.detach().double()
    for slope in ([0.01, -0.02, 3.0], [-5.0, 0.0, 1e-3], [1e-4, 1e-4, 1e-4]):
        gate.grad = torch.tensor(slope)
        optimizer.step()
        wide = gate.grad.double()
        expected = expected - 0.1 * wide / (1 + wide.abs())
        # A handful of fp32 roundings of numbers below 1.
        torch.testing.assert_close(gate.detach().double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("nesterov", [False, True])
def test_under_sgd_gates_have_no_momentum_while_the_rest_does(nesterov: bool, model: nn.Module) -> None:
    optimizer = torch.optim.SGD(slora.parameter_groups(model, gate_lr=0.1), momentum=0.9, nesterov=nesterov)
    layer = model.get_submodule("blocks.0.mlp.fc1")
    start_gate, start_A = layer.gate.detach().clone(), layer.lora_A.detach().clone()
    for _ in range(2):
        layer.gate.grad, layer.lora_A.grad = torch.ones(1), torch.ones_like(layer.lora_A)
        optimizer.step()
    torch.testing.assert_close(layer.gate.detach(), start_gate - 0.2)
    assert bool(((start_A - layer.lora_A.detach()) > 2.5e-3).all()), "two steps of 1e-3 and momentum on top"


def test_under_adamw_a_lone_penalty_moves_a_gate_by_its_own_size_and_not_by_the_learning_rate(vit: nn.Module) -> None:
    # The reason for the rule: plain Adam would move every gate by lr per step whatever the penalty is.
    model = slora.inject(vit, slora.SelectiveLoRAConfig(r=2))
    optimizer = torch.optim.AdamW(slora.parameter_groups(model, gate_lr=0.1))
    (1e-3 * slora.gate_penalty(model)).backward()
    optimizer.step()
    slope = 1e-3 / 12
    for gate in gates(model):
        torch.testing.assert_close(gate.detach(), torch.full_like(gate, 0.15 - 0.1 * slope / (1 + slope)))


def test_weight_decay_acts_on_matrices_only(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(slora.parameter_groups(model, lr=0.1, weight_decay=0.5))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for p in model.parameters():
        if p.requires_grad:
            p.grad = torch.zeros_like(p)
    optimizer.step()
    for name, p in model.named_parameters():
        matrix = p.requires_grad and p.dim() > 1
        torch.testing.assert_close(p.detach(), before[name] * (0.95 if matrix else 1.0), msg=name)


@pytest.mark.parametrize(("name", "value"), [("lr", -1e-3), ("gate_lr", float("nan")), ("weight_decay", -0.1)])
def test_values_out_of_range_are_refused(name: str, value: float, model: nn.Module) -> None:
    with pytest.raises(ConfigError, match=f"{name}={value} is negative or not a number"):
        slora.parameter_groups(model, **{name: value})


def test_a_model_with_nothing_to_train_is_refused(vit: nn.Module) -> None:
    vit.requires_grad_(False)
    with pytest.raises(ConfigError, match=r"no trainable parameter; call slora.inject"):
        slora.parameter_groups(vit)
