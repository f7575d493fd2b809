"""Adapted layers under casts, moves between devices and deferred initialisation."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slora
from slora.errors import GateRuleWarning, StateError
from slora.layers import LoRABlocks, SelectiveLoRALinear, adapted_layers

OWN = ("lora_A", "lora_B", "gate")


class Reads(nn.Module):
    """Attention of no known class, with a linear layer beside it."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(24, 8))
        self.in_proj_bias = nn.Parameter(torch.randn(24))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = nn.functional.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, -1)
        return nn.functional.scaled_dot_product_attention(q, k, v)


class Whole(nn.Module):
    """One layer of each adapted class, two levels deep."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.ModuleDict(
            {"linear": nn.Linear(8, 8), "attention": nn.MultiheadAttention(8, 2), "own": Reads()}
        )
        self.norm = nn.LayerNorm(8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.inner["linear"](x)
        return self.norm(self.inner["own"](self.inner["attention"](x, x, x)[0]))


def adapted(**config: Any) -> nn.Module:
    model = slora.inject(Whole(), slora.SelectiveLoRAConfig(r=2, **config))
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_B)
    return model


def own(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] in OWN}


def values(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in own(model).items()}


def base(model: nn.Module) -> dict[str, Tensor]:
    return {name: p for name, p in model.named_parameters() if name.rpartition(".")[2] not in OWN}


def in_train_of(model: nn.Module, dtype: torch.dtype) -> None:
    """As `prepare_model_for_...` functions do: module by module, children first."""
    model.apply(lambda module: module.to(dtype))


CASTS: dict[str, tuple[torch.dtype, Callable[[nn.Module], Any]]] = {
    "to(bfloat16)": (torch.bfloat16, lambda m: m.to(torch.bfloat16)),
    "to(device, dtype)": (torch.float16, lambda m: m.to("cpu", torch.float16, non_blocking=True)),
    "to(tensor)": (torch.bfloat16, lambda m: m.to(torch.zeros((), dtype=torch.bfloat16))),
    "half": (torch.float16, nn.Module.half),
    "bfloat16": (torch.bfloat16, nn.Module.bfloat16),
    "type": (torch.float16, lambda m: m.type(torch.float16)),
    "each module": (torch.bfloat16, lambda m: in_train_of(m, torch.bfloat16)),
    "through double": (torch.float16, lambda m: m.double().half()),
}


@pytest.fixture(params=["set data", "overwrite", "swap"])
def conversion(request: pytest.FixtureRequest) -> Iterator[None]:
    """Each of the ways in which PyTorch puts a converted parameter in place of the old one."""
    overwrite, swap = request.param == "overwrite", request.param == "swap"
    torch.__future__.set_overwrite_module_params_on_conversion(overwrite)
    torch.__future__.set_swap_module_params_on_conversion(swap)
    yield
    torch.__future__.set_overwrite_module_params_on_conversion(False)
    torch.__future__.set_swap_module_params_on_conversion(False)


@pytest.mark.usefixtures("conversion")
@pytest.mark.parametrize("cast", CASTS)
def test_a_cast_of_the_model_leaves_gates_and_blocks_in_fp32(cast: str) -> None:
    model, before = adapted(), None
    dtype, change = CASTS[cast]
    x = torch.randn(3, 2, 8)
    model(x).square().sum().backward()
    before = values(model)
    gradients = {name: p.grad.clone() for name, p in own(model).items()}
    change(model)
    assert {p.dtype for p in base(model).values()} == {dtype}
    for name, parameter in own(model).items():
        assert parameter.dtype == torch.float32
        assert torch.equal(parameter, before[name])
        assert parameter.grad is not None
        assert parameter.grad.dtype == torch.float32
        assert torch.equal(parameter.grad, gradients[name])
        assert parameter.requires_grad
    y = model(x.to(dtype))
    assert y.dtype == dtype
    y.sum().backward()


def test_a_small_penalty_moves_gates_of_a_model_in_16_bits() -> None:
    model = adapted().to(torch.bfloat16)
    gates = slora.gates.gates(model)
    optimizer = slora.ProximalGates(gates, lr=1e-3, penalty=0.1)
    before = torch.cat([gate.detach() for gate in gates])
    optimizer.step()
    moved = before - torch.cat([gate.detach() for gate in gates])
    # Below half a unit in the last place of bf16 at 0.15, which is 2^-11.
    torch.testing.assert_close(moved, torch.full_like(moved, 1e-4 / len(moved)), rtol=1e-2, atol=1e-8)


def test_a_cast_of_the_model_changes_no_activity() -> None:
    model = adapted(threshold=0.1, gate_init=0.1 - 2**-20)
    with torch.no_grad():
        model(torch.randn(3, 2, 8))
    model.bfloat16()
    assert not any(on.any() for on in slora.active_blocks(model).values())


def test_double_widens_blocks_and_gates_and_float_takes_them_back() -> None:
    model = adapted()
    before = values(model)
    model.double()
    assert {p.dtype for p in model.parameters()} == {torch.float64}
    model(torch.randn(3, 2, 8, dtype=torch.float64)).sum().backward()
    model.float()
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert all(torch.equal(parameter, before[name]) for name, parameter in own(model).items())


def test_moves_reach_every_parameter() -> None:
    model = adapted()
    model(torch.randn(3, 2, 8)).sum().backward()
    model.to("meta", torch.bfloat16)
    assert all(p.is_meta for p in model.parameters())
    assert {p.dtype for p in own(model).values()} == {torch.float32}
    model.to_empty(device="cpu")
    assert not any(p.is_meta for p in model.parameters())
    assert {p.dtype for p in own(model).values()} == {torch.float32}


@pytest.mark.parametrize("assign", [False, True])
def test_a_state_of_16_bits_is_loaded_into_fp32(assign: bool) -> None:
    model = adapted()
    state = {name: value.bfloat16() for name, value in model.state_dict().items()}
    model.load_state_dict(state, assign=assign)
    assert {p.dtype for p in own(model).values()} == {torch.float32}
    assert all(torch.equal(p, state[name].float()) for name, p in own(model).items())
    assert all(value.dtype == torch.bfloat16 for value in state.values()), "the caller's own"


def test_models_of_transformers_keep_their_gates_in_fp32() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16
    )
    for change in (lambda m: m.half(), lambda m: m.to(dtype=torch.bfloat16), lambda m: m.bfloat16()):
        model = slora.inject(transformers.LlamaForCausalLM(config), slora.SelectiveLoRAConfig(r=2))
        change(model)
        assert {p.dtype for p in own(model).values()} == {torch.float32}
        model(torch.randint(0, 40, (1, 5))).logits.sum().backward()


OPTIMIZERS: dict[str, Callable[[nn.Module], torch.optim.Optimizer]] = {
    "AdamW": lambda model: torch.optim.AdamW(slora.parameter_groups(model)),
    "ProximalGates": lambda model: slora.ProximalGates(slora.gates.gates(model)),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_gates_that_someone_has_made_16_bits_wide_are_pointed_out(name: str) -> None:
    model = adapted()
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16()
    model(torch.randn(3, 2, 8, dtype=torch.bfloat16)).sum().backward()
    optimizer = OPTIMIZERS[name](model)
    with pytest.warns(GateRuleWarning, match=r"gates are torch.bfloat16.*gate\.data = .*float\(\)"):
        optimizer.step()


# Deferred initialisation


def is_new(layer: LoRABlocks, gate_init: float) -> None:
    bound = 1 / math.sqrt(layer.lora_A.shape[2])
    assert bool((layer.gate == gate_init).all())
    assert not layer.lora_B.any()
    for A in layer.lora_A:
        # Uniform with this bound: the largest of n values is below 0.7 of it once in 0.7^n.
        assert 0.7 * bound < A.abs().max() <= bound


@pytest.mark.usefixtures("poisoned")
@pytest.mark.parametrize("how", ["inject", "context"])
def test_a_model_made_on_the_meta_device_gets_its_blocks_by_reset_parameters(how: str) -> None:
    whole = Whole()
    config = slora.SelectiveLoRAConfig(r=2, gate_init=0.3)
    with torch.device("meta"):
        model = Whole()
        if how == "context":
            slora.inject(model, config)
    if how == "inject":
        slora.inject(model, config)
    model.to_empty(device="cpu")
    model.load_state_dict(whole.state_dict(), strict=False)
    for _, layer in adapted_layers(model):
        layer.reset_parameters()
        is_new(layer, 0.3)
    assert all(bool(on.all()) for on in slora.active_blocks(model).values())
    x = torch.randn(3, 2, 8)
    assert torch.equal(model(x), whole(x)), "the base is what was loaded"
    model(x).sum().backward()


def test_reset_parameters_starts_an_adapter_again_and_leaves_the_base_alone() -> None:
    model = adapted(gate_init=0.2)
    before = {name: p.detach().clone() for name, p in base(model).items()}
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.gate.zero_()
    model(torch.randn(3, 2, 8))
    for _, layer in adapted_layers(model):
        layer.reset_parameters()
        is_new(layer, 0.2)
    assert all(bool(on.all()) for on in slora.active_blocks(model).values())
    assert all(torch.equal(p, before[name]) for name, p in base(model).items())


def test_a_layer_made_by_hand_on_the_meta_device_is_initialised_in_two_calls() -> None:
    layer = SelectiveLoRALinear(8, 6, r=2, gate_init=0.25, device="meta").to_empty(device="cpu")
    torch.manual_seed(1)
    nn.Linear.reset_parameters(layer)
    layer.reset_parameters()
    torch.manual_seed(1)
    expected = SelectiveLoRALinear(8, 6, r=2, gate_init=0.25)
    assert all(torch.equal(value, expected.state_dict()[name]) for name, value in layer.state_dict().items())


def test_resetting_a_merged_or_released_layer_is_refused() -> None:
    model = adapted()
    slora.merge(model)
    with pytest.raises(StateError, match=r"is merged; call slora\.unmerge\(model\)"):
        model.inner["linear"].reset_parameters()
    layer = SelectiveLoRALinear(8, 6, r=2, inactive="frozen")
    nn.init.zeros_(layer.gate)
    slora.release_frozen(layer)
    with pytest.raises(StateError, match=r"matrices were freed"):
        layer.reset_parameters()


ASKS: dict[str, Callable[[nn.Module, Any], Any]] = {
    "forward": lambda model, _: model(torch.randn(2, 3, 8)),
    "summary": lambda model, _: slora.summary(model),
    "active_blocks": lambda model, _: slora.active_blocks(model),
    "save_adapter": lambda model, path: slora.save_adapter(model, path / "adapter"),
    "keep_blocks": lambda model, _: slora.keep_blocks(model, 1),
}


@pytest.mark.parametrize("call", ASKS)
def test_gates_without_values_are_refused_with_what_gives_them_some(call: str, tmp_path: Any) -> None:
    model = adapted().to("meta")
    with pytest.raises(StateError, match=r"on meta, .*to_empty\(device=\.\.\.\), .*reset_parameters\(\)"):
        ASKS[call](model, tmp_path)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("dropout", [0.0, 0.5])
@pytest.mark.parametrize("inactive", ["probe", "exact", "frozen"])
def test_a_model_on_meta_tells_the_shapes_of_its_output_and_gradients(inactive: str, dropout: float) -> None:
    model = adapted(inactive=inactive, lora_dropout=dropout).to("meta")
    y = model(torch.randn(2, 3, 8, device="meta"))
    assert y.is_meta
    assert y.shape == (2, 3, 8)
    y.sum().backward()
    for name, p in own(model).items():
        assert p.grad is not None, name
        assert p.grad.shape == p.shape
    with torch.no_grad():
        assert model.eval()(torch.randn(2, 3, 8, device="meta")).is_meta
