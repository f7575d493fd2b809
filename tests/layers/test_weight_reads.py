"""Weights that a forward reads past their layer: the blocks act there as in a call of the layer, or it is refused."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slora
from slora.errors import TargetError
from slora.layers import adapted_layers
from tests.layers.weight_readers import WAYS, Attention, E, inputs, model_of, plain, randomised

OTHER = ["transposed", "in_chunks", "stacked", "as_a_convolution", "in_attention"]


def by_hand(model: nn.Module, how: str, x: Tensor) -> Tensor:
    """The plain model with `W + I c B A` in place of each weight, differentiable in A, B and, by hand, the gates."""
    state = dict(model.named_parameters())
    for name, layer in adapted_layers(model):
        on = (layer.gate >= 0.1).float()
        through = on.detach() + layer.gate - layer.gate.detach()
        A, B = (
            part * on[:, None, None] + (part * (1 - on[:, None, None])).detach()
            for part in (layer.lora_A, layer.lora_B)
        )
        update = layer.scaling * through[:, None, None] * (B @ A)
        state[f"{name}.weight"] = layer.weight + update.flatten(0, 1)
    base = plain(how)
    return torch.func.functional_call(base, {name: state[name] for name, _ in base.named_parameters()}, (x,))


@pytest.mark.parametrize("how", [*WAYS, "transposed_attribute"])
def test_the_output_is_the_base_bit_for_bit_until_the_first_step(how: str) -> None:
    x = inputs()
    assert torch.equal(model_of(how)(x), plain(how)(x))


@pytest.mark.parametrize("merged", [False, True])
@pytest.mark.parametrize("how", [*WAYS, "transposed_attribute"])
def test_without_gradients_a_read_weight_multiplies_as_the_trainable_one_that_it_was(how: str, merged: bool) -> None:
    # PyTorch multiplies rows that are not contiguous batch by batch where the weight is frozen, which rounds otherwise.
    x = inputs().detach().transpose(0, 1)
    base = nn.Sequential(plain(how)[1])
    model = slora.inject(copy.deepcopy(base), slora.SelectiveLoRAConfig(r=2))
    if merged:
        slora.merge(model)
    with torch.no_grad():
        assert torch.equal(model(x), base(x))


def test_transforms_and_traces_take_a_read_weight_as_it_is() -> None:
    x = inputs().detach()
    model = slora.inject(nn.Sequential(plain("transposed")[1]), slora.SelectiveLoRAConfig(r=2))
    traced = torch.jit.trace(model, x)  # runs again without gradients, and compares the graphs
    with torch.no_grad():
        torch.testing.assert_close(torch.func.vmap(model)(x), model(x))
        torch.testing.assert_close(traced(x), model(x))


@pytest.mark.parametrize("how", [*WAYS, "transposed_attribute"])
def test_output_and_gradients_are_those_of_the_weights_built_by_hand(how: str) -> None:
    model, x = randomised(model_of(how)), inputs()
    y, expected = model(x), by_hand(model, how, x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    leaves = [x, *(p for p in model.parameters() if p.requires_grad)]
    dy = torch.randn_like(y)
    found, wanted = (torch.autograd.grad(out, leaves, dy, allow_unused=True) for out in (y, expected))
    for leaf, *both in zip(leaves, found, wanted, strict=True):
        one, two = (torch.zeros_like(leaf) if grad is None else grad for grad in both)
        # fp32 through three products of at most 16 terms each: 2e-5 of the largest element.
        torch.testing.assert_close(one, two, rtol=0, atol=2e-5 * max(1.0, float(two.abs().max())))


@pytest.mark.parametrize("how", [*WAYS, "transposed_attribute"])
def test_merging_gives_the_adapted_output_and_unloading_the_base(how: str) -> None:
    model, x = randomised(model_of(how)), inputs()
    expected = model(x)
    base = plain(how)
    with slora.disabled(model):
        # A convolution by a frozen weight takes another kernel.
        torch.testing.assert_close(model(x), base(x), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(slora.merge(model)(x), expected, rtol=1e-5, atol=1e-5)
    slora.unmerge(model)
    assert torch.equal(model(x), expected)
    slora.unload(model)
    assert torch.equal(model(x), base.requires_grad_(False)(x))
    for one, two in zip(model.modules(), base.modules(), strict=True):
        assert type(one) is type(two)
        assert one.__dict__.keys() == two.__dict__.keys()


@pytest.mark.parametrize("policy", ["exact", "probe", "frozen"])
@pytest.mark.parametrize("how", ["linear_with_another_bias", "transposed"])
def test_gates_of_inactive_blocks_learn_as_their_policy_says(how: str, policy: str) -> None:
    model = model_of(how, inactive=policy, probe_every=1, probe_rows=10**6)
    layer = model[1].both if "another" in how else model[1].q
    nn.init.normal_(layer.lora_B, std=0.3)
    with torch.no_grad():
        layer.gate.fill_(0.05)
    model(inputs()).square().sum().backward()
    assert layer.lora_B.grad is None or not layer.lora_B.grad.any()
    assert (layer.gate.grad is not None and layer.gate.grad.abs().sum() > 0) == (policy != "frozen")


@pytest.mark.parametrize("how", ["linear_with_another_bias", "called_and_read"])
def test_under_autocast_a_read_by_linear_is_a_call_of_the_layer(how: str) -> None:
    model, x = randomised(model_of(how)), inputs()
    attention = model[1]
    with torch.autocast("cpu", torch.bfloat16):
        y = attention(x)
        if how == "called_and_read":
            hidden = attention.q(x) + attention.q.project(attention.k(x), bias=None)
        else:
            hidden = attention.both.project(x, bias=attention.both_bias)[..., E:]
        expected = attention.out(torch.tanh(hidden))
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)


@pytest.mark.parametrize("how", OTHER)
@pytest.mark.parametrize("precision", ["autocast", "bf16"])
def test_other_reads_in_16_bits_are_refused_in_training_and_served_in_inference(how: str, precision: str) -> None:
    model, x = randomised(model_of(how)), inputs().detach()
    with torch.no_grad():
        for name, layer in adapted_layers(model):
            if name in ("0", "1.out"):
                layer.gate.zero_()
    model, x = (model.bfloat16(), x.bfloat16()) if precision == "bf16" else (model, x)
    with torch.autocast("cpu", torch.bfloat16, enabled=precision == "autocast"):
        with pytest.raises(TargetError, match=r"the weight of '1\.\S+' is read past the layer, in torch.bfloat16"):
            model(x)
        with torch.no_grad():
            y = model(x)
            expected = slora.merge(model)(x)
    # The merged weight is the same sum, which fp32 may round otherwise; then a few elements are one bf16 apart.
    torch.testing.assert_close(y, expected, rtol=0, atol=2**-7 * float(expected.abs().max()))


def test_dropout_on_an_input_that_is_not_known_is_refused() -> None:
    model = model_of("transposed", lora_dropout=0.5)
    with pytest.raises(TargetError, match=r"'1\.q' is read past the layer, so that lora_dropout=0\.5 has no input"):
        model(inputs())
    assert model.eval()(inputs()).shape == (3, 5, E)
    assert model_of("linear_with_another_bias", lora_dropout=0.5)(inputs()).shape == (3, 5, E)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("how", ["linear_with_another_bias", "in_chunks"])
def test_a_copy_reads_its_own_blocks(how: str, copied: Callable[[nn.Module], nn.Module]) -> None:
    model, x = randomised(model_of(how)), inputs()
    twin = copied(model)
    assert torch.equal(twin(x), model(x))
    assert type(twin[1]) is type(model[1])
    nn.init.normal_(twin[1].both.lora_B)
    assert not torch.equal(twin(x), model(x))
    assert list(model.state_dict()) == list(twin.state_dict())
    slora.unload(twin)
    assert type(twin[1]) is Attention


def test_the_module_keeps_its_name_its_signature_and_its_class() -> None:
    model = model_of("transposed")
    assert isinstance(model[1], Attention)
    assert type(model[1]).__name__ == "Attention"
    assert inspect.signature(model[1].forward) == inspect.signature(plain("transposed")[1].forward)
    assert inspect.unwrap(type(model[1]).forward) is Attention.forward


class AsksOnly(nn.Module):
    """Asks for what does not depend on values, and reads weights of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(E))
        self.fc = nn.Linear(E, E)
        nn.init.zeros_(self.fc.weight)

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.fc.weight.dtype).to(self.fc.weight.device).reshape(-1, self.fc.weight.shape[1])
        return self.fc(x) * self.weight


def test_modules_that_read_no_weight_of_a_layer_stay_as_they_are() -> None:
    model = slora.inject(nn.Sequential(AsksOnly()), slora.SelectiveLoRAConfig(r=2))
    assert type(model[0]) is AsksOnly
    assert type(model[0].fc) is slora.SelectiveLoRALinear


class ReadsAttention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.MultiheadAttention(E, 2)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.attn.in_proj_weight)


def test_reading_the_weights_of_whole_attention_is_refused_at_inject() -> None:
    with pytest.raises(TargetError, match=r"'0' reads in_proj_weight of '0.attn' itself"):
        slora.inject(nn.Sequential(ReadsAttention()), slora.SelectiveLoRAConfig(r=2))
