"""`inject` and `unload` on every model family: the same bits at first, then what learns, and the way back."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slora
from slora.errors import StateError
from slora.layers import SelectiveLoRALinear, adapted_layers
from slora.models.injection_record import injection
from tests.models.adapting import Config, assert_unchanged, names_of, small, state_of


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_after_injection_the_output_is_the_base_model_bit_for_bit(family: Any, training: bool, slow_path: None) -> None:
    model = family.build().train(training)
    inputs = family.inputs()

    def run() -> list[Tensor]:
        torch.manual_seed(5)
        found = [family.run(model, *inputs)]
        torch.manual_seed(5)
        with torch.no_grad():
            return [*found, family.run(model, *inputs)]

    expected = run()
    slora.inject(model, small())
    for one, two in zip(run(), expected, strict=True):
        assert torch.equal(one, two)
    with slora.disabled(model):
        for one, two in zip(run(), expected, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("how", ["autocast", "bf16 model"])
def test_in_bf16_the_output_is_the_base_model_bit_for_bit(family: Any, how: str, slow_path: None) -> None:
    model, inputs = family.build().eval(), family.inputs()
    if how == "bf16 model":
        model.bfloat16()
        inputs = [t.bfloat16() if t.is_floating_point() else t for t in inputs]

    def run() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
            return family.run(model, *inputs)

    expected = run()
    slora.inject(model, small())
    assert all(layer.lora_A.dtype == layer.gate.dtype == torch.float32 for _, layer in adapted_layers(model))
    assert torch.equal(run(), expected)


def test_in_inference_fused_kernels_of_the_base_agree_up_to_rounding(family: Any) -> None:
    model = family.build().eval()
    inputs = family.inputs()
    with torch.no_grad():
        expected = family.run(model, *inputs)
        slora.inject(model, small())
        # Outputs are normalised, so of order 1; two layers of fp32 sums in another order stay far below this.
        torch.testing.assert_close(family.run(model, *inputs), expected, rtol=1e-5, atol=1e-5)


def test_base_keys_are_unchanged_and_only_the_adapter_is_new_and_trainable(family: Any) -> None:
    model = family.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    slora.inject(model, small())
    after = model.state_dict()
    assert [name for name in after if name in before] == list(before)
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    new = {name for name in after if name not in before}
    assert new == {f"{name}.{p}" for name in names_of(model) for p in ("lora_A", "lora_B", "gate")}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == new


def test_every_block_learns_and_the_base_stays(family: Any, randomise: Any) -> None:
    model = randomise(slora.inject(family.build(), small(inactive="exact")), 0.6)
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    inputs = family.inputs()
    optimizer = torch.optim.AdamW(slora.parameter_groups(model))
    before = family.run(model.eval(), *inputs).detach()
    family.run(model.train(), *inputs).square().mean().backward()
    for name, layer in adapted_layers(model):
        active = layer.gate >= 0.1
        for i in range(layer.blocks):
            for p in (layer.lora_A, layer.lora_B):
                assert (p.grad is not None and bool(p.grad[i].any())) == bool(active[i]), name
        assert layer.gate.grad.all(), name
    optimizer.step()
    assert not torch.equal(family.run(model.eval(), *inputs), before)
    for name, p in model.named_parameters():
        if name in base:
            assert torch.equal(p, base[name]), name
            assert p.grad is None


def test_merging_gives_the_output_of_the_adapted_model_and_unmerging_the_old_bits(
    family: Any, randomise: Any, slow_path: None
) -> None:
    model = randomise(slora.inject(family.build().eval(), small()), 0.6)
    inputs = family.inputs()
    base = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        expected = family.run(model, *inputs)
        slora.merge(model)
        torch.testing.assert_close(family.run(model, *inputs), expected, rtol=1e-4, atol=1e-4)
        slora.unmerge(model)
        assert torch.equal(family.run(model, *inputs), expected)
    for name, p in model.named_parameters():
        assert torch.equal(p, base[name]), name


def test_unload_gives_the_plain_model_back(family: Any, randomise: Any, slow_path: None) -> None:
    model = family.build().eval()
    inputs = family.inputs()
    expected = family.run(model, *inputs)
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    fused = state_of(model)["fused"]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    randomise(slora.inject(model, small()))
    family.run(model, *inputs)
    assert slora.unload(model) is model
    assert [(name, type(module)) for name, module in model.named_modules()] == kinds
    assert state_of(model)["fused"] == fused
    assert list(model.state_dict()) == list(state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert not any(p.requires_grad for p in model.parameters()), "the base stays frozen, as documented"
    for p in model.parameters():
        p.requires_grad_(True)
    assert torch.equal(family.run(model, *inputs), expected)
    slora.inject(model, small())
    assert len(names_of(model)) == family.adapted


def test_a_copy_of_an_adapted_model_is_adapted_and_independent(family: Any, randomise: Any) -> None:
    model = randomise(slora.inject(family.build().eval(), small()))
    inputs = family.inputs()
    expected = family.run(model, *inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(family.run(twin, *inputs), expected)
    with torch.no_grad():
        for _, layer in adapted_layers(twin):
            layer.gate.zero_()
    assert not torch.equal(family.run(twin, *inputs), expected)
    assert torch.equal(family.run(model, *inputs), expected)
    assert injection(twin).config == injection(model).config


def test_base_dtype_is_kept_by_the_weights_of_adapted_layers_only(vit: nn.Module) -> None:
    model = slora.inject(vit, small(base_dtype=torch.bfloat16, modules_to_save=["head"]))
    for name, layer in adapted_layers(model):
        assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16, name
        assert layer.lora_A.dtype == torch.float32
    assert model.head.weight.dtype == model.patch_embed.proj.weight.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(2, 3, 16, 16))
    y.float().sum().backward()
    assert model.get_submodule("blocks.0.attn.qkv").lora_B.grad.any()


def test_without_a_config_the_defaults_hold(vit: nn.Module) -> None:
    assert injection(slora.inject(vit)).config == Config()


def test_a_part_of_a_model_can_be_adapted_alone(vit: nn.Module) -> None:
    slora.inject(vit.blocks[1], small())
    assert {name.split(".")[1] for name in names_of(vit)} == {"1"}
    assert vit.blocks[0].attn.qkv.weight.requires_grad


def test_unloading_a_merged_model_is_refused(vit: nn.Module, randomise: Any) -> None:
    model = slora.merge(randomise(slora.inject(vit, small())))
    before = state_of(model)
    with pytest.raises(StateError, match=r"'blocks.0.attn.qkv' is merged; call slora.unmerge\(model\) first"):
        slora.unload(model)
    assert_unchanged(model, before)


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6)
        self.two = self.one
        self.deep = nn.Sequential(self.one, nn.Tanh(), nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.deep(self.two(torch.tanh(self.one(x))))


def test_a_module_in_several_places_is_adapted_once_and_stands_in_all_of_them(randomise: Any) -> None:
    model = Shared()
    x = torch.randn(3, 6)
    expected = model(x)
    slora.inject(model, small())
    assert model.one is model.two is model.deep[0]
    assert isinstance(model.one, SelectiveLoRALinear)
    assert len(names_of(model)) == 2
    assert torch.equal(model(x), expected)
    randomise(model)
    one = model.one
    weight = one.weight + one.scaling * one.lora_B[0] @ one.lora_A[0]
    step = torch.tanh(F.linear(x, weight, one.bias))
    torch.testing.assert_close(
        model(x), model.deep[2](torch.tanh(F.linear(F.linear(step, weight, one.bias), weight, one.bias)))
    )
    slora.unload(model)
    assert type(model.one) is nn.Linear
    assert model.one is model.two is model.deep[0]
    assert torch.equal(model(x), expected)


def test_hooks_stay_on_their_modules_and_can_be_removed(vit: nn.Module) -> None:
    seen: list[str] = []
    layer = vit.get_submodule("blocks.0.mlp.fc1")
    handle = layer.register_forward_hook(lambda *_: seen.append("fc1"))
    model = slora.inject(vit, small())
    x = torch.randn(1, 3, 16, 16)
    model(x)
    assert seen == ["fc1"]
    slora.unload(model)
    model(x)
    assert seen == ["fc1", "fc1"]
    handle.remove()
    model(x)
    assert seen == ["fc1", "fc1"]


def test_a_hook_that_replaces_the_output_still_does(vit: nn.Module) -> None:
    vit.get_submodule("blocks.1.mlp.fc2").register_forward_hook(lambda m, i, y: torch.zeros_like(y))
    x = torch.randn(1, 3, 16, 16)
    expected = vit(x)
    assert torch.equal(slora.inject(vit, small())(x), expected)


def compiled_results(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    y = call(x)
    y.square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **found}


@pytest.mark.once
def test_a_vit_block_compiled_by_inductor_is_one_graph_that_serves_while_gates_move(
    vit: nn.Module, randomise: Any, fresh_dynamo: None
) -> None:
    model = randomise(slora.inject(vit.blocks[0], small(inactive="exact")))
    x = torch.randn(2, 5, 24)
    compiled = torch.compile(model, fullgraph=True)
    compiled_results(model, compiled, x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for share in (1.0, 0.5, 0.0):
            randomise(model, share)
            one, two = compiled_results(model, compiled, x), compiled_results(model, model, x)
            assert one.keys() == two.keys() | {n for n in one if "lora_" in n}
            for name in two:
                torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5, msg=name)


def test_every_family_compiles_to_one_graph(family: Any, randomise: Any, fresh_dynamo: None) -> None:
    model = randomise(slora.inject(family.build().eval(), small(inactive="exact")), 0.6)
    inputs = family.inputs()

    def run(*inputs: Tensor) -> Tensor:
        return family.run(model, *inputs)

    expected = run(*inputs)
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
