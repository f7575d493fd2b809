"""The host's copy of the gates: one per optimizer step, and every change by hand, copy or move is noticed."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import slora
from slora.gates.values import gates
from slora.layers import LoRABlocks, adapted_layers
from tests.gates.gated_models import adapted, deep, gate_cache_of, open_blocks, pickled, set_gates

# Several tests give gates a rule that is not theirs on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::slora.errors.GateRuleWarning")

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
