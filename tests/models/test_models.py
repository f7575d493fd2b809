"""What one asks of a whole adapted model: active blocks, the base alone, optimizer groups, the summary."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import slora
from slora.errors import ConfigError, StateError
from slora.gates.values import gates
from slora.layers import adapted_layers
from slora.ops.flops import count_flops


@pytest.fixture
def model(vit: nn.Module, randomise: Any) -> nn.Module:
    """The ViT with random B, all blocks active."""
    return randomise(slora.inject(vit, slora.SelectiveLoRAConfig(r=2, modules_to_save=["head"])))


def test_active_blocks_lists_every_layer_with_one_flag_per_block(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_submodule("blocks.0.attn.qkv").gate.copy_(torch.tensor([0.2, 0.0, 0.1]))
        model.get_submodule("blocks.1.mlp.fc2").gate.fill_(-1.0)
    found = slora.active_blocks(model)
    assert list(found) == [name for name, _ in adapted_layers(model)]
    assert all(flags.dtype == torch.bool and flags.device.type == "cpu" for flags in found.values())
    assert found["blocks.0.attn.qkv"].tolist() == [True, False, True]
    assert found["blocks.1.mlp.fc2"].tolist() == [False]
    assert sum(int(flags.sum()) for flags in found.values()) == 10


def test_active_blocks_of_a_plain_model_is_empty(vit: nn.Module) -> None:
    assert slora.active_blocks(vit) == {}


# disabled


def test_disabled_runs_the_base_model_and_comes_back(model: nn.Module, vit: nn.Module) -> None:
    x = torch.randn(2, 3, 16, 16)
    adapted = model(x)
    with torch.no_grad():
        for gate in gates(model):
            gate.sub_(1.0)
    base = model(x)
    with torch.no_grad():
        for gate in gates(model):
            gate.add_(1.0)
    assert not torch.equal(adapted, base)
    with slora.disabled(model) as same:
        assert same is model
        assert torch.equal(model(x), base)
        with slora.disabled(model):
            assert torch.equal(model(x), base)
        assert torch.equal(model(x), base)
    assert torch.equal(model(x), adapted)


def test_disabled_ends_with_an_error_inside(model: nn.Module) -> None:
    x = torch.randn(2, 3, 16, 16)
    adapted = model(x)
    with pytest.raises(RuntimeError, match="inside"), slora.disabled(model):
        raise RuntimeError("inside")
    assert torch.equal(model(x), adapted)


def test_disabled_of_a_part_leaves_the_rest_on(model: nn.Module) -> None:
    with slora.disabled(model.blocks[0]):
        assert [layer.enabled for _, layer in adapted_layers(model)] == [False] * 4 + [True] * 4


def test_disabled_needs_no_more_than_the_base_and_gives_the_adapter_no_gradient(model: nn.Module) -> None:
    x = torch.randn(2, 3, 16, 16)
    with slora.disabled(model):
        off = count_flops(model, x)
        model(x).sum().backward()
    assert all(layer.lora_A.grad is None for _, layer in adapted_layers(model))
    assert off < count_flops(model, x)


def test_disabled_of_a_merged_model_is_refused(model: nn.Module) -> None:
    slora.merge(model)
    with (
        pytest.raises(StateError, match=r"its base cannot be run; call slora.unmerge"),
        slora.disabled(model),
    ):
        pass
    assert all(layer.enabled for _, layer in adapted_layers(model))


def test_disabled_runs_the_base_of_released_layers_too(vit: nn.Module) -> None:
    model = slora.inject(vit, slora.SelectiveLoRAConfig(r=2, inactive="frozen"))
    with torch.no_grad():
        for gate in gates(model):
            gate.zero_()
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    assert slora.release_frozen(model) > 0
    with slora.disabled(model):
        assert torch.equal(model(x), expected)


# parameter_groups


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


# summary


def test_summary_counts_blocks_parameters_and_flops(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_submodule("blocks.0.attn.qkv").gate.copy_(torch.tensor([0.2, 0.0, 0.1]))
        model.get_submodule("blocks.1.mlp.fc1").gate.fill_(0.0)
    found = slora.summary(model)
    assert (found.blocks, found.active) == (12, 10)
    assert found.parameters == sum(p.numel() for p in model.parameters())
    assert found.trainable == sum(p.numel() for p in model.parameters() if p.requires_grad)
    rows = {row.name: row for row in found.layers}
    qkv = rows["blocks.0.attn.qkv"]
    assert (qkv.in_features, qkv.out_features, qkv.r, qkv.blocks, qkv.active) == (24, 72, 2, 3, (0, 2))
    assert qkv.lora_parameters == 3 * 2 * 24 + 3 * 24 * 2 + 3
    assert qkv.base_flops == 2 * 24 * 72
    assert qkv.added_flops == 2 * (2 * 24 * 2 + 2 * 2 * 24)
    assert rows["blocks.1.mlp.fc1"].added_flops == 0


@pytest.mark.parametrize("policy", ["exact", "probe", "frozen"])
@pytest.mark.parametrize("released", [False, True])
def test_blocks_that_are_off_for_good_are_not_counted_as_trainable(policy: Any, released: bool, vit: nn.Module) -> None:
    model = slora.inject(vit, slora.SelectiveLoRAConfig(r=2, modules_to_save=["head"], inactive=policy))
    before = slora.summary(model).trainable
    assert before == sum(p.numel() for p in model.parameters() if p.requires_grad)
    with torch.no_grad():
        model.get_submodule("blocks.0.attn.qkv").gate.copy_(torch.tensor([0.2, 0.0, 0.1]))
        model.get_submodule("blocks.1.mlp.fc1").gate.fill_(0.0)
    if released:
        slora.release_frozen(model)
    # One of three blocks of a layer 24 -> 72, and the only block of one 24 -> 96, each with its gate.
    off = (2 * 24 + 24 * 2 + 1) + (2 * 24 + 96 * 2 + 1)
    assert slora.summary(model).trainable == before - (off if policy == "frozen" else 0)


def test_flops_of_the_summary_are_those_that_a_counter_finds(model: nn.Module) -> None:
    x = torch.randn(1, 3, 16, 16)
    with slora.disabled(model):
        base = count_flops(model, x)
    added = count_flops(model, x) - base
    # 5 tokens go through every adapted layer.
    assert added == 5 * sum(row.added_flops for row in slora.summary(model).layers)


def test_summary_prints_as_a_table(model: nn.Module) -> None:
    with torch.no_grad():
        model.get_submodule("blocks.0.attn.qkv").gate.copy_(torch.tensor([0.2, 0.0, 0.1]))
    lines = str(slora.summary(model)).splitlines()
    assert len(lines) == 1 + 8 + 1
    (row,) = (line for line in lines if line.startswith("blocks.0.attn.qkv"))
    assert "24 -> 72" in row
    assert "#.#" in row
    assert "11 of 12 blocks active" in lines[-1]
    assert "% forward FLOPs" in lines[-1]


@pytest.mark.parametrize("released", [False, True])
def test_summary_of_a_model_without_an_active_block_says_that_it_is_the_base(vit: nn.Module, released: bool) -> None:
    model = slora.inject(vit, slora.SelectiveLoRAConfig(r=2, inactive="frozen"))
    with torch.no_grad():
        for gate in gates(model):
            gate.zero_()
    if released:
        slora.release_frozen(model)
    *_, counts, last = str(slora.summary(model)).splitlines()
    assert counts.startswith("0 of 12 blocks active")
    assert last.startswith("no block is active: the model is the base model, but for modules trained in full")


def test_summary_says_that_all_blocks_are_active_only_where_a_threshold_could_tell(model: nn.Module) -> None:
    assert "no gate has moved" in str(slora.summary(model)).splitlines()[-1]
    with torch.no_grad():
        next(iter(adapted_layers(model)))[1].gate[0] = 0.2
    assert str(slora.summary(model)).splitlines()[-1].startswith("all blocks are active: no gate is below")
    for _, layer in adapted_layers(model):
        layer.threshold = -1e9
    assert str(slora.summary(model)).splitlines()[-1].startswith("12 of 12 blocks active")


def test_summary_of_a_merged_or_disabled_model_adds_no_flops(model: nn.Module) -> None:
    with slora.disabled(model):
        assert sum(row.added_flops for row in slora.summary(model).layers) == 0
    slora.merge(model)
    assert sum(row.added_flops for row in slora.summary(model).layers) == 0


def test_summary_of_a_plain_model_is_refused(vit: nn.Module) -> None:
    with pytest.raises(StateError, match=r"no adapted layer; call slora.inject"):
        slora.summary(vit)
