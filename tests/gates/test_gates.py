"""Gates: the host cache, the policies for inactive blocks, the probe, and what moves a score."""

from __future__ import annotations

import copy
import io
import itertools
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slora
from slora import reference
from slora.errors import ConfigError, StateError
from slora.gates.cache import GateCache
from slora.gates.values import gate_values, gates
from slora.layers import LoRABlocks, SelectiveLoRALinear, adapted_layers
from slora.ops.flops import count_flops
from slora.ops.gate_probe import sampled_rows

POLICIES = ["exact", "probe", "frozen"]


def adapted(make_mlp: Callable[..., nn.Module], *widths: int, **config: Any) -> nn.Module:
    config = {"r": 2, "target_modules": r"fc\d+", **config}
    return slora.inject(make_mlp(*widths), slora.SelectiveLoRAConfig(**config))


def gate_cache_of(model: nn.Module) -> GateCache:
    return next(iter(adapted_layers(model)))[1].gate_cache


def set_gates(model: nn.Module, *active: bool) -> None:
    with torch.no_grad():
        for (_, layer), on in zip(adapted_layers(model), active, strict=True):
            layer.gate.fill_(0.15 if on else 0.05)


def off(model: nn.Module) -> nn.Module:
    with torch.no_grad():
        for gate in gates(model):
            gate.zero_()
    return model


def open_blocks(model: nn.Module) -> list[bool]:
    return [bool(on.any()) for on in slora.active_blocks(model).values()]


# Several tests give gates a rule that is not theirs on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::slora.errors.GateRuleWarning")


# The cache


OPTIMIZERS: dict[str, Callable[[list[nn.Parameter]], torch.optim.Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.01),
    "SGD fused": lambda p: torch.optim.SGD(p, lr=0.01, fused=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "AdamW foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "AdamW fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "Adagrad fused": lambda p: torch.optim.Adagrad(p, lr=0.01, fused=True),
    "ProximalGates": lambda p: slora.ProximalGates(p, lr=0.01, penalty=1.0),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_copy_per_optimizer_step_for_the_whole_model(name: str, make_mlp: Any, randomise: Any) -> None:
    model = randomise(adapted(make_mlp, 6, 6, 6, 6, 6))
    cache = gate_cache_of(model)
    optimizer = OPTIMIZERS[name](gates(model))
    for step in range(4):
        before = cache.copies
        for _ in range(2):  # gradient accumulation
            (model(torch.randn(3, 6)).sum() + slora.gate_penalty(model)).backward()
        assert cache.copies == before + 1
        slora.active_blocks(model)
        slora.summary(model)
        assert cache.copies == before + 3, "each looks by itself"
        assert cache.step == step
        optimizer.step()
        optimizer.zero_grad()


def test_injecting_a_model_makes_no_copy_and_its_first_forward_one(vit: nn.Module) -> None:
    model = slora.inject(vit, slora.SelectiveLoRAConfig(r=2))
    assert gate_cache_of(model).copies == 0
    model(torch.randn(1, 3, 16, 16))
    assert gate_cache_of(model).copies == 1


def test_no_copy_without_an_optimizer_step_or_a_change_of_mode(vit: nn.Module) -> None:
    model = slora.inject(vit, slora.SelectiveLoRAConfig(r=2))
    for _ in range(3):
        model.train()(torch.randn(1, 3, 16, 16)).sum().backward()
        with torch.no_grad():
            model(torch.randn(2, 3, 16, 16))
    assert gate_cache_of(model).copies == 1


@pytest.mark.parametrize("name", [n for n in OPTIMIZERS if n != "ProximalGates"])
def test_every_optimizer_step_that_closes_a_block_is_noticed(name: str, make_mlp: Any, randomise: Any) -> None:
    model = randomise(adapted(make_mlp, 6, 6, 6))
    x = torch.randn(3, 6)
    before = model(x)
    optimizer = OPTIMIZERS[name](gates(model))
    for group in optimizer.param_groups:
        group["lr"] = 1.0
    for gate in gates(model):
        gate.grad = torch.ones_like(gate)
    optimizer.step()
    assert all(gate.item() < 0.1 for gate in gates(model))
    assert open_blocks(model) == [False, False]
    assert not torch.equal(model(x), before)
    with slora.disabled(model):
        assert torch.equal(model(x), model(x))


def test_a_compiled_optimizer_step_is_noticed(make_mlp: Any, randomise: Any) -> None:
    model = randomise(adapted(make_mlp, 6, 6, 6))
    assert open_blocks(model) == [True, True]
    optimizer = torch.optim.SGD(gates(model), lr=1.0)
    torch._dynamo.reset()
    step = torch.compile(optimizer.step, backend="eager")
    for _ in range(2):
        was = open_blocks(model)
        for gate in gates(model):
            gate.grad = torch.full_like(gate, 1.0 if was[0] else -1.0)
        step()
        assert open_blocks(model) == [not was[0]] * 2
    torch._dynamo.reset()


EDITS: dict[str, Callable[[LoRABlocks], Any]] = {
    "fill_ under no_grad": lambda layer: layer.gate.fill_(0.05),
    "one element": lambda layer: layer.gate.__setitem__(0, 0.05),
    "an addition": lambda layer: layer.gate.add_(-0.1),
    "a new parameter": lambda layer: setattr(layer, "gate", nn.Parameter(torch.full((1,), 0.05))),
    "load_state_dict": lambda layer: layer.load_state_dict({**layer.state_dict(), "gate": torch.full((1,), 0.05)}),
    "load_state_dict with assign": lambda layer: layer.load_state_dict(
        {**layer.state_dict(), "gate": torch.full((1,), 0.05)}, assign=True
    ),
    "the threshold": lambda layer: setattr(layer, "threshold", 0.3),
    "nn.init": lambda layer: nn.init.constant_(layer.gate, 0.05),
}


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_by_hand_is_noticed_at_the_next_use(edit: str, make_mlp: Any, randomise: Any) -> None:
    model = randomise(adapted(make_mlp, 6, 6, 6))
    x = torch.randn(3, 6)
    model(x)
    with torch.no_grad():
        EDITS[edit](model.fc1)
    assert open_blocks(model) == [True, False]
    with torch.no_grad():
        hidden = torch.tanh(model.fc0(x))
        assert torch.equal(model.fc1(hidden), nn.functional.linear(hidden, model.fc1.weight, model.fc1.bias))


def test_gates_replaced_twice_between_two_uses_are_noticed(make_mlp: Any) -> None:
    # The second one may lie at the address of the first, with the same version.
    model = adapted(make_mlp, 6, 6)
    for value in (0.05, 0.15) * 20:
        model.fc0.gate = nn.Parameter(torch.full((1,), 0.15))
        model.fc0.gate = nn.Parameter(torch.full((1,), value))
        assert open_blocks(model) == [value > 0.1]


def deep(model: nn.Module) -> nn.Module:
    return copy.deepcopy(model)


def pickled(model: nn.Module) -> nn.Module:
    return pickle.loads(pickle.dumps(model))


def saved(model: nn.Module) -> nn.Module:
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


@pytest.mark.parametrize("copied", [deep, pickled, saved], ids=["deepcopy", "pickle", "torch.save"])
def test_a_copy_of_the_model_has_gates_and_a_mirror_of_its_own(copied: Any, make_mlp: Any, randomise: Any) -> None:
    model = randomise(adapted(make_mlp, 6, 6, 6))
    x = torch.randn(3, 6)
    y = model(x)
    twin = copied(model)
    assert gate_cache_of(twin) is not gate_cache_of(model)
    assert len({id(layer.gate_cache) for _, layer in adapted_layers(twin)}) == 1
    copies = gate_cache_of(model).copies
    assert torch.equal(twin(x), y)
    assert gate_cache_of(twin).copies == 1
    set_gates(twin, True, False)
    assert open_blocks(twin) == [True, False]
    assert torch.equal(model(x), y)
    assert gate_cache_of(model).copies == copies
    assert open_blocks(model) == [True, True]
    set_gates(model, False, False)
    assert open_blocks(twin) == [True, False]


def test_moving_a_model_to_another_dtype_keeps_its_activity(make_mlp: Any, randomise: Any) -> None:
    model = randomise(adapted(make_mlp, 6, 6, 6))
    set_gates(model, True, False)
    x = torch.randn(3, 6)
    model(x)
    step = gate_cache_of(model).step
    model.to(torch.float64)
    assert open_blocks(model) == [True, False]
    assert gate_cache_of(model).step == step, "moving is not an optimizer step"
    torch.testing.assert_close(model(x.double()).float(), model.to(torch.float32)(x))


def test_layers_with_different_thresholds_share_one_copy(make_mlp: Any) -> None:
    model = adapted(make_mlp, 6, 6, 6)
    model.fc1.threshold = 0.2
    assert open_blocks(model) == [True, False]
    assert gate_cache_of(model).copies == 1


def test_a_mirror_does_not_keep_layers_alive(make_mlp: Any) -> None:
    model = adapted(make_mlp, 6, 6, 6)
    cache = gate_cache_of(model)
    model(torch.randn(1, 6))
    del model.fc1
    set_gates(model, False)
    assert open_blocks(model) == [False]
    assert len(cache._layers) == 1


@pytest.mark.gpu
def test_a_step_on_the_gpu_synchronises_once(make_mlp: Any, randomise: Any) -> None:
    model = randomise(adapted(make_mlp, 64, 64, 64, 64)).cuda()
    x = torch.randn(8, 64, device="cuda")
    optimizer = torch.optim.AdamW(slora.parameter_groups(model))

    def step() -> None:
        (model(x).square().mean() + slora.gate_penalty(model)).backward()
        optimizer.step()
        optimizer.zero_grad()

    step()
    copies = gate_cache_of(model).copies
    torch.cuda.set_sync_debug_mode("warn")
    try:
        with pytest.warns(UserWarning, match="synchronizing") as caught:
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert gate_cache_of(model).copies == copies + 1
    assert len([w for w in caught if "synchronizing" in str(w.message)]) == 1


# Policies


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


# Sampled rows


def test_sampled_rows_at_the_largest_sizes_do_not_overflow() -> None:
    rows = sampled_rows(2**30, 511, 7)
    assert 0 <= int(rows.min()) <= int(rows.max()) < 2**30
    assert bool((rows.diff() > 0).all())


@pytest.mark.parametrize(("M", "m"), [(7, 3), (50, 16), (5, 4)])
def test_rows_drawn_over_many_seeds_are_uniform(M: int, m: int) -> None:
    draws = 6000
    counts = torch.zeros(M)
    for seed in range(draws):
        counts += torch.bincount(sampled_rows(M, m, seed * 0x10001), minlength=M)
    # A row is drawn at most twice per seed, in independent strata: its count has a variance below draws * m / M.
    # Five standard errors for M <= 50 rows.
    bound = 5 * math.sqrt(draws * m / M)
    assert float((counts - draws * m / M).abs().max()) < bound


def test_rows_of_different_strata_and_seeds_are_uncorrelated() -> None:
    M, m, draws = 1600, 16, 4000
    u = torch.stack([sampled_rows(M, m, seed) - torch.arange(m) * M // m for seed in range(draws)]).double()
    u = (u - u.mean(0)) / u.std(0)
    bound = 5 / math.sqrt(draws)
    across = (u.T @ u / draws - torch.eye(m)).abs().max()
    assert float(across) < bound
    assert float((u[1:] * u[:-1]).mean(0).abs().max()) < bound


# The penalty and the optimizers


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


# Releasing frozen blocks


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


def test_every_combination_of_activity_trains_without_error(make_mlp: Any, randomise: Any) -> None:
    for policy, on in itertools.product(POLICIES, itertools.product([True, False], repeat=3)):
        model = randomise(adapted(make_mlp, 5, 7, 6, 5, inactive=policy))
        set_gates(model, *on)
        loss = model(torch.randn(4, 5)).square().sum() + slora.gate_penalty(model)
        loss.backward()
        for (_, layer), active in zip(adapted_layers(model), on, strict=True):
            assert (layer.lora_A.grad is not None and bool(layer.lora_A.grad.any())) == active
            assert layer.gate.grad is not None


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
