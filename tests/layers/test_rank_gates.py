"""A layer with rank gates computes `W + c * B diag(g) A` wherever it computes, merges or saves."""

from __future__ import annotations

import copy
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slora
from slora.layers import LoRABlocks, adapted_layers


def gated(model: nn.Module, **config: Any) -> list[LoRABlocks]:
    """The adapted layers of `model`, all in fp64 and with random matrices and rank gates, one of which is 0."""
    torch.manual_seed(0)
    slora.inject(model, slora.SelectiveLoRAConfig(**{"r": 3, "lora_alpha": 6, "gate_init": 1.0, **config})).double()
    layers = [layer for _, layer in adapted_layers(model)]
    with torch.no_grad():
        for layer in layers:
            layer.lora_B.normal_()
            gates = layer.add_rank_gate().normal_()
            gates[-1, 1] = 0.0
    return layers


def weight_by_hand(layer: LoRABlocks, A: Tensor, B: Tensor, g: Tensor) -> Tensor:
    """`W + c * B diag(g) A`, with every block active; `c` is 6 / 3."""
    parts = zip(layer.base_weight.chunk(len(g)), A, B, g, strict=True)
    return torch.cat([w + 2.0 * b @ torch.diag(d) @ a for w, a, b, d in parts])


def test_output_and_all_gradients_are_those_of_the_formula() -> None:
    model = nn.Sequential(nn.Linear(5, 9))
    (layer,) = gated(model, blocks=3)
    assert layer.rank_gate is not None
    x = torch.randn(7, 5, dtype=torch.float64)
    parts = [p.detach().clone().requires_grad_() for p in (layer.lora_A, layer.lora_B, layer.rank_gate)]
    expected = x @ weight_by_hand(layer, *parts).T + layer.base_bias
    found = model(x)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-12)
    dy = torch.randn_like(found)
    found.backward(dy)
    expected.backward(dy)
    for own, part in zip((layer.lora_A, layer.lora_B, layer.rank_gate), parts, strict=True):
        torch.testing.assert_close(own.grad, part.grad, rtol=1e-12, atol=1e-12)


def test_a_second_call_sees_gates_that_a_step_has_moved() -> None:
    model = nn.Sequential(nn.Linear(5, 9))
    (layer,) = gated(model)
    x = torch.randn(4, 5, dtype=torch.float64)
    for _ in range(2):
        model(x).sum().backward()
        with torch.no_grad():
            layer.rank_gate += 1.0  # type: ignore[operator]
        expected = x @ weight_by_hand(layer, layer.lora_A, layer.lora_B, layer.rank_gate).T + layer.base_bias  # type: ignore[arg-type]
        torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)


def test_without_rank_gates_the_operands_of_the_last_call_are_used_again() -> None:
    model = slora.inject(nn.Sequential(nn.Linear(5, 9)), slora.SelectiveLoRAConfig(r=3, gate_init=1.0))
    layer: Any = model[0]
    x = torch.randn(4, 5)
    model(x)
    before = layer._ready
    model(x)
    assert before is not None
    assert layer._ready is before
    assert [name for name, _ in layer.named_parameters()] == ["weight", "bias", "lora_A", "lora_B", "gate"]
    layer.add_rank_gate()
    model(x)
    assert layer._ready is None


def test_attention_with_three_blocks_on_its_in_projection_is_scaled_too() -> None:
    attention = nn.MultiheadAttention(6, 2, batch_first=True)
    model = nn.ModuleDict({"attn": attention})
    layers = gated(model, target_modules=["attn"])
    layer = layers[0]
    x, other = torch.randn(2, 4, 6, dtype=torch.float64), torch.randn(2, 3, 6, dtype=torch.float64)
    by_hand = nn.MultiheadAttention(6, 2, batch_first=True).double()
    by_hand.load_state_dict({name: p for name, p in model["attn"].state_dict().items() if name in by_hand.state_dict()})
    with torch.no_grad():
        by_hand.in_proj_weight.copy_(weight_by_hand(layer, layer.lora_A, layer.lora_B, layer.rank_gate))  # type: ignore[arg-type]
    for arguments in ((x, x, x), (x, other, other)):
        found, expected = model["attn"](*arguments)[0], by_hand(*arguments)[0]
        torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_compiled_disabled_merged_fused_and_copied_models_all_know_the_gates(fresh_dynamo: None) -> None:
    model = nn.Sequential(nn.Linear(5, 9))
    (layer,) = gated(model)
    x = torch.randn(4, 5, dtype=torch.float64)
    with torch.no_grad():
        expected = model(x)
        tight = {"rtol": 1e-12, "atol": 1e-12}
        torch.testing.assert_close(torch.compile(model, backend="aot_eager")(x), expected, **tight)
        torch.testing.assert_close(copy.deepcopy(model)(x), expected, **tight)
        torch.testing.assert_close(pickle.loads(pickle.dumps(model))(x), expected, **tight)
        torch.testing.assert_close(layer.fuse()(x), expected, **tight)  # type: ignore[operator]
        with slora.disabled(model):
            torch.testing.assert_close(model(x), nn.functional.linear(x, layer.weight, layer.bias), **tight)  # type: ignore[arg-type]
        slora.merge(model)
        torch.testing.assert_close(model(x), expected, **tight)
        slora.unmerge(model)
        norm = 2.0 * torch.linalg.matrix_norm(layer.lora_B[0] @ torch.diag(layer.rank_gate[0]) @ layer.lora_A[0])  # type: ignore[index]
        assert float(slora.selection.update_norm(model)) == pytest.approx(float(norm), rel=1e-6)
        torch.testing.assert_close(slora.merge_and_unload(model)(x), expected, **tight)


def test_gates_stay_fp32_in_a_model_that_is_cast_and_are_in_its_state_dict() -> None:
    model = slora.inject(nn.Sequential(nn.Linear(5, 9)), slora.SelectiveLoRAConfig(r=3))
    layer: Any = model[0]
    layer.add_rank_gate()
    model.to(torch.bfloat16)
    assert layer.rank_gate.dtype == torch.float32
    state = {name: value + 1 for name, value in model.state_dict().items()}
    model.load_state_dict(state)
    assert torch.equal(layer.rank_gate, torch.full((1, 3), 2.0))
    groups = {group["name"]: group for group in slora.parameter_groups(model, lr=0.5, weight_decay=0.1)}
    assert groups["rank_gates"]["params"] == [layer.rank_gate]
    assert (groups["rank_gates"]["lr"], groups["rank_gates"]["weight_decay"]) == (0.5, 0.0)


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_folding_keeps_every_bit_and_removing_ranks_keeps_the_scaling(rslora: bool, tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(5, 9))
    (layer,) = gated(model, blocks=3, use_rslora=rslora)
    x = torch.randn(4, 5, dtype=torch.float64)
    before, scaling, B, A = model(x), layer.scaling, layer.effective_B.detach().clone(), layer.lora_A.detach().clone()
    layer.fold_rank_gate()
    assert layer.rank_gate is None
    assert torch.equal(model(x), before)
    layer.keep_ranks([[0, 2], [], [1]])
    assert (layer.r, layer.block_ranks()) == (2, [2, 0, 1])
    assert layer.scaling == pytest.approx(scaling, rel=1e-15)
    update = torch.zeros(3, 3, 5, dtype=torch.float64)
    update[0] = B[0][:, [0, 2]] @ A[0][[0, 2]]
    update[2] = B[2][:, [1]] @ A[2][[1]]
    expected = x @ (layer.base_weight + scaling * update.flatten(0, 1)).T + layer.base_bias
    torch.testing.assert_close(model(x), expected, rtol=1e-12, atol=1e-12)
    assert layer.lora_A.requires_grad
    layer.keep_ranks([[], [], []])
    assert layer.r == 1
