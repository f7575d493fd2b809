"""What inactive blocks cost and learn under `exact`, `probe` and `frozen`."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slora
from slora import reference
from slora.gates.values import gates
from slora.layers import SelectiveLoRALinear, adapted_layers
from slora.ops.flops import count_flops
from tests.gates.gated_models import POLICIES, adapted, off, open_blocks, set_gates

# Several tests give gates a rule that is not theirs on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::slora.errors.GateRuleWarning")


def gate_gradients(model: nn.Module) -> list[Tensor | None]:
    return [gate.grad for gate in gates(model)]


@torch.no_grad()
def exact_gate_gradient(layer: SelectiveLoRALinear, x: Tensor, dy: Tensor) -> Tensor:
    *_, dgate = reference.selective_lora_linear_backward(
        dy, x, layer.weight, layer.lora_A, layer.lora_B, layer.gate, layer.threshold, layer.scaling
    )
    return dgate


@pytest.mark.parametrize("blocks", [1, 3])
@pytest.mark.parametrize("active", [[], [1], [0, 2]], ids=str)
@pytest.mark.parametrize("rows", [(7,), (2, 3, 5)], ids=str)
def test_exact_gives_every_gate_the_gradient_of_the_reference(
    blocks: int, active: list[int], rows: tuple[int, ...]
) -> None:
    active = [i for i in active if i < blocks]
    layer = SelectiveLoRALinear(8, 6, r=2, lora_alpha=3, blocks=blocks, inactive="exact", dtype=torch.float64).double()
    with torch.no_grad():
        layer.lora_B.normal_()
        layer.gate.copy_(torch.tensor([0.15 if i in active else 0.05 for i in range(blocks)]))
    x, dy = torch.randn(*rows, 8).double(), torch.randn(*rows, 6).double()
    layer(x).backward(dy)
    torch.testing.assert_close(layer.gate.grad, exact_gate_gradient(layer, x, dy))


def test_exact_gives_inactive_blocks_no_gradient_but_that_of_their_gate() -> None:
    layer = SelectiveLoRALinear(8, 6, r=2, blocks=3, inactive="exact")
    nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        layer.gate[1] = 0.0
    layer(torch.randn(5, 8)).sum().backward()
    assert not layer.lora_A.grad[1].any()
    assert not layer.lora_B.grad[1].any()
    assert layer.lora_A.grad[0].any()


@pytest.mark.parametrize("policy", POLICIES)
def test_the_output_does_not_depend_on_the_policy(policy: str, make_mlp: Any, randomise: Any) -> None:
    torch.manual_seed(1)
    model = randomise(adapted(make_mlp, 6, 9, 6, inactive=policy), 0.5)
    torch.manual_seed(1)
    other = randomise(adapted(make_mlp, 6, 9, 6, inactive="exact"), 0.5)
    x = torch.randn(4, 6)
    assert torch.equal(model(x), other(x))


@pytest.mark.parametrize("policy", POLICIES)
def test_a_layer_without_active_blocks_is_the_base_layer_bit_for_bit(policy: str) -> None:
    layer = off(SelectiveLoRALinear(8, 6, r=2, blocks=3, inactive=policy))
    nn.init.normal_(layer.lora_B)
    x = torch.randn(5, 8)
    assert torch.equal(layer(x), nn.functional.linear(x, layer.weight, layer.bias))


@pytest.mark.parametrize("policy", POLICIES)
def test_the_output_can_be_changed_in_place(policy: str) -> None:
    for change in (off, nn.Module.train):
        layer = change(SelectiveLoRALinear(8, 6, r=2, inactive=policy))
        x = torch.randn(5, 8, requires_grad=True)
        nn.functional.relu(layer(x), inplace=True).sum().backward()
        plain = nn.functional.relu(nn.functional.linear(x, layer.weight, layer.bias))
        (dx,) = torch.autograd.grad(plain.sum(), x)
        torch.testing.assert_close(x.grad, dx)


def saved_by(call: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        y = call()
    return y, kept


def test_frozen_keeps_no_activation_of_inactive_layers_and_stops_at_the_first_active_block(make_mlp: Any) -> None:
    M, K = 50, 8
    model = adapted(make_mlp, K, K, K, K, K, inactive="frozen")
    set_gates(model, False, False, True, False)
    x = torch.randn(M, K)
    y, kept = saved_by(lambda: model(x))
    parameters = {p.data_ptr() for p in model.parameters()}
    activations = [t for t in kept if t.data_ptr() not in parameters and t.numel() > 3]
    # The third layer keeps x and S, its tanh and that of the fourth layer their outputs. Nothing before, and no x of
    # the fourth, through which dx passes.
    assert sorted(tuple(t.shape) for t in activations) == [(M, 2), (M, K), (M, K), (M, K)]
    dx, dA, narrow = 2 * M * K * K, 2 * M * 2 * K, 2 * M * K * 2
    # Backward: dx of the fourth layer; T, dA and dB of the third; nothing for the first two.
    assert count_flops(lambda: y.sum().backward()) == dx + dA + 2 * narrow
    assert model.fc0.lora_A.grad is None
    assert gate_gradients(model)[:2] == [None, None]
    assert gate_gradients(model)[3] is None
    assert gate_gradients(model)[2] is not None


def test_frozen_with_nothing_active_builds_no_graph_at_all(make_mlp: Any) -> None:
    model = off(adapted(make_mlp, 8, 8, 8, inactive="frozen"))
    y, kept = saved_by(lambda: model(torch.randn(5, 8)))
    assert not y.requires_grad
    assert kept == []
    assert count_flops(model, torch.randn(5, 8)) == 2 * (2 * 5 * 8 * 8)


@pytest.mark.parametrize("policy", ["frozen", "probe"])
def test_a_layer_without_active_blocks_costs_the_base_product(policy: str) -> None:
    layer = off(SelectiveLoRALinear(40, 30, r=4, inactive=policy))
    assert count_flops(layer, torch.randn(20, 40)) == 2 * 20 * 40 * 30


def test_a_probe_keeps_and_reads_only_its_rows() -> None:
    M, K, N, m = 300, 8, 6, 16
    layer = SelectiveLoRALinear(K, N, r=2, inactive="probe", probe_rows=m, gate_init=0.0)
    y, kept = saved_by(lambda: layer(torch.randn(M, K)))
    parameters = {p.data_ptr() for p in layer.parameters()}
    activations = [t for t in kept if t.data_ptr() not in parameters]
    assert [tuple(t.shape) for t in activations] == [(m, K)]
    assert count_flops(lambda: y.sum().backward()) == 2 * m * 2 * K + 2 * m * 2 * N


def probe_schedule(model: nn.Module, steps: int) -> list[list[bool]]:
    """For each step and layer whether the gate of the layer's inactive block got a gradient."""
    optimizer = torch.optim.SGD(gates(model), lr=0.0)
    seen = []
    for _ in range(steps):
        model(torch.randn(4, 6)).sum().backward()
        seen.append([gate.grad is not None for gate in gates(model)])
        optimizer.step()
        optimizer.zero_grad()
    return seen


@pytest.mark.parametrize("order", [(True, False), (False, True)], ids=["active first", "inactive first"])
def test_a_probe_comes_once_in_probe_every_steps(order: tuple[bool, bool], make_mlp: Any) -> None:
    model = adapted(make_mlp, 6, 6, 6, inactive="probe", probe_every=5)
    set_gates(model, *order)
    probed = [step[order.index(False)] for step in probe_schedule(model, 21)]
    assert [i for i, p in enumerate(probed) if p] == [0, 5, 10, 15, 20]


def test_with_nothing_active_every_step_probes(make_mlp: Any) -> None:
    model = adapted(make_mlp, 6, 6, 6, inactive="probe", probe_every=5, gate_init=0.0)
    assert all(all(step) for step in probe_schedule(model, 7))


def test_exact_probes_at_every_step_and_frozen_never(make_mlp: Any) -> None:
    for policy, expected in (("exact", True), ("frozen", False)):
        model = adapted(make_mlp, 6, 6, 6, inactive=policy, probe_every=5)
        set_gates(model, True, False)
        assert [step[1] for step in probe_schedule(model, 7)] == [expected] * 7


def test_an_inactive_block_can_come_back_under_probe(make_mlp: Any) -> None:
    model = adapted(make_mlp, 6, 6, inactive="probe", probe_every=1)
    nn.init.normal_(model.fc0.lora_B)
    x = torch.randn(64, 6)
    with torch.no_grad():
        target = model(x)  # what only the active block gives
    set_gates(model, False)
    optimizer = torch.optim.SGD(gates(model), lr=0.05)
    for _ in range(50):
        (model(x) - target).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        if open_blocks(model) == [True]:
            return
    pytest.fail("the block stayed inactive although the loss asks for it")


def test_the_mean_of_probed_gradients_is_the_exact_one(make_mlp: Any) -> None:
    """Over steps of one model: rows are drawn anew at each probe, and probes come every third step."""
    M, K, N, m, every, steps = 60, 8, 6, 10, 3, 900
    layer = SelectiveLoRALinear(K, N, r=2, blocks=2, inactive="probe", probe_rows=m, probe_every=every)
    nn.init.normal_(layer.lora_B)
    with torch.no_grad():
        layer.gate[1] = 0.05
    x, dy = torch.randn(M, K), torch.randn(M, N)
    exact = exact_gate_gradient(layer, x, dy)
    optimizer = torch.optim.SGD([layer.gate], lr=0.0)
    estimates = []
    for _ in range(steps):
        layer(x).backward(dy)
        estimates.append(float(layer.gate.grad[1]))
        optimizer.step()
        optimizer.zero_grad()
    probed = torch.tensor(estimates[::every])
    assert all(e == 0.0 for i, e in enumerate(estimates) if i % every)
    assert len(set(probed.tolist())) > steps / every / 2, "each probe draws rows of its own"
    # The mean of 300 independent draws, each scaled by `every`: five standard errors.
    error = 5 * float(probed.std()) / math.sqrt(len(probed))
    assert abs(float(probed.mean()) / every - float(exact[1])) < error / every
    assert error / every < 2 * abs(float(exact[1])), "the bound can tell the estimate from 0 or from twice the value"


def test_layers_of_one_model_probe_different_rows(make_mlp: Any) -> None:
    model = adapted(make_mlp, 8, 8, 8, inactive="probe", probe_rows=10, gate_init=0.0)
    x = torch.arange(300.0)[:, None].expand(300, 8)
    _, kept = saved_by(lambda: [model.fc0(x), model.fc1(x)])
    rows = [t[:, 0] for t in kept if t.shape == (10, 8)]
    assert len(rows) == 2
    assert not torch.equal(*rows)


def test_a_probe_over_fewer_rows_than_it_may_read_is_exact() -> None:
    layer = SelectiveLoRALinear(8, 6, r=2, inactive="probe", probe_rows=100, gate_init=0.0)
    nn.init.normal_(layer.lora_B)
    x, dy = torch.randn(30, 8), torch.randn(30, 6)
    layer(x).backward(dy)
    exact = exact_gate_gradient(layer, x, dy)
    torch.testing.assert_close(layer.gate.grad, exact)


@pytest.mark.parametrize("policy", POLICIES)
def test_an_empty_batch_gives_zero_or_no_gradients(policy: str) -> None:
    layer = SelectiveLoRALinear(8, 6, r=2, blocks=2, inactive=policy)
    with torch.no_grad():
        layer.gate[0] = 0.0
    layer(torch.randn(0, 8)).sum().backward()
    assert layer.gate.grad is None or not layer.gate.grad.any()
    assert not layer.lora_A.grad.any()


MOVERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW with the groups of parameter_groups": lambda model: torch.optim.AdamW(
        slora.parameter_groups(model, gate_lr=0.5)
    ),
    "AdamW on everything alike": lambda model: torch.optim.AdamW(gates(model), lr=0.5),
    "SGD with momentum": lambda model: torch.optim.SGD(gates(model), lr=0.5, momentum=0.9),
    "ProximalGates": lambda model: slora.ProximalGates(gates(model), lr=0.5, penalty=1.0),
}


@pytest.mark.parametrize("name", MOVERS)
def test_a_block_that_frozen_switched_off_never_comes_back(name: str, make_mlp: Any, randomise: Any) -> None:
    # Two blocks and gate_lr=0.5: every subgradient step of the penalty is longer than the threshold.
    model = randomise(adapted(make_mlp, 6, 6, 6, inactive="frozen"))
    optimizer = MOVERS[name](model)
    seen = [open_blocks(model)]
    for _ in range(40):
        loss = model(torch.randn(4, 6)).square().mean()
        if name != "ProximalGates":
            loss = loss + slora.gate_penalty(model)
        optimizer.zero_grad()
        # Nothing is left to train once the penalty is not in the loss and every block is off.
        if loss.requires_grad:
            loss.backward()
        optimizer.step()
        seen.append(open_blocks(model))
    assert seen[0] == [True, True]
    assert seen[-1] == [False, False], "every block has to be switched off, or the test shows nothing"
    for block in zip(*seen, strict=True):
        assert list(block) == sorted(block, reverse=True)


def test_every_combination_of_activity_trains_without_error(make_mlp: Any, randomise: Any) -> None:
    for policy, on in itertools.product(POLICIES, itertools.product([True, False], repeat=3)):
        model = randomise(adapted(make_mlp, 5, 7, 6, 5, inactive=policy))
        set_gates(model, *on)
        loss = model(torch.randn(4, 5)).square().sum() + slora.gate_penalty(model)
        loss.backward()
        for (_, layer), active in zip(adapted_layers(model), on, strict=True):
            assert (layer.lora_A.grad is not None and bool(layer.lora_A.grad.any())) == active
            assert layer.gate.grad is not None
