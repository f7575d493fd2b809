"""`SelectiveLoRALinear` as a layer: construction, output, gradients, dropout, copies, and the way back."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

import slora
from slora.errors import ConfigError, ShapeError
from slora.layers import SelectiveLoRALinear
from tests.layers.linear_by_hand import by_hand, layer_of

pytestmark = pytest.mark.usefixtures("poisoned")


def test_parameters_have_the_documented_names_shapes_and_dtypes() -> None:
    layer = SelectiveLoRALinear(10, 12, r=2, lora_alpha=3, blocks=3, dtype=torch.bfloat16)
    assert {name: (tuple(p.shape), p.dtype, p.requires_grad) for name, p in layer.named_parameters()} == {
        "weight": ((12, 10), torch.bfloat16, False),
        "bias": ((12,), torch.bfloat16, False),
        "lora_A": ((3, 2, 10), torch.float32, True),
        "lora_B": ((3, 4, 2), torch.float32, True),
        "gate": ((3,), torch.float32, True),
    }
    assert isinstance(layer, nn.Linear)
    assert "r=2, lora_alpha=3.0, blocks=3, inactive='probe'" in repr(layer)


def test_a_new_layer_starts_with_zero_B_published_gates_and_kaiming_A() -> None:
    layer = layer_of(400, 12, r=10, trained=False)
    assert not layer.lora_B.any()
    assert torch.equal(layer.gate, torch.full((3,), 0.15))
    # Kaiming-uniform with a = sqrt(5): U(-1/sqrt(K), 1/sqrt(K)), of standard deviation 1/sqrt(3K).
    bound = 1 / math.sqrt(400)
    A = layer.lora_A.detach()
    assert float(A.abs().max()) <= bound
    n = A.numel()
    # The variance of a uniform variable's square is 4/45 bound^4.
    error = 5 * math.sqrt(4 / 45 / n) * bound**2
    assert abs(float(A.square().mean()) - bound**2 / 3) < error


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
def test_scaling_is_alpha_over_r_or_its_root(rslora: bool) -> None:
    layer = layer_of(r=4, lora_alpha=6, use_rslora=rslora)
    assert layer.scaling == (3.0 if rslora else 1.5)


@pytest.mark.parametrize("blocks", [1, 3, 4])
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("shape", [(), (7,), (2, 5), (2, 3, 4)], ids=str)
def test_output_is_that_of_the_weight_built_by_hand(blocks: int, bias: bool, shape: tuple[int, ...]) -> None:
    layer = layer_of(blocks=blocks, bias=bias)
    with torch.no_grad():
        layer.gate[0] = 0.15 if blocks == 1 else 0.0
    x = torch.randn(*shape, 10)
    torch.testing.assert_close(layer(x).double(), by_hand(layer, x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("layout", ["contiguous", "transposed", "sliced"])
def test_until_the_first_step_the_output_is_the_base_layer_bit_for_bit(bias: bool, layout: str) -> None:
    base = nn.Linear(10, 12, bias=bias)
    x = {
        "contiguous": torch.randn(4, 7, 10),
        "transposed": torch.randn(7, 4, 10).transpose(0, 1),
        "sliced": torch.randn(4, 9, 10)[:, 2:],
    }[layout]
    expected = base(x)
    layer = SelectiveLoRALinear.from_linear(base, slora.SelectiveLoRAConfig(r=2), name="qkv")
    assert torch.equal(layer(x), expected)
    with torch.no_grad():
        assert torch.equal(layer(x), expected)
        layer.gate.fill_(0.0)
        assert torch.equal(layer(x), expected)


@pytest.mark.parametrize(
    ("name", "out", "blocks"),
    [("blocks.0.attn.qkv", 30, 3), ("qkv", 30, 3), ("qkv", 20, 1), ("to_qkv", 30, 1), ("fc1", 30, 1), ("", 30, 1)],
)
def test_a_fused_qkv_gets_three_blocks_and_everything_else_one(name: str, out: int, blocks: int) -> None:
    layer = SelectiveLoRALinear.from_linear(nn.Linear(10, out), slora.SelectiveLoRAConfig(r=2), name=name)
    assert layer.blocks == blocks


def test_from_linear_shares_parameters_hooks_mode_and_the_rest() -> None:
    linear = nn.Linear(10, 12).eval()
    seen: list[str] = []
    handle = linear.register_forward_hook(lambda *_: seen.append("forward"))
    linear.register_forward_pre_hook(lambda *_: seen.append("pre"))
    linear.register_full_backward_hook(lambda *_: seen.append("backward"))
    linear.note = "kept"
    layer = SelectiveLoRALinear.from_linear(linear, slora.SelectiveLoRAConfig(r=2))
    assert layer.weight is linear.weight
    assert layer.bias is linear.bias
    assert not layer.training
    assert layer.note == "kept"
    layer(torch.randn(2, 10, requires_grad=True)).sum().backward()
    assert seen == ["pre", "forward", "backward"]
    handle.remove()
    layer(torch.randn(2, 10))
    assert seen == ["pre", "forward", "backward", "pre"]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"blocks": 5}, "blocks=5 does not divide out_features=12"),
        ({"r": 11}, "r=11 is above min(in_features, out_features)=10"),
        ({"r": 0}, "r=0 is not a rank; use an integer from 1 to 256"),
        ({"r": -1}, "r=-1 is not a rank"),
        ({"r": 257}, "r=257 is not a rank"),
        ({"lora_dropout": 1.0}, "lora_dropout=1.0"),
        ({"inactive": "sleeping"}, "inactive='sleeping' is unknown; use one of exact, probe, frozen"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_settings_that_do_not_fit_are_refused_at_construction(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        layer_of(**settings)
    assert message in str(raised.value)
    assert "''" not in str(raised.value), "a layer made by hand has no name to print"


def test_a_refused_layer_leaves_the_linear_as_it_was() -> None:
    linear = nn.Linear(10, 12)
    before = dict(linear.__dict__)
    with pytest.raises(ConfigError, match=r"of 'block\.fc'; use a divisor"):
        SelectiveLoRALinear.from_linear(linear, slora.SelectiveLoRAConfig(r=2, blocks=5), name="block.fc")
    assert linear.__dict__ == before
    assert linear.weight.requires_grad


def test_inputs_that_do_not_fit_are_refused() -> None:
    with pytest.raises(ShapeError, match=r"x has shape \[2, 9\] and weight \[12, 10\]"):
        layer_of()(torch.randn(2, 9))
    with pytest.raises(ShapeError, match=r"weight has .* torch.bfloat16 but x has .* torch.float32; run under"):
        layer_of(dtype=torch.bfloat16)(torch.randn(2, 10))


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("policy", ["frozen", "probe", "exact"])
def test_an_input_that_does_not_fit_is_refused_in_the_same_words_where_no_block_is_active(
    policy: str, bias: bool
) -> None:
    layer = SelectiveLoRALinear(16, 12, r=2, inactive=policy, bias=bias)
    nn.init.zeros_(layer.gate)
    for shape in ((15,), (2, 15), (2, 3, 15)):
        with pytest.raises(ShapeError, match=r"x has shape \[.*15\] and weight \[12, 16\]; expected x \[\.\.\., K\]"):
            layer(torch.randn(shape))


def test_frozen_parameters_get_no_gradient_and_the_others_do() -> None:
    layer = layer_of()
    x = torch.randn(5, 10, requires_grad=True)
    layer(x).square().sum().backward()
    assert layer.weight.grad is None
    assert layer.bias.grad is None
    for t in (x, layer.lora_A, layer.lora_B, layer.gate):
        assert t.grad is not None
        assert t.grad.any()


def test_gradients_are_those_of_the_weight_built_by_hand() -> None:
    layer = layer_of()
    x = torch.randn(5, 10, requires_grad=True)
    layer(x).square().sum().backward()
    found = x.grad, layer.lora_A.grad, layer.lora_B.grad
    wanted = torch.autograd.grad(by_hand(layer, x).square().sum(), (x, layer.lora_A, layer.lora_B))
    for ours, expected in zip(found, wanted, strict=True):
        torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)


def test_activation_checkpointing_gives_the_same_gradients_with_dropout_on() -> None:
    layer = layer_of(lora_dropout=0.4)
    with torch.no_grad():
        layer.gate[1] = 0.0
    x = torch.randn(5, 10, requires_grad=True)
    gradients = []
    for call in (layer, lambda t: checkpoint(layer, t, use_reentrant=False)):
        torch.manual_seed(4)
        parameters = (x, layer.lora_A, layer.lora_B, layer.gate)
        gradients.append(torch.autograd.grad(call(x).square().sum(), parameters))
    for one, two in zip(*gradients, strict=True):
        assert torch.equal(one, two)


def test_dropout_acts_on_the_low_rank_path_in_training_only() -> None:
    layer = layer_of(lora_dropout=0.5)
    x = torch.randn(50, 10)
    one, two = layer(x), layer(x)
    assert not torch.equal(one, two)
    with torch.no_grad():
        layer.lora_B.zero_()
    assert torch.equal(layer(x), F.linear(x, layer.weight, layer.bias))
    nn.init.normal_(layer.lora_B)
    layer.eval()
    assert torch.equal(layer(x), layer(x))
    torch.testing.assert_close(layer(x).double(), by_hand(layer, x), rtol=1e-5, atol=1e-5)


def test_dropout_follows_the_seed_of_torch() -> None:
    layer = layer_of(lora_dropout=0.5)
    x = torch.randn(50, 10)
    torch.manual_seed(5)
    one = layer(x)
    torch.manual_seed(5)
    assert torch.equal(layer(x), one)
    torch.manual_seed(6)
    assert not torch.equal(layer(x), one)


def test_the_mean_over_dropped_outputs_is_the_output_without_dropout() -> None:
    layer = layer_of(lora_dropout=0.5)
    x = torch.randn(3, 10)
    with torch.no_grad():
        draws = torch.stack([layer(x) for _ in range(2000)])
        expected = layer.eval()(x)
    error = 5 * draws.std(0) / math.sqrt(2000)
    assert bool(((draws.mean(0) - expected).abs() < error).all())


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_computes_the_same_and_shares_nothing(copied: Callable[[nn.Module], nn.Module]) -> None:
    layer = layer_of(inactive="exact", lora_dropout=0.1).eval()
    x = torch.randn(5, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        layer(x)
    twin = copied(layer)
    assert torch.equal(twin(x), layer(x))
    assert repr(twin) == repr(layer)
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in layer.parameters()}
    with torch.no_grad():
        twin.weight.zero_()
    assert layer.weight.any()


def test_plain_gives_the_adapted_class_back_with_the_same_parameters() -> None:
    class Special(nn.Linear):
        pass

    base = Special(10, 12)
    base.note = "kept"
    handle = base.register_forward_hook(lambda *_: None)
    weight, keys = base.weight, set(base.__dict__)
    layer = SelectiveLoRALinear.from_linear(base, slora.SelectiveLoRAConfig(r=2))
    layer(torch.randn(2, 10))
    plain = layer.plain()
    assert type(plain) is Special
    assert plain.weight is weight
    assert set(plain.__dict__) == keys
    assert set(plain.state_dict()) == {"weight", "bias"}
    assert handle.id in plain._forward_hooks


@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_fuse_gives_a_plain_linear_and_leaves_the_layer_alone(bias: bool) -> None:
    layer = layer_of(bias=bias).eval()
    with torch.no_grad():
        layer.gate[1] = 0.0
    before = {name: value.clone() for name, value in layer.state_dict().items()}
    fused = layer.fuse()
    assert type(fused) is nn.Linear
    assert not fused.training
    assert not any(p.requires_grad for p in fused.parameters())
    x = torch.randn(5, 10)
    torch.testing.assert_close(fused(x).double(), by_hand(layer, x), rtol=1e-5, atol=1e-5)
    assert fused.weight.data_ptr() != layer.weight.data_ptr()
    for name, value in layer.state_dict().items():
        assert torch.equal(value, before[name])


def test_dropout_begins_with_training(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(lora_dropout=0.5).eval(), torch.randn(7, 10)
    with torch.no_grad():
        layer.lora_B.normal_()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))
