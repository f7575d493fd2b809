"""`active_blocks` and `summary`: which blocks are active, and what they cost."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import slora
from slora.errors import StateError
from slora.gates.values import gates
from slora.layers import adapted_layers
from slora.ops.flops import count_flops


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


def test_ranks_stand_beside_each_other_where_blocks_of_a_layer_differ(model: nn.Module) -> None:
    qkv: Any = model.get_submodule("blocks.0.attn.qkv")
    qkv.keep_ranks([[0, 1], [], [1]])
    with torch.no_grad():
        qkv.gate.copy_(torch.tensor([0.2, 0.0, 0.2]))
    found = slora.summary(model)
    lines = {line.split()[0]: line.split() for line in str(found).splitlines()}
    assert lines["blocks.0.attn.qkv"][4] == "2/./1"
    assert lines["blocks.1.attn.qkv"][4] == "2"
    assert {row.name: row.ranks for row in found.layers}["blocks.0.attn.qkv"] == (2, 0, 1)
