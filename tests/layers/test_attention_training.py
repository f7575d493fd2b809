"""Attention after training: output and gradients by hand, gates of query, key and value, compilation."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tests.layers.attention_modules import B, E, H, L, adapt, attention, inputs, open_clip_attention

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask"),
]


def attention_by_hand(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Multi-head attention in fp64 with `W + c B A` built by hand; batch first; returns (output, weights)."""

    def weight_of(layer: Any, weight: Tensor) -> Tensor:
        weight = weight.double().clone()
        if hasattr(layer, "lora_A"):
            n = weight.shape[0] // layer.blocks
            for i in range(layer.blocks):
                if layer.gate[i].item() >= 0.1:
                    update = layer.lora_B[i].double() @ layer.lora_A[i].double()
                    weight[i * n : (i + 1) * n] += layer.lora_alpha / layer.r * update
        return weight

    W, out = weight_of(module, module.in_proj_weight), weight_of(module.out_proj, module.out_proj.weight)
    b = module.in_proj_bias.double()
    q, k, v = (
        (t.double() @ W[i * E : (i + 1) * E].T + b[i * E : (i + 1) * E]).unflatten(-1, (H, E // H)).transpose(1, 2)
        for i, t in enumerate((query, key, value))
    )
    scores = q @ k.transpose(-2, -1) / math.sqrt(E // H)
    if mask is not None:
        scores = scores.masked_fill(mask, float("-inf"))
    weights = scores.softmax(-1)
    y = (weights @ v).transpose(1, 2).flatten(2)
    return y @ out.T + module.out_proj.bias.double(), weights.mean(1)


@pytest.mark.parametrize("blocks", [3, 6])
@pytest.mark.parametrize("kind", ["self", "key is value", "all different"])
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
@pytest.mark.parametrize("open_blocks", [[0], [1], [2], [0, 2], [0, 1, 2], []], ids=str)
def test_after_training_output_and_gradients_are_those_of_the_weights_built_by_hand(
    open_blocks: list[int], batch_first: bool, need_weights: bool, kind: str, blocks: int
) -> None:
    config = {"blocks": 6, "out_proj": False} if blocks == 6 else {}
    ours = adapt(attention(batch_first=batch_first), trained=True, inactive="frozen", **config).double()
    with torch.no_grad():
        third = blocks // 3
        ours.gate.copy_(torch.tensor([0.15 if i // third in open_blocks else 0.05 for i in range(blocks)]))
    arguments = tuple(t.double() for t in inputs("all different", batch_first, True))
    arguments = {
        "self": arguments[:1] * 3,
        "key is value": (arguments[0], arguments[1], arguments[1]),
        "all different": arguments,
    }[kind]
    for t in arguments:
        t.requires_grad_()
    mask = torch.zeros(L, arguments[1].shape[1 if batch_first else 0], dtype=torch.bool)
    mask[0, 1:] = True
    y, weights = ours(*arguments, attn_mask=mask, need_weights=need_weights)
    firsts = [t if batch_first else t.transpose(0, 1) for t in arguments]
    expected, expected_weights = attention_by_hand(ours, *firsts, mask)
    expected = expected if batch_first else expected.transpose(0, 1)
    torch.testing.assert_close(y, expected)
    if need_weights:
        torch.testing.assert_close(weights, expected_weights)
    leaves = list({id(t): t for t in [*arguments, ours.lora_A, ours.lora_B]}.values())
    found = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
    wanted = torch.autograd.grad(expected.square().sum(), leaves, allow_unused=True)
    for one, two in zip(found, wanted, strict=True):
        assert (one is None or not one.any()) == (two is None or not two.any())
        if two is not None and one is not None:
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("part", [0, 1, 2], ids=["query", "key", "value"])
def test_each_of_query_key_and_value_is_selected_by_its_own_gate(part: int) -> None:
    ours = adapt(attention(), trained=True)
    with torch.no_grad():
        ours.gate.copy_(torch.tensor([0.15 if i == part else 0.05 for i in range(3)]))
    x = torch.randn(B, L, E)
    projected = ours.project(x)
    base = F.linear(x, ours.in_proj_weight, ours.in_proj_bias)
    for i in range(3):
        same = torch.equal(projected[..., i * E : (i + 1) * E], base[..., i * E : (i + 1) * E])
        assert same == (i != part)


@pytest.mark.parametrize("kind", ["self", "key is value", "all different"])
@pytest.mark.parametrize("policy", ["exact", "probe", "frozen"])
def test_gates_of_inactive_projections_learn_as_their_policy_says(kind: str, policy: str) -> None:
    ours = adapt(attention(), trained=True, inactive=policy, probe_every=1)
    with torch.no_grad():
        ours.gate.copy_(torch.tensor([0.05, 0.15, 0.05]))
    arguments = inputs(kind, True, True)
    ours(*arguments)[0].square().sum().backward()
    gate = ours.gate.grad.clone()
    assert bool(gate[1])
    assert bool(gate[0]) == bool(gate[2]) == (policy != "frozen")
    if policy == "frozen":
        return
    # Straight-through: the gradient of a factor on each block's update, 0 or 1 at present.
    on = torch.tensor([0.0, 1.0, 0.0]).double().requires_grad_()
    parts = []
    for i, t in enumerate(arguments):
        rows = slice(i * E, (i + 1) * E)
        update = F.linear(F.linear(t.double(), ours.lora_A[i].double()), ours.lora_B[i].double())
        base = F.linear(t.double(), ours.in_proj_weight[rows].double(), ours.in_proj_bias[rows].double())
        parts.append((base + ours.scaling * on[i] * update).unflatten(-1, (H, E // H)).transpose(1, 2))
    y = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
    ours.out_proj.double()(y).square().sum().backward()
    torch.testing.assert_close(gate.double(), on.grad, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("which", ["nn.MultiheadAttention", "open_clip"])
def test_compiled_attention_has_one_graph_and_the_same_results_while_gates_move(which: str) -> None:
    torch._dynamo.reset()
    ours = adapt(
        attention() if which == "nn.MultiheadAttention" else open_clip_attention(), trained=True, inactive="exact"
    )
    x = torch.randn(B, L, E, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return ours(x, x, x, need_weights=False)[0] if which == "nn.MultiheadAttention" else ours(x)

    def results(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        y = call(x)
        leaves = (x, ours.lora_A, ours.lora_B, ours.gate, ours.out_proj.lora_A, ours.out_proj.gate)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for gates in ([0.15, 0.15, 0.15], [0.05, 0.15, 0.05], [0.15, 0.05, 0.15]):
            with torch.no_grad():
                ours.gate.copy_(torch.tensor(gates))
            for one, two in zip(results(compiled), results(run), strict=True):
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
