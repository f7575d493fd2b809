"""When gates are read again: after writes that move no version counter, and never within a backward pass."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import slora
from slora.gates.values import gates
from slora.layers import LoRABlocks, SelectiveLoRAAttention, SelectiveLoRALinear, adapted_layers
from tests.gates.gated_models import gate_cache_of

pytestmark = pytest.mark.filterwarnings("ignore::slora.errors.GateRuleWarning")


def adapted(make_mlp: Callable[..., nn.Module], **config: Any) -> nn.Module:
    """Two layers, the first active and the second not; both would add something."""
    model = slora.inject(make_mlp(6, 6, 6), slora.SelectiveLoRAConfig(r=2, target_modules=r"fc\d+", **config))
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_B)
    nn.init.zeros_(model.fc1.gate)
    return model


def by_hand(model: nn.Module, x: Tensor) -> Tensor:
    for layer in (model.fc0, model.fc1):
        on = (layer.gate >= layer.threshold)[:, None, None]
        delta = (layer.scaling * on * (layer.lora_B @ layer.lora_A)).flatten(0, 1)
        x = torch.tanh(nn.functional.linear(x, layer.weight + delta, layer.bias))
    return x


def average(gates: list[nn.Parameter], values: list[Tensor]) -> None:
    """As `copy_to` of diffusers' `EMAModel` and of torch_ema does, without foreach."""
    for parameter, value in zip(gates, values, strict=True):
        parameter.data.copy_(value.to(parameter.device).data)


def each(write: Callable[[nn.Parameter, Tensor], object]) -> Callable[[list[nn.Parameter], list[Tensor]], None]:
    def all_(gates: list[nn.Parameter], values: list[Tensor]) -> None:
        for gate, value in zip(gates, values, strict=True):
            write(gate, value)

    return all_


WRITES: dict[str, Callable[[list[nn.Parameter], list[Tensor]], object]] = {
    "copy_to": average,
    "copy_to with foreach": lambda g, v: torch._foreach_copy_([p.data for p in g], v),
    "data =": each(lambda p, value: setattr(p, "data", value.clone())),
    "data.add_": each(lambda p, value: p.data.add_(value - p.data)),
    "numpy": each(lambda p, value: p.detach().numpy().__setitem__(slice(None), value.numpy())),
    "foreach under no_grad": lambda g, v: torch.no_grad()(torch._foreach_copy_)(g, v),
    "set_": each(lambda p, value: torch.no_grad()(p.set_)(value.clone())),
}


def swap(model: nn.Module, write: str) -> None:
    """Turn the first layer off and the second on."""
    WRITES[write](gates(model), [torch.tensor([0.05]), torch.tensor([0.15])])


def known(model: nn.Module) -> nn.Module:
    """Let the host know of the gates as they are."""
    model(torch.randn(2, 6)).sum().backward()
    return model


@pytest.mark.parametrize("write", WRITES)
def test_what_reports_saves_or_merges_a_model_reads_its_gates_again(write: str, make_mlp: Any, tmp_path: Any) -> None:
    x = torch.randn(3, 6)
    plain = make_mlp(6, 6, 6)
    first = adapted(make_mlp)
    plain.load_state_dict(first.state_dict(), strict=False)

    def written() -> nn.Module:
        model = known(copy.deepcopy(first))
        swap(model, write)
        return model

    expected = by_hand(written(), x)
    assert [bool(on) for on in slora.active_blocks(written()).values()] == [False, True]
    assert [layer.active for layer in slora.summary(written()).layers] == [(), (0,)]
    slora.save_adapter(written(), tmp_path)
    torch.testing.assert_close(slora.load_adapter(copy.deepcopy(plain), tmp_path)(x), expected)
    torch.testing.assert_close(slora.merge(written())(x), expected)
    torch.testing.assert_close(slora.merge_and_unload(written())(x), expected)
    fused = written()
    y = torch.tanh(fused.fc1.fuse()(torch.tanh(fused.fc0.fuse()(x))))
    torch.testing.assert_close(y, expected)


@pytest.mark.parametrize("write", WRITES)
def test_evaluation_and_the_training_after_it_read_gates_again(write: str, make_mlp: Any) -> None:
    model, x = known(adapted(make_mlp)), torch.randn(3, 6)
    before = [gate.detach().clone() for gate in gates(model)]
    swap(model, write)
    torch.testing.assert_close(model.eval()(x), by_hand(model, x))
    WRITES[write](gates(model), before)
    torch.testing.assert_close(model.train()(x), by_hand(model, x))


@pytest.mark.parametrize("write", WRITES)
def test_a_training_forward_is_right_once_the_active_blocks_were_asked_for(write: str, make_mlp: Any) -> None:
    model, x = known(adapted(make_mlp)), torch.randn(3, 6)
    swap(model, write)
    slora.active_blocks(model)
    torch.testing.assert_close(model(x), by_hand(model, x))
    assert torch.autograd.grad(model(x).sum(), model.fc1.lora_B)[0].any()


def test_an_optimizer_that_writes_through_data_is_noticed(make_mlp: Any) -> None:
    class Old(torch.optim.Optimizer):
        def step(self, closure: Any = None) -> None:
            for group in self.param_groups:
                for p in group["params"]:
                    p.data.add_(p.grad.data, alpha=-1.0)

    model, x = known(adapted(make_mlp)), torch.randn(3, 6)
    optimizer = Old(gates(model), {})
    model.fc0.gate.grad, model.fc1.gate.grad = torch.tensor([0.1]), torch.tensor([-0.2])
    optimizer.step()
    torch.testing.assert_close(model(x), by_hand(model, x))


def test_release_frees_no_block_that_was_switched_on_unseen(make_mlp: Any) -> None:
    model = known(adapted(make_mlp, inactive="frozen"))
    swap(model, "copy_to")
    slora.release_frozen(model)
    assert (model.fc0.released, model.fc1.released) == (True, False)


def test_a_choice_of_blocks_is_made_among_those_that_are_active(make_mlp: Any) -> None:
    model = known(adapted(make_mlp))
    swap(model, "copy_to")
    slora.keep_blocks(model, 1)
    assert [bool(on) for on in slora.active_blocks(model).values()] == [False, True]


def test_looking_again_is_no_move_of_the_gates(make_mlp: Any) -> None:
    model = known(adapted(make_mlp))
    cache, x = gate_cache_of(model), torch.randn(3, 6)
    for _ in range(3):
        for mode in (False, True):
            model.train(mode)
            model(x)
            slora.active_blocks(model)
        model.train()
    assert cache.step == 0
    swap(model, "copy_to")
    model.eval()(x)
    assert cache.step == 1
    model.train()
    torch.optim.SGD(gates(model), lr=0.1).step()
    model.eval()
    model(x)
    assert cache.step == 2


def test_a_change_of_mode_costs_one_copy_for_the_whole_model(make_mlp: Any) -> None:
    model = known(adapted(make_mlp))
    copies = gate_cache_of(model).copies
    for _ in range(3):
        model.train()(torch.randn(3, 6))
    assert gate_cache_of(model).copies == copies, "as loops call it at each step"
    model.eval()
    for _ in range(3):
        model(torch.randn(3, 6))
    assert gate_cache_of(model).copies == copies + 1


# Settings by hand


def test_a_setting_changed_by_hand_takes_effect_at_the_next_forward(make_mlp: Any) -> None:
    model, x = adapted(make_mlp, inactive="exact"), torch.randn(3, 6)

    def probed() -> bool:
        return bool(torch.autograd.grad(model(x).sum(), model.fc1.gate, allow_unused=True)[0] is not None)

    assert probed()
    model.fc1.inactive = "frozen"
    assert not probed()
    model.fc1.inactive = "probe"
    assert probed()
    torch.optim.SGD(gates(model), lr=0.0).step()
    assert not probed(), "nine of ten steps have no probe"
    model.fc1.probe_every = 1
    assert probed()
    assert gate_cache_of(model).step == 1
    y = model(x)
    model.fc1.threshold = 0.0
    assert not torch.equal(model(x), y)
    torch.testing.assert_close(model(x), by_hand(model, x))


# Recomputation


class Checkpointed(nn.Module):
    """Blocks whose activations are computed again in the backward."""

    def __init__(self, depth: int, **how: Any) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Tanh()) for _ in range(depth))
        self.attention = nn.MultiheadAttention(6, 1, batch_first=True)
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = checkpoint(block, x, **self.how) if self.how else block(x)
        call = lambda x: self.attention(x, x.flip(0), x * 2)[0]  # noqa: E731
        return checkpoint(call, x, **self.how) if self.how else call(x)


HOW: dict[str, dict[str, Any]] = {
    "reentrant": {"use_reentrant": True},
    "not reentrant": {"use_reentrant": False},
    "unchecked": {"use_reentrant": False, "determinism_check": "none"},
}


def deep(**how: Any) -> nn.Module:
    torch.manual_seed(0)
    model = slora.inject(Checkpointed(3, **how), slora.SelectiveLoRAConfig(r=2, probe_every=2, probe_rows=3))
    for i, (_, layer) in enumerate(adapted_layers(model)):
        nn.init.normal_(layer.lora_B)
        if i % 2:
            nn.init.zeros_(layer.gate)
    return model


def rate(parameter: Tensor) -> float:
    return 0.3 if parameter.dim() == 1 else 0.01


def step_in_backward(model: nn.Module) -> list[torch.optim.Optimizer]:
    """One optimizer for each parameter, stepped as soon as its gradient is there."""
    optimizers = []
    for parameter in (p for p in model.parameters() if p.requires_grad):
        optimizer = torch.optim.SGD([parameter], lr=rate(parameter))
        optimizers.append(optimizer)

        def step(p: Tensor, optimizer: torch.optim.Optimizer = optimizer) -> None:
            optimizer.step()
            optimizer.zero_grad()

        parameter.register_post_accumulate_grad_hook(step)
    return optimizers


@pytest.mark.parametrize("how", HOW)
def test_steps_in_the_backward_train_checkpointed_layers_as_steps_after_it(how: str) -> None:
    inside, after = deep(**HOW[how]), deep()
    keep = step_in_backward(inside)
    optimizer = torch.optim.SGD([{"params": [p], "lr": rate(p)} for p in after.parameters() if p.requires_grad])
    moved = set()
    for _ in range(6):
        x = torch.randn(4, 3, 6, requires_grad=True)
        y, expected = inside(x), after(x)
        torch.testing.assert_close(y, expected)
        y.square().mean().backward()
        expected.square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        for name, parameter in after.named_parameters():
            torch.testing.assert_close(inside.get_parameter(name), parameter, msg=lambda m, n=name: f"{n}: {m}")
        moved.add(tuple(bool(on) for flags in slora.active_blocks(inside).values() for on in flags))
        assert str(slora.active_blocks(inside)) == str(slora.active_blocks(after))
    assert len(moved) > 1, "no block was switched"
    assert gate_cache_of(inside).step == gate_cache_of(after).step
    assert keep


@pytest.mark.parametrize("how", HOW)
def test_recomputation_decides_as_its_forward_did_while_every_gate_moves(how: str) -> None:
    results = []
    for moving in (False, True):
        model = deep(**HOW[how])
        layers: list[LoRABlocks] = [layer for _, layer in adapted_layers(model)]
        x = torch.randn(4, 3, 6, generator=torch.Generator().manual_seed(1), requires_grad=True)
        y = model(x)

        def move(gradient: Tensor, layers: list[LoRABlocks] = layers) -> None:
            slora.gates.set_gates({layer: [0.0 if layer.activity().active else 1.0] * layer.blocks for layer in layers})

        if moving:
            y.register_hook(move)
        y.square().sum().backward()
        results.append({name: p.grad for name, p in model.named_parameters() if p.grad is not None})
        if moving:
            assert [layer.gate[0].item() for layer in layers] == [float(i % 2) for i in range(len(layers))]
            torch.testing.assert_close(model(x), copy.deepcopy(model)(x))
    assert results[0].keys() == results[1].keys()
    for name, gradient in results[0].items():
        assert torch.equal(results[1][name], gradient), name


def test_kinds_of_layers_are_those_meant() -> None:
    assert {type(layer) for _, layer in adapted_layers(deep())} == {SelectiveLoRALinear, SelectiveLoRAAttention}
