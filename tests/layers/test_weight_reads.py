"""Weights that a forward reads past their layer: the blocks act there as in a call of the layer, or it is refused."""

from __future__ import annotations

import copy
import inspect
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import slora
from slora.errors import StateError, TargetError
from slora.layers import adapted_layers

E = 8


def project(linear: nn.Linear, x: Tensor) -> Tensor:
    return F.linear(x, linear.weight, linear.bias)


class Deep(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.fc = nn.Linear(E, E)


class Attention(nn.Module):
    """Reads the weights of its layers in the way that `how` names."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.how = how
        self.q, self.k = nn.Linear(E, E), nn.Linear(E, E)
        self.both = nn.Linear(E, 2 * E, bias=False)
        self.both_bias = nn.Parameter(torch.randn(2 * E))
        self.deep = Deep()
        self.several = nn.ModuleList([nn.Linear(E, E), nn.Linear(E, E)])
        self.out = nn.Linear(E, E)

    def forward(self, x: Tensor) -> Tensor:
        ways = (
            self.linear_with_another_bias, self.linear_with_a_computed_bias, self.linear_without_a_bias,
            self.linear_with_its_own_bias, self.in_a_function, self.deeper_inside, self.of_a_variable,
            self.called_and_read, self.transposed, self.in_chunks, self.stacked, self.as_a_convolution,
            self.in_attention,
        )  # fmt: skip
        return self.out(torch.tanh(ways[WAYS.index(self.how)](x)))

    def linear_with_another_bias(self, x: Tensor) -> Tensor:
        return F.linear(x, weight=self.both.weight, bias=self.both_bias)[..., E:]

    def linear_with_a_computed_bias(self, x: Tensor) -> Tensor:
        return F.linear(input=x, weight=self.q.weight, bias=torch.cat((self.k.bias[:4], self.q.bias[4:])))

    def linear_without_a_bias(self, x: Tensor) -> Tensor:
        return F.linear(x.to(self.q.weight.dtype), self.q.weight)

    def linear_with_its_own_bias(self, x: Tensor) -> Tensor:
        return F.linear(x, self.q.weight, self.q.bias)

    def in_a_function(self, x: Tensor) -> Tensor:
        return project(self.q, x)

    def deeper_inside(self, x: Tensor) -> Tensor:
        return F.linear(x, self.deep.fc.weight)

    def of_a_variable(self, x: Tensor) -> Tensor:
        for layer in self.several:
            x = F.linear(x, layer.weight, layer.bias)
        return x

    def called_and_read(self, x: Tensor) -> Tensor:
        return self.q(x) + F.linear(self.k(x), self.q.weight)

    def transposed(self, x: Tensor) -> Tensor:
        return torch.matmul(x, self.q.weight.t()) + self.q.bias

    def in_chunks(self, x: Tensor) -> Tensor:
        parts = self.both.weight.chunk(2)
        return torch.einsum("...k,nk->...n", x, parts[1]) + torch.matmul(x, parts[0].t())

    def stacked(self, x: Tensor) -> Tensor:
        return F.linear(x, torch.cat([self.q.weight, self.k.weight]))[..., 4:-4]

    def as_a_convolution(self, x: Tensor) -> Tensor:
        return F.conv1d(x.transpose(-1, -2), self.q.weight.unsqueeze(-1), self.q.bias).transpose(-1, -2)

    def in_attention(self, x: Tensor) -> Tensor:
        return F.multi_head_attention_forward(
            x, x, x, E, 2, None, torch.cat([self.q.bias, self.k.bias, self.deep.fc.bias]), None, None, False, 0.0,
            self.several[0].weight, self.several[0].bias, need_weights=False, use_separate_proj_weight=True,
            q_proj_weight=self.q.weight, k_proj_weight=self.k.weight, v_proj_weight=self.deep.fc.weight,
        )[0]  # fmt: skip


class Holds(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.q = nn.Linear(E, E)


class Transposed(Holds):
    def forward(self, x: Tensor) -> Tensor:
        return x @ self.q.weight.T


WAYS = [name for name, value in vars(Attention).items() if callable(value) and name[0] != "_" and name != "forward"]
OTHER = ["transposed", "in_chunks", "stacked", "as_a_convolution", "in_attention"]


def model_of(how: str, **config: Any) -> nn.Sequential:
    return slora.inject(plain(how), slora.SelectiveLoRAConfig(**{"r": 2, "inactive": "exact", **config}))


def plain(how: str) -> nn.Sequential:
    torch.manual_seed(1)
    attention = Transposed() if how == "transposed_attribute" else Attention(how)
    return nn.Sequential(nn.Linear(E, E), attention)


def inputs() -> Tensor:
    return torch.randn(3, 5, E, requires_grad=True)


def randomised(model: nn.Module) -> nn.Module:
    for i, (_, layer) in enumerate(adapted_layers(model)):
        nn.init.normal_(layer.lora_B, std=0.3)
        with torch.no_grad():
            # Every third block is off.
            layer.gate.fill_(0.05 if i % 3 == 2 else 0.15)
    return model


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


@pytest.mark.parametrize("how", ["linear_with_another_bias", "called_and_read", "in_chunks", "in_attention"])
def test_compiled_readers_have_one_graph_and_the_same_results(how: str) -> None:
    torch._dynamo.reset()
    model, x = randomised(model_of(how)), inputs()
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    leaves = [p for p in model.parameters() if p.requires_grad]
    y, expected = compiled(x), model(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    found, wanted = (torch.autograd.grad(out.sum(), leaves, allow_unused=True) for out in (y, expected))
    for one, two in zip(found, wanted, strict=True):
        if two is not None and one is not None:
            torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
        else:
            assert all(grad is None or not grad.any() for grad in (one, two))
    torch._dynamo.reset()


@pytest.mark.parametrize("fullgraph", [True, False])
def test_what_torch_compile_does_not_show_is_refused_there(fullgraph: bool) -> None:
    torch._dynamo.reset()
    model, x = randomised(model_of("transposed_attribute")), inputs()
    with pytest.raises(Exception, match=r"does not show what is done with an attribute of the weight of '1.q'"):
        torch.compile(model, fullgraph=fullgraph, backend="eager")(x)
    assert torch.isfinite(model(x)).all()
    torch._dynamo.reset()


class Fails(Holds):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.q.weight
        raise ValueError(F.linear(x, weight).shape)


class Breaks(Holds):
    def forward(self, x: Tensor) -> Tensor:
        x = F.linear(x, self.q.weight)
        torch._dynamo.graph_break()
        return F.linear(x, self.q.weight) + self.q(x)


class BreaksInside(Holds):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(self.broken(x), self.q.weight)

    def broken(self, x: Tensor) -> Tensor:
        x = self.q(x)
        torch._dynamo.graph_break()
        return x + F.linear(x, self.q.weight)


class Reads(Holds):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.q.weight, self.q.bias)


def adapted(model: nn.Module) -> nn.Module:
    return randomised(slora.inject(model, slora.SelectiveLoRAConfig(r=2, target_modules=["q"])))


@pytest.mark.parametrize(
    ("kind", "failing", "backend"),
    [
        (kind, failing, ("eager", "aot_eager")[(i + j) % 2])
        for i, kind in enumerate((Reads, Breaks, BreaksInside))
        for j, failing in enumerate((None, Fails, Transposed))
    ],
)
def test_compiled_readers_that_fail_or_break_the_graph_add_the_update_once(
    kind: type[nn.Module], failing: type[nn.Module] | None, backend: str
) -> None:
    torch._dynamo.reset()
    x = torch.randn(3, E)
    for _ in range(2 if failing else 0):
        with pytest.raises(ValueError, match=r"Size|does not show"):
            torch.compile(adapted(failing()), backend=backend)(x)
    for model in (adapted(kind()), nn.Sequential(adapted(kind()), adapted(kind()))):
        expected = model(x)
        torch.testing.assert_close(torch.compile(model, backend=backend)(x), expected, rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(model(x), expected, rtol=0, atol=0)
    torch._dynamo.reset()


@pytest.mark.parametrize("what", ["in place", "wrapped", "the layer"])
def test_a_compiled_part_whose_weight_is_read_from_outside_is_refused_unless_all_is_compiled(what: str) -> None:
    class Outer(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.part = Reads()

        def forward(self, x: Tensor) -> Tensor:
            return self.part(x) + self.part.q(x) + F.linear(x, self.part.q.weight)

    torch._dynamo.reset()
    model, x = adapted(Outer()), torch.randn(3, E)
    expected = model(x)
    if what == "wrapped":
        model.part = torch.compile(model.part, backend="eager")
    else:
        (model.part if what == "in place" else model.part.q).compile(backend="eager")
    with pytest.raises(TargetError, match=r"'Outer' reads the weight of 'part.q', .* compile 'Outer' as a whole"):
        model(x)
    whole = torch.compile(model, backend="eager", fullgraph=True)
    torch.testing.assert_close(whole(x), expected, rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


class Recomputes(Holds):
    reentrant = False

    def __init__(self) -> None:
        super().__init__()
        self.kept = self.inner

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.inner, x, use_reentrant=self.reentrant)

    def inner(self, x: Tensor) -> Tensor:
        return torch.tanh(F.linear(x, self.q.weight)) * project(self.q, x)

    def encode(self, x: Tensor) -> Tensor:
        return F.linear(x, self.q.weight)

    def reset(self) -> None:
        nn.init.ones_(self.q.weight.data)


@pytest.mark.parametrize("call", ["checkpoint", "reentrant checkpoint", "inner", "kept", "encode", "pickled"])
def test_methods_that_read_learn_where_they_are_called_by_themselves(call: str) -> None:
    model, x = adapted(Recomputes()), torch.randn(3, E, requires_grad=True)
    layer = model.q
    weight = layer.weight + layer.scaling * (layer.lora_B @ layer.lora_A).flatten(0, 1)
    expected = F.linear(x, weight)
    if call != "encode":
        expected = torch.tanh(expected) * F.linear(x, weight, layer.bias)
    wanted = torch.autograd.grad(expected.sum(), [layer.lora_A, layer.lora_B])
    if call == "pickled":
        model = pickle.loads(pickle.dumps(model))
        layer = model.q
    model.reentrant = call == "reentrant checkpoint"
    y = {"inner": model.inner, "kept": model.kept, "encode": model.encode}.get(call, model)(x)
    torch.testing.assert_close(y, expected, rtol=1e-5, atol=1e-5)
    y.sum().backward()
    torch.testing.assert_close(layer.lora_A.grad, wanted[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(layer.lora_B.grad, wanted[1], rtol=1e-4, atol=1e-5)
    model.reset()
    assert (layer.weight == 1).all()
    assert "kept" not in vars(slora.unload(model)) or model.kept.__func__ is Recomputes.inner


def test_a_compiled_reader_that_reads_in_methods_is_one_graph() -> None:
    class Calls(Recomputes):
        def forward(self, x: Tensor) -> Tensor:
            return self.inner(x) + self.encode(x)

    torch._dynamo.reset()
    model, x = adapted(Calls()), torch.randn(3, E)
    whole = torch.compile(model, backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(whole(x), model(x), rtol=1e-5, atol=1e-5)
    torch._dynamo.reset()


def test_the_refusal_of_16_bits_names_all_layers_that_the_module_reads() -> None:
    class Two(Holds):
        def __init__(self) -> None:
            super().__init__()
            self.k = nn.Linear(E, E)

        def forward(self, x: Tensor) -> Tensor:
            return x @ self.q.weight.t() + x @ self.k.weight.t()

    model = slora.inject(Two().bfloat16(), slora.SelectiveLoRAConfig(r=2))
    with pytest.raises(TargetError, match=r"list 'q' in exclude_modules; the same module also reads 'k'$"):
        model(torch.randn(3, E, dtype=torch.bfloat16))


def test_a_reader_is_recorded_as_one_call_and_refused_as_the_whole_of_a_recording() -> None:
    model, x = adapted(Reads()), torch.randn(3, E)
    with pytest.raises(
        StateError, match=r"torch.fx cannot record Reads, .* call slora.merge_and_unload\(model\) first"
    ):
        torch.fx.symbolic_trace(model)
    outer = nn.Sequential(model)
    assert torch.equal(torch.fx.symbolic_trace(outer)(x), outer(x))


# Real models


def beit() -> tuple[nn.Module, Tensor]:
    timm = pytest.importorskip("timm")
    return timm.create_model("beit_base_patch16_224", img_size=32, embed_dim=24, depth=2, num_heads=2), image(32)


def swinv2() -> tuple[nn.Module, Tensor]:
    timm = pytest.importorskip("timm")
    model = timm.create_model(
        "swinv2_tiny_window8_256", img_size=32, window_size=4, embed_dim=24, depths=(1, 1), num_heads=(2, 2)
    )
    return model, image(32)


def torchvision_swin() -> tuple[nn.Module, Tensor]:
    models = pytest.importorskip("torchvision.models")
    swin = models.swin_transformer.SwinTransformer
    return swin([4, 4], 24, [1, 1], [2, 2], [4, 4], num_classes=5, stochastic_depth_prob=0.0), image(32)


def clip_pool() -> tuple[nn.Module, Tensor]:
    resnet = pytest.importorskip("open_clip.modified_resnet")
    return nn.Sequential(resnet.AttentionPool2d(2, 16, 2, 8)), torch.randn(2, 16, 2, 2)


def deberta() -> tuple[nn.Module, Tensor]:
    transformers = pytest.importorskip("transformers")
    config = transformers.DebertaConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=2, num_attention_heads=2, intermediate_size=32,
        max_position_embeddings=16, relative_attention=True, pos_att_type=["c2p", "p2c"],
    )  # fmt: skip
    return transformers.DebertaModel(config).eval(), torch.arange(10).view(2, 5)


def image(size: int) -> Tensor:
    return torch.randn(2, 3, size, size)


@pytest.mark.parametrize("build", [beit, swinv2, torchvision_swin, clip_pool, deberta])
def test_every_block_of_models_that_read_weights_learns_and_merges(
    build: Callable[[], tuple[nn.Module, Tensor]],
) -> None:
    base, x = build()
    base.eval()
    for parameter in base.parameters():
        # Norms that begin at 0 would let nothing through.
        if not parameter.any():
            nn.init.normal_(parameter)

    def run(model: nn.Module) -> Tensor:
        y = model(x)
        return y if isinstance(y, Tensor) else y.last_hidden_state

    expected = run(base)
    targets = r"\d.*_proj" if build is clip_pool else "all-linear"
    model = slora.inject(base, slora.SelectiveLoRAConfig(r=2, target_modules=targets))
    # A convolution by a frozen weight may take another kernel.
    torch.testing.assert_close(run(model), expected, rtol=0, atol=1e-6 * float(expected.detach().abs().max()))
    for _, layer in adapted_layers(model):
        nn.init.normal_(layer.lora_B, std=0.1)
    adapted = run(model)
    (adapted * torch.randn_like(adapted)).sum().backward()
    for name, layer in adapted_layers(model):
        assert layer.lora_B.grad is not None, name
        assert (layer.lora_B.grad.abs().amax((1, 2)) > 0).all(), name
    merged = run(slora.merge_and_unload(model))
    # fp32 through up to 10 layers: 1e-4 of the largest element.
    torch.testing.assert_close(merged, adapted.detach(), rtol=0, atol=1e-4 * float(adapted.detach().abs().max()))
