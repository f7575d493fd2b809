"""Adapted models under torch.func, and recorded by torch.fx, torch.jit, torch.export and torch.onnx."""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, hessian, jvp, vmap

import slora
from slora.errors import StateError
from slora.layers import adapted_layers

Parameters = dict[str, Tensor]
ACTIVE = {"all": (True, True), "some": (True, False), "none": (False, False)}
POLICIES = ["exact", "probe", "frozen"]


class Net(nn.Module):
    """A linear layer of three blocks and one of one."""

    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(4, 12), nn.Linear(12, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.out(torch.tanh(self.qkv(x)))


class Attends(nn.Module):
    """Attention between two linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention = nn.Linear(4, 6), nn.MultiheadAttention(6, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        return self.attention(x, x, x, need_weights=False)[0]


def make(active: str = "some", net: Callable[[], nn.Module] = Net, **config: Any) -> nn.Module:
    model = slora.inject(net(), slora.SelectiveLoRAConfig(r=2, probe_rows=1, **config)).double()
    for i, (_, layer) in enumerate(adapted_layers(model)):
        nn.init.normal_(layer.lora_B)
        with torch.no_grad():
            layer.gate.fill_(0.15 if ACTIVE[active][i % 2] else 0.05)
            if len(layer.gate) > 1:
                layer.gate[1] = 0.05
    return model


def trained(model: nn.Module) -> Parameters:
    return {name: p.detach() for name, p in model.named_parameters() if p.requires_grad}


def by_hand(model: nn.Module, parameters: Parameters, x: Tensor) -> Tensor:
    """What the model computes, with I(gate) = gate - gate.detach() + 0 or 1, for autograd."""
    for name in ("qkv", "out"):
        layer = model.get_submodule(name)
        A, B, gate = (parameters[f"{name}.{key}"] for key in ("lora_A", "lora_B", "gate"))
        on = (gate >= layer.threshold).to(gate.dtype)
        if layer.inactive == "frozen":
            gate = gate * on
        indicator = on + gate - gate.detach()
        inactive = (1 - on)[:, None, None]
        A, B = (t.detach() * inactive + t * (1 - inactive) for t in (A, B))
        delta = (layer.scaling * indicator[:, None, None] * (B @ A)).flatten(0, 1)
        x = nn.functional.linear(x, layer.weight + delta, layer.bias)
        x = torch.tanh(x) if name == "qkv" else x
    return x


def losses(model: nn.Module) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """The loss of the model, and that of the one built by hand."""
    return (
        lambda p, x: functional_call(model, p, (x,)).square().sum(),
        lambda p, x: by_hand(model, p, x).square().sum(),
    )


@pytest.mark.parametrize("backend", ["auto", "reference"])
@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("active", ACTIVE)
def test_gradients_of_each_sample(active: str, policy: str, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLORA_BACKEND", backend)
    model = make(active, inactive=policy)
    ours, hand = losses(model)
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    found = vmap(grad(ours), in_dims=(None, 0))(trained(model), x)
    torch.testing.assert_close(found, vmap(grad(hand), in_dims=(None, 0))(trained(model), x))
    torch.testing.assert_close(grad(ours)(trained(model), x), grad(hand)(trained(model), x))
    torch.testing.assert_close(grad(ours, argnums=1)(trained(model), x), grad(hand, argnums=1)(trained(model), x))


@pytest.mark.parametrize("policy", POLICIES)
def test_an_ensemble_whose_members_have_other_active_blocks(policy: str) -> None:
    model, x = make(inactive=policy), torch.randn(5, 4, dtype=torch.float64)
    members = [trained(make(active)) for active in ACTIVE]
    stacked = {name: torch.stack([member[name] for member in members]) for name in members[0]}
    found = vmap(lambda p: functional_call(model, p, (x,)))(stacked)
    torch.testing.assert_close(found, torch.stack([by_hand(model, member, x) for member in members]))


@pytest.mark.parametrize("active", ACTIVE)
def test_derivatives_along_a_direction_and_of_second_order(active: str) -> None:
    model = make(active, inactive="frozen")
    ours, hand = losses(model)
    p, x = trained(model), torch.randn(3, 4, dtype=torch.float64)
    direction = {name: torch.randn_like(value) for name, value in p.items()}
    found, expected = (jvp(lambda p, f=f: f(p, x), (p,), (direction,)) for f in (ours, hand))
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(hessian(ours)(p, x), hessian(hand)(p, x))


def test_a_compiled_transform_computes_the_same() -> None:
    model = make()
    x = torch.randn(5, 2, 4, dtype=torch.float64)
    torch._dynamo.reset()
    each = vmap(grad(losses(model)[0]), in_dims=(None, 0))
    found = torch.compile(lambda p, x: each(p, x), backend="aot_eager", fullgraph=True)(trained(model), x)
    torch._dynamo.reset()
    torch.testing.assert_close(found, each(trained(model), x))


def test_torch_func_leaves_what_the_model_knows_of_its_gates_alone() -> None:
    model, x = make(), torch.randn(3, 4, dtype=torch.float64)
    y = model(x)
    cache = next(iter(adapted_layers(model)))[1].gate_cache
    copies = cache.copies
    vmap(grad(losses(model)[0]), in_dims=(None, 0))(trained(make("all")), x)
    assert torch.equal(model(x), y)
    assert (cache.copies, cache.step) == (copies, 0)


def test_autocast_and_whole_state_dicts_go_through_torch_func() -> None:
    model, x = make().float(), torch.randn(3, 4)
    everything = {name: p.detach() for name, p in model.named_parameters()}

    def loss(p: Parameters, x: Tensor) -> Tensor:
        with torch.autocast("cpu", torch.bfloat16):
            return functional_call(model, p, (x,)).float().square().sum()

    found = vmap(grad(loss), in_dims=(None, 0))(everything, x[:, None])
    assert {name for name, value in found.items() if value.any()} >= {"qkv.weight", "qkv.lora_A", "out.weight"}


def test_dropout_follows_the_randomness_that_vmap_was_asked_for() -> None:
    model = make("all", lora_dropout=0.5)
    ours, x = losses(model)[0], torch.randn(1, 4, dtype=torch.float64).expand(8, 4)
    same = vmap(ours, in_dims=(None, 0), randomness="same")(trained(model), x)
    assert torch.equal(same, same[:1].expand(8))
    assert len(vmap(ours, in_dims=(None, 0), randomness="different")(trained(model), x).unique()) > 1


@pytest.mark.parametrize("net", [Net, Attends], ids=["linear", "attention"])
@pytest.mark.parametrize("active", ACTIVE)
def test_fx_records_an_adapted_layer_as_one_call(active: str, net: Callable[[], nn.Module]) -> None:
    model, x = make(active, net), torch.randn(2, 3, 4, dtype=torch.float64)
    traced = torch.fx.symbolic_trace(model)
    assert dict(adapted_layers(traced)) == dict(adapted_layers(model))
    assert torch.equal(traced(x), model(x))
    traced(x).sum().backward()
    assert any(layer.lora_A.grad is not None for _, layer in adapted_layers(model)) == (active != "none")


def test_fx_records_attention_of_any_class_as_one_call() -> None:
    class Own(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.in_proj_weight, self.in_proj_bias = nn.Parameter(torch.randn(12, 4)), nn.Parameter(torch.randn(12))

        def forward(self, x: Tensor, scale: float = 1.0) -> Tensor:
            return nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)[0] * scale

    class Holds(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = Own()

        def forward(self, x: Tensor) -> Tensor:
            return self.attention(x=x, scale=2.0)

    model, x = make("all", Holds), torch.randn(2, 3, 4, dtype=torch.float64)
    assert torch.equal(torch.fx.symbolic_trace(model)(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("net", [Net, Attends], ids=["linear", "attention"])
@pytest.mark.parametrize("gradients", [True, False], ids=["grad", "no grad"])
@pytest.mark.parametrize("active", ACTIVE)
def test_a_trace_of_torch_jit_computes_the_same(active: str, gradients: bool, net: Callable[[], nn.Module]) -> None:
    model, x = make(active, net), torch.randn(2, 3, 4, dtype=torch.float64)
    with torch.set_grad_enabled(gradients):
        traced = torch.jit.trace(model.eval(), x)
    buffer = io.BytesIO()
    torch.jit.save(traced, buffer)
    buffer.seek(0)
    torch.testing.assert_close(torch.jit.load(buffer)(x), model(x))


@pytest.mark.parametrize("net", [Net, Attends], ids=["linear", "attention"])
def test_an_exported_program_computes_the_same(net: Callable[[], nn.Module]) -> None:
    model, x = make("some", net).eval(), torch.randn(2, 3, 4, dtype=torch.float64)
    for program in (torch.export.export(model, (x,)), torch.export.export(model, (x,)).run_decompositions()):
        torch.testing.assert_close(program.module()(x), model(x))


@pytest.mark.parametrize(
    ("net", "policy", "strict"),
    [(net, policy, (i + j) % 2 == 0) for i, net in enumerate((Net, Attends)) for j, policy in enumerate(POLICIES)],
)
def test_an_exported_program_takes_more_rows_than_a_probe_reads(
    net: Callable[[], nn.Module], policy: str, strict: bool
) -> None:
    # More rows than the probe's in one input, fewer in the example.
    model = make("some", net, inactive=policy).eval()
    for _, layer in adapted_layers(model):
        layer.probe_rows = 16
    shapes = [((5, 3, 4), (70, 7, 4), 2)] + ([((5, 4), (70, 4), 1)] if net is Net else [])
    for example, larger, dynamic in shapes:
        x = torch.randn(example, dtype=torch.float64)
        sizes = (dict.fromkeys(range(dynamic), torch.export.Dim.DYNAMIC),)
        program = torch.export.export(model, (x,), dynamic_shapes=sizes, strict=strict).module()
        for rows in (larger, example):
            x = torch.randn(rows, dtype=torch.float64)
            torch.testing.assert_close(program(x), model(x))


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::UserWarning", "ignore::torch.jit.TracerWarning")
@pytest.mark.parametrize("net", [Net, Attends], ids=["linear", "attention"])
@pytest.mark.parametrize("dynamo", [False, True])
def test_onnx_takes_an_adapted_model(dynamo: bool, net: Callable[[], nn.Module]) -> None:
    pytest.importorskip("onnxscript" if dynamo else "onnx")
    model, x = make("some", net).float().eval(), torch.randn(2, 3, 4)
    file = io.BytesIO()
    torch.onnx.export(model, (x,), file, dynamo=dynamo)
    assert file.tell()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("net", [Net, Attends], ids=["linear", "attention"])
def test_scripting_is_refused_with_the_remedy(net: Callable[[], nn.Module]) -> None:
    model = make(net=net)
    with pytest.raises(StateError, match=r"torch\.jit\.script cannot read an adapted layer; .*slora\.merge_and_unload"):
        torch.jit.script(model)
    torch.jit.script(slora.merge_and_unload(model))
