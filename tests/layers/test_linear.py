"""`SelectiveLoRALinear` as a layer: construction, autocast, copies, hooks, dropout, compilation."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint

import slora
from slora import ops
from slora.errors import ConfigError, ShapeError
from slora.layers import SelectiveLoRALinear

pytestmark = pytest.mark.usefixtures("poisoned")


def layer_of(K: int = 10, N: int = 12, trained: bool = True, **settings: Any) -> SelectiveLoRALinear:
    layer = SelectiveLoRALinear(K, N, **{"r": 2, "lora_alpha": 3, "blocks": 3, **settings})
    if trained:
        nn.init.normal_(layer.lora_B)
    return layer


def by_hand(layer: SelectiveLoRALinear, x: Tensor) -> Tensor:
    """`x (W + c B A).T + b` in fp64, with the weight built block by block."""
    weight = layer.weight.double().clone()
    n = weight.shape[0] // layer.blocks
    for i, gate in enumerate(layer.gate.tolist()):
        if gate >= layer.threshold:
            update = layer.lora_B[i].double() @ layer.lora_A[i].double()
            weight[i * n : (i + 1) * n] += layer.lora_alpha / layer.r * update
    return F.linear(x.double(), weight, None if layer.bias is None else layer.bias.double())


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


# Gradients


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


# Dropout


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


# Autocast and dtypes


class Casts(TorchDispatchMode):
    """How often a tensor of each shape is copied to another dtype."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func is torch.ops.aten._to_copy.default and result.dtype != args[0].dtype:
            self.shapes.append(tuple(args[0].shape))
        return result


LOW = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("base_dtype", [None, torch.bfloat16], ids=["fp32 base", "bf16 base"])
@pytest.mark.parametrize("dtype", LOW, ids=str)
@pytest.mark.parametrize("active", [True, False], ids=["active", "inactive"])
def test_under_autocast_the_activations_dtype_rules_and_lora_stays_fp32(
    base_dtype: torch.dtype | None, dtype: torch.dtype, active: bool
) -> None:
    layer = layer_of(base_dtype=base_dtype, gate_init=0.15 if active else 0.05, inactive="exact")
    x = torch.randn(5, 10, requires_grad=True)
    with torch.autocast("cpu", dtype=dtype):
        y = layer(x)
    assert y.dtype == dtype
    y.float().sum().backward()
    assert x.grad.dtype == torch.float32
    assert layer.weight.dtype == (base_dtype or torch.float32)
    for p in (layer.lora_A, layer.lora_B, layer.gate):
        assert p.dtype == torch.float32
        assert p.grad is None or p.grad.dtype == torch.float32
    assert layer.gate.grad.any()


@pytest.mark.parametrize("dtype", LOW, ids=str)
def test_under_autocast_results_are_as_exact_as_those_of_eager_pytorch(
    dtype: torch.dtype, assert_as_exact_as: Callable[..., None]
) -> None:
    layer = layer_of(64, 96, r=4)
    x, dy = torch.randn(123, 64), torch.randn(123, 96)

    def peft(x: Tensor) -> Tensor:
        y = F.linear(x, layer.weight, layer.bias)
        updates = [F.linear(F.linear(x, A), B) * layer.scaling for A, B in zip(layer.lora_A, layer.lora_B, strict=True)]
        return y + torch.cat(updates, -1)

    def run(f: Callable[[Tensor], Tensor], wide: bool = False) -> list[Tensor]:
        leaf = (x.double() if wide else x).requires_grad_()
        with torch.autocast("cpu", dtype=dtype, enabled=not wide):
            y = f(leaf)
        return [y.detach(), *torch.autograd.grad(y, (leaf, layer.lora_A, layer.lora_B), dy.to(y.dtype))]

    ours, eager, exact = run(layer), run(peft), run(lambda x: by_hand(layer, x), wide=True)
    for what, *three in zip(("y", "dx", "dA", "dB"), ours, eager, exact, strict=True):
        low = torch.finfo(dtype).eps / torch.finfo(three[1].dtype).eps
        # The gradients come back in fp32 but were computed in the low dtype: its eps is what the floor goes by.
        assert_as_exact_as(*three, what, low * float(three[2].abs().max()))


def test_a_frozen_weight_is_cast_once_per_autocast_region_and_not_once_per_call() -> None:
    layer = layer_of(K=10, N=12)
    x = torch.randn(5, 10)
    with Casts() as casts, torch.autocast("cpu", dtype=torch.bfloat16):
        for _ in range(4):
            layer(x)
    assert casts.shapes.count((12, 10)) == 1
    assert casts.shapes.count((12,)) == 1


def test_a_weight_kept_in_the_autocast_dtype_is_never_cast() -> None:
    layer = layer_of(K=10, N=12, base_dtype=torch.bfloat16)
    with Casts() as casts, torch.autocast("cpu", dtype=torch.bfloat16):
        layer(torch.randn(5, 10))
    assert (12, 10) not in casts.shapes
    assert (12,) not in casts.shapes


@pytest.mark.parametrize(
    "change",
    [
        lambda layer: layer.weight.mul_(2),
        lambda layer: layer.weight.copy_(torch.ones(12, 10)),
        lambda layer: layer.load_state_dict({**layer.state_dict(), "weight": torch.ones(12, 10)}),
        lambda layer: setattr(layer, "weight", nn.Parameter(torch.ones(12, 10), requires_grad=False)),
        lambda layer: slora.merge(layer),
        lambda layer: slora.merge(layer, 0.5),
    ],
    ids=["in place", "copy", "load_state_dict", "new parameter", "merge", "merge with a scale"],
)
def test_the_cast_follows_a_weight_that_changes(change: Callable[[SelectiveLoRALinear], Any]) -> None:
    layer = layer_of()
    x = torch.randn(5, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        before = layer(x)
        change(layer)
        after = layer(x)
        layer._cast.clear()
        assert torch.equal(after, layer(x))
        assert layer.merged or not torch.equal(before, after)


def test_the_cast_follows_merges_whose_weights_reuse_an_address() -> None:
    layer = layer_of(64, 96)
    x = torch.randn(5, 64)
    with torch.autocast("cpu", dtype=torch.bfloat16), torch.no_grad():
        for scale in (1.0, 0.5, -1.0, 2.0):
            slora.merge(layer, scale)
            y = layer(x)
            expected = F.linear(x.bfloat16(), layer.weight.bfloat16(), layer.bias.bfloat16())
            assert torch.equal(y, expected)
            slora.unmerge(layer)


def test_autocast_leaves_fp64_alone_and_nested_regions_each_have_their_dtype() -> None:
    layer = layer_of()
    x = torch.randn(5, 10)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert layer(x).dtype == torch.bfloat16
        with torch.autocast("cpu", enabled=False):
            assert layer(x).dtype == torch.float32
        with torch.autocast("cpu", dtype=torch.float16):
            assert layer(x).dtype == torch.float16
        assert layer.double()(x.double()).dtype == torch.float64


def test_gradients_accumulate_in_fp32_over_micro_batches_under_autocast() -> None:
    # 2^-9 is lost when added to 1 in bf16.
    layer = SelectiveLoRALinear(1, 1, bias=False, r=1, lora_alpha=1)
    with torch.no_grad():
        for p in layer.parameters():
            p.fill_(1.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for value in (1.0, 2.0**-9):
            layer(torch.tensor([[value]])).sum().backward()
    assert float(layer.lora_A.grad) == 1.0 + 2.0**-9


def test_base_dtype_halves_the_frozen_weights_only() -> None:
    layer = layer_of(base_dtype=torch.bfloat16)
    assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16
    assert layer.lora_A.dtype == layer.lora_B.dtype == layer.gate.dtype == torch.float32
    y = layer(torch.randn(3, 10).bfloat16())
    assert y.dtype == torch.bfloat16


# Copies, plain layers, fusing


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


# torch.compile


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


CHANGES: dict[str, Callable[[Any], object]] = {
    "scaling": lambda layer: setattr(layer, "lora_alpha", 5.0),
    "threshold": lambda layer: setattr(layer, "threshold", 0.2),
    "another A": lambda layer: setattr(layer, "lora_A", nn.Parameter(torch.randn_like(layer.lora_A))),
    "another A behind attributes": lambda layer: layer._parameters.update(lora_A=torch.randn_like(layer.lora_A)),
    "A in place": lambda layer: layer.lora_A.data.mul_(2),
    "another weight": lambda layer: setattr(layer, "weight", nn.Parameter(torch.randn_like(layer.weight))),
    "a gate": lambda layer: nn.init.constant_(layer.gate, 0.0),
    "a state dict": lambda layer: layer.load_state_dict({k: v * 2 for k, v in layer.state_dict().items()}),
    "disabled": lambda layer: setattr(layer, "enabled", False),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_call_takes_what_the_layer_is_now(change: str) -> None:
    layer, x = layer_of(inactive="frozen"), torch.randn(7, 10)
    with torch.no_grad():
        layer.lora_B.normal_()
        before = layer(x)
        CHANGES[change](layer)
        found = layer(x)
        # A copy has not been called yet.
        assert torch.equal(found, copy.deepcopy(layer)(x))
    assert not torch.equal(found, before)


def test_dropout_begins_with_training(monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = layer_of(lora_dropout=0.5).eval(), torch.randn(7, 10)
    with torch.no_grad():
        layer.lora_B.normal_()
    assert torch.equal(layer(x), layer(x))
    layer.train()
    assert not torch.equal(layer(x), layer(x))


def test_what_does_not_fit_is_refused_at_any_call() -> None:
    layer = layer_of()
    for _ in range(2):
        layer(torch.randn(7, 10))
        with pytest.raises(ShapeError, match=r"x has shape \[7, 11\] and weight"):
            layer(torch.randn(7, 11))
        with pytest.raises(ShapeError, match=r"weight has shape .* torch.float32 but x has .* torch.float64"):
            layer(torch.randn(7, 10).double())
    layer.lora_B = nn.Parameter(torch.zeros(3, 4, 3))
    with pytest.raises(ShapeError, match=r"lora_B has shape \[3, 4, 3\]"):
        layer(torch.randn(7, 10))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda layer: setattr(layer.bias, "data", torch.randn(1)), r"bias has shape \[1\]; expected \[12\]"),
        (lambda layer: setattr(layer.bias, "data", layer.bias.data.half()), r"bias has .* torch.float16 but x has"),
        (lambda layer: setattr(layer.lora_A, "data", layer.lora_A.data.half()), r"lora_A has .* torch.float16"),
        (lambda layer: setattr(layer.lora_A, "data", torch.randn(3, 3, 10)), r"lora_B has shape \[3, 4, 2\]; expected"),
    ],
    ids=["shape of bias", "dtype of bias", "dtype of A", "rank of A"],
)
def test_what_was_put_behind_a_parameter_is_checked_again(change: Callable[[Any], object], message: str) -> None:
    layer = layer_of()
    layer(torch.randn(7, 10))
    change(layer)
    with pytest.raises(ShapeError, match=message):
        layer(torch.randn(7, 10))


def test_parametrizations_replicas_and_deleted_parameters() -> None:
    layer, x = layer_of(inactive="frozen"), torch.randn(7, 10)
    y = layer(x)
    replica = layer._replicate_for_data_parallel()
    for name, value in layer._parameters.items():
        setattr(replica, name, value * 1)
    assert torch.equal(replica(x), y)

    class Twice(nn.Module):
        def forward(self, t: Tensor) -> Tensor:
            return 2 * t

    for name in ("lora_A", "gate"):
        nn.utils.parametrize.register_parametrization(layer, name, Twice())
        for _ in range(2):
            found = layer(x)
    torch.testing.assert_close(found, by_hand(layer, x).float())
    plain = layer_of()
    plain(x)
    del plain.lora_A
    with pytest.raises(AttributeError, match="lora_A"):
        plain(x)
