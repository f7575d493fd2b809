"""`SelectiveLoRALinear` in `torch.compile` and in CUDA graphs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import slora
from slora import ops
from tests.layers.linear_by_hand import layer_of

pytestmark = pytest.mark.usefixtures("poisoned")


def compiled_of(layer: Callable[..., Any]) -> Callable[..., Any]:
    # aot_eager: everything but the code generation of inductor, which a test of a whole ViT block covers.
    return torch.compile(layer, fullgraph=True, backend="aot_eager")


@pytest.mark.parametrize("policy", ["exact", "probe", "frozen"])
def test_what_a_cuda_graph_records_depends_on_no_gate_but_those_frozen_for_good(
    policy: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer = layer_of(inactive=policy, probe_rows=4)
    x = torch.randn(7, 10)
    listed = []
    compute = ops.apply
    monkeypatch.setattr(ops, "apply", lambda *args: listed.append(args[3].active) or compute(*args))
    for gates, expected in (([0.15, 0.0, 0.15], [None]), ([0.0, 0.0, 0.0], [] if policy == "frozen" else [None])):
        with torch.no_grad():
            layer.gate.copy_(torch.tensor(gates))
        y = layer(x)
        listed.clear()
        with slora.gates_on_device():
            torch.testing.assert_close(layer(x), y)
        assert listed == expected
        layer(x)
        assert listed[len(expected) :] == [tuple(i for i, gate in enumerate(gates) if gate)] * any(gates)


def test_gates_that_were_raised_unseen_are_left_to_the_device_by_a_cuda_graph() -> None:
    layer, x = layer_of(inactive="frozen"), torch.randn(7, 10)
    with torch.no_grad():
        layer.gate.zero_()
    base = layer(x)
    with torch.no_grad():
        layer.gate[1] = 0.15
    with slora.gates_on_device():
        y = layer(x)
    torch.testing.assert_close(y, layer(x))
    assert not torch.equal(y, base)


@pytest.mark.parametrize("policy", ["exact", "probe", "frozen"])
def test_a_compiled_layer_has_one_graph_and_the_same_results_while_gates_move(policy: str, fresh_dynamo: Any) -> None:
    layer = layer_of(inactive=policy, probe_rows=4, probe_every=1)
    compiled = compiled_of(layer)
    x = torch.randn(7, 10, requires_grad=True)
    names = ("y", "x", "lora_A", "lora_B", "gate")

    def run(call: Callable[..., Tensor]) -> dict[str, Tensor]:
        leaves = (x, layer.lora_A, layer.lora_B, layer.gate)
        y = call(x)
        found = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
        grads = [torch.zeros_like(leaf) if g is None else g for leaf, g in zip(leaves, found, strict=True)]
        return dict(zip(names, [y.detach(), *grads], strict=True))

    run(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for gates in ([0.15, 0.15, 0.15], [0.15, 0.0, 0.15], [0.0, 0.0, 0.0], [0.1, 0.0999, 0.2]):
            with torch.no_grad():
                layer.gate.copy_(torch.tensor(gates))
            one, two = run(compiled), run(layer)
            for name in names:
                # Under probe a compiled graph reads other rows than eager mode: see the next test.
                if name != "gate" or policy != "probe" or min(gates) >= 0.1:
                    torch.testing.assert_close(one[name], two[name], msg=name)


def test_a_compiled_probe_is_an_estimate_from_other_rows_at_each_call(fresh_dynamo: Any) -> None:
    layer = layer_of(inactive="probe", probe_rows=4, gate_init=0.0)
    compiled, x = compiled_of(layer), torch.randn(7, 10)
    drawn = set()
    for call in range(8):
        layer.gate.grad = None
        torch.manual_seed(call)
        compiled(x).sum().backward()
        torch.manual_seed(call)
        rows = slora.ops.gate_probe.sampled_rows(7, 4, layer._seed + torch.randint(2**31, ()))
        drawn.add(tuple(rows.tolist()))
        *_, expected = slora.reference.selective_lora_linear_backward(
            torch.ones(4, 12), x[rows], layer.weight, layer.lora_A, layer.lora_B, layer.gate, 0.1, layer.scaling
        )
        torch.testing.assert_close(layer.gate.grad, expected.detach() * 7 / 4)
    assert len(drawn) > 1


def test_a_compiled_layer_draws_new_dropout_masks_and_uses_them_backward(fresh_dynamo: Any) -> None:
    layer = layer_of(lora_dropout=0.5, inactive="exact")
    compiled = compiled_of(layer)
    x = torch.randn(7, 10)
    assert not torch.equal(compiled(x), compiled(x))
    # y is linear in B: <dB, B> is the low-rank part of the output, whatever the mask was.
    y = compiled(x)
    y.sum().backward()
    low_rank = (y - F.linear(x, layer.weight, layer.bias)).sum()
    torch.testing.assert_close((layer.lora_B.grad * layer.lora_B).sum(), low_rank, rtol=1e-4, atol=1e-4)


def test_a_compiled_layer_runs_under_autocast(fresh_dynamo: Any) -> None:
    layer = layer_of()

    def run(x: Tensor) -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return layer(x)

    x = torch.randn(7, 10)
    y = compiled_of(run)(x)
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y, run(x))
