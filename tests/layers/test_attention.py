"""Attention with one `in_proj_weight`: equal to PyTorch's and open_clip's own at the start, by hand after training."""

from __future__ import annotations

import copy
import math
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slora
from slora.errors import ConfigError, ShapeError, TargetError
from slora.layers import ProjectionAttention, SelectiveLoRAAttention, adapted_layers

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask"),
]

E, H, B, L, S = 24, 4, 3, 7, 5


@pytest.fixture
def slow_path() -> Iterator[None]:
    """PyTorch's attention as it runs in training; its fused inference kernel rounds differently."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(enabled)


def attention(**options: Any) -> nn.MultiheadAttention:
    base = nn.MultiheadAttention(E, H, **{"batch_first": True, **options})
    if base.in_proj_bias is not None:
        nn.init.normal_(base.in_proj_bias)
        nn.init.normal_(base.out_proj.bias)
    return base


def adapt(base: nn.Module, trained: bool = False, out_proj: bool = True, **config: Any) -> nn.Module:
    """An adapted copy of `base`, its output projection included."""
    holder = nn.Sequential()
    holder.add_module("attn", copy.deepcopy(base))
    targets = ["attn", "attn.out_proj"] if out_proj else ["attn"]
    slora.inject(holder, slora.SelectiveLoRAConfig(**{"r": 3, "target_modules": targets, **config}))
    if trained:
        for _, layer in adapted_layers(holder):
            nn.init.normal_(layer.lora_B, std=0.3)
    return holder.attn


def inputs(kind: str, batch_first: bool, batched: bool) -> tuple[Tensor, Tensor, Tensor]:
    def make(length: int) -> Tensor:
        if not batched:
            return torch.randn(length, E)
        return torch.randn(B, length, E) if batch_first else torch.randn(length, B, E)

    query = make(L)
    if kind == "self":
        return query, query, query
    key = make(S)
    return (query, key, key) if kind == "key is value" else (query, key, make(S))


MASKS = ["none", "bool", "float", "bool per head", "float per head", "causal", "causal hint"]


def mask_arguments(kind: str, padding: str, S: int, batched: bool) -> dict[str, Any]:
    """Masks that leave at least one key to every query."""
    found: dict[str, Any] = {"is_causal": kind == "causal hint"}
    shape = ((B if batched else 1) * H, L, S) if "per head" in kind else (L, S)
    if "bool" in kind:
        found["attn_mask"] = (torch.rand(shape) > 0.7).index_fill_(-1, torch.tensor([0]), False)
    elif "float" in kind:
        found["attn_mask"] = torch.randn(shape)
    elif "causal" in kind:
        found["attn_mask"] = torch.full((L, S), float("-inf")).triu(1)
    if padding != "none":
        padded = (torch.rand(B, S) > 0.6).index_fill_(-1, torch.tensor([0]), False)
        padded = padded if padding == "bool" else torch.zeros(B, S).masked_fill(padded, -3.0)
        found["key_padding_mask"] = padded if batched else padded[0]
    return found


def assert_same(one: tuple[Tensor, Tensor | None], two: tuple[Tensor, Tensor | None]) -> None:
    assert torch.equal(one[0], two[0])
    assert (one[1] is None) == (two[1] is None)
    assert one[1] is None or torch.equal(one[1], two[1])


@pytest.mark.parametrize("padding", ["none", "bool", "float"])
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("kind", ["self", "key is value", "all different"])
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("order", ["batch first", "length first", "unbatched"])
def test_until_the_first_step_the_output_is_the_base_bit_for_bit(
    order: str, need_weights: bool, kind: str, mask: str, padding: str, slow_path: None
) -> None:
    batched, batch_first = order != "unbatched", order == "batch first"
    base = attention(batch_first=batch_first, dropout=0.2)
    arguments = inputs(kind, batch_first, batched)
    masks = mask_arguments(mask, padding, L if kind == "self" else S, batched)
    ours = adapt(base)
    for training in (True, False):
        base.train(training)
        ours.train(training)
        torch.manual_seed(3)
        expected = base(*arguments, need_weights=need_weights, **masks)
        torch.manual_seed(3)
        assert_same(ours(*arguments, need_weights=need_weights, **masks), expected)
        if not training:
            with torch.no_grad():
                assert_same(ours(*arguments, need_weights=need_weights, **masks), expected)


OPTIONS = {
    "bias_kv": {"add_bias_kv": True},
    "zero_attn": {"add_zero_attn": True},
    "bias_kv and zero_attn": {"add_bias_kv": True, "add_zero_attn": True},
    "no bias": {"bias": False},
    "odd heads": {"num_heads": 3},
    "fp64": {"dtype": torch.float64},
    "bf16": {"dtype": torch.bfloat16},
}


@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
@pytest.mark.parametrize("masked", [True, False], ids=["masked", "unmasked"])
def test_every_option_of_the_base_class_gives_its_bits(
    options: str, need_weights: bool, batch_first: bool, masked: bool, slow_path: None
) -> None:
    settings = dict(OPTIONS[options])
    heads = settings.pop("num_heads", H)
    base = nn.MultiheadAttention(E, heads, dropout=0.2, batch_first=batch_first, **settings)
    ours = adapt(base)
    q, k, v = (t.to(base.in_proj_weight.dtype) for t in inputs("all different", batch_first, True))
    masks = {"attn_mask": torch.rand(L, S) > 0.9, "key_padding_mask": torch.zeros(B, S, dtype=torch.bool)}
    for arguments in ((q, q, q), (q, k, k), (q, k, v)):
        chosen = masks if masked and arguments[1] is k else {}
        torch.manual_seed(3)
        expected = base(*arguments, need_weights=need_weights, **chosen)
        torch.manual_seed(3)
        assert_same(ours(*arguments, need_weights=need_weights, **chosen), expected)


@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
def test_in_inference_the_base_may_take_its_fused_kernel_and_still_agrees_up_to_rounding(need_weights: bool) -> None:
    base = attention().eval()
    ours = adapt(base)
    x = torch.randn(B, L, E)
    with torch.no_grad():
        found, expected = ours(x, x, x, need_weights=need_weights), base(x, x, x, need_weights=need_weights)
    # fp32 sums of E = 24 products in two projections in another order: far below this.
    torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=1e-5)
    if need_weights:
        torch.testing.assert_close(found[1], expected[1], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("average", [True, False])
@pytest.mark.parametrize("order", ["batch first", "length first", "unbatched"])
def test_weights_are_averaged_over_heads_or_not(average: bool, order: str, slow_path: None) -> None:
    batched, batch_first = order != "unbatched", order == "batch first"
    base = attention(batch_first=batch_first)
    arguments = inputs("key is value", batch_first, batched)
    assert_same(adapt(base)(*arguments, average_attn_weights=average), base(*arguments, average_attn_weights=average))


def test_a_query_that_may_attend_to_nothing_gives_what_the_base_gives(slow_path: None) -> None:
    base = attention()
    x = torch.randn(B, L, E)
    mask = torch.zeros(L, L, dtype=torch.bool)
    mask[2] = True
    for need_weights in (True, False):
        found = adapt(base)(x, x, x, attn_mask=mask, need_weights=need_weights)[0]
        expected = base(x, x, x, attn_mask=mask, need_weights=need_weights)[0]
        torch.testing.assert_close(found, expected, rtol=0, atol=0, equal_nan=True)


def test_under_autocast_the_output_is_that_of_the_base(slow_path: None) -> None:
    base = attention()
    ours = adapt(base)
    x = torch.randn(B, L, E)
    for masks in ({}, {"attn_mask": torch.randn(L, L)}):
        for need_weights in (True, False):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                expected = base(x, x, x, need_weights=need_weights, **masks)
                found = ours(x, x, x, need_weights=need_weights, **masks)
            assert found[0].dtype == expected[0].dtype == torch.bfloat16
            assert_same(found, expected)


# After training: an independent computation


def attention_by_hand(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """Multi-head attention in fp64 with `W + c B A` built by hand; batch first; returns (output, weights)."""

    def weight_of(layer: Any, weight: Tensor) -> Tensor:
        weight = weight.double().clone()
        if hasattr(layer, "lora_A"):
            n = weight.shape[0] // layer.blocks
            for i in range(layer.blocks):
                if layer.gate[i].item() >= 0.1:
                    update = layer.lora_B[i].double() @ layer.lora_A[i].double()
                    weight[i * n : (i + 1) * n] += layer.lora_alpha / layer.r * update
        return weight

    W, out = weight_of(module, module.in_proj_weight), weight_of(module.out_proj, module.out_proj.weight)
    b = module.in_proj_bias.double()
    q, k, v = (
        (t.double() @ W[i * E : (i + 1) * E].T + b[i * E : (i + 1) * E]).unflatten(-1, (H, E // H)).transpose(1, 2)
        for i, t in enumerate((query, key, value))
    )
    scores = q @ k.transpose(-2, -1) / math.sqrt(E // H)
    if mask is not None:
        scores = scores.masked_fill(mask, float("-inf"))
    weights = scores.softmax(-1)
    y = (weights @ v).transpose(1, 2).flatten(2)
    return y @ out.T + module.out_proj.bias.double(), weights.mean(1)


@pytest.mark.parametrize("blocks", [3, 6])
@pytest.mark.parametrize("kind", ["self", "key is value", "all different"])
@pytest.mark.parametrize("need_weights", [True, False], ids=["weights", "no weights"])
@pytest.mark.parametrize("batch_first", [True, False], ids=["batch first", "length first"])
@pytest.mark.parametrize("open_blocks", [[0], [1], [2], [0, 2], [0, 1, 2], []], ids=str)
def test_after_training_output_and_gradients_are_those_of_the_weights_built_by_hand(
    open_blocks: list[int], batch_first: bool, need_weights: bool, kind: str, blocks: int
) -> None:
    config = {"blocks": 6, "out_proj": False} if blocks == 6 else {}
    ours = adapt(attention(batch_first=batch_first), trained=True, inactive="frozen", **config).double()
    with torch.no_grad():
        third = blocks // 3
        ours.gate.copy_(torch.tensor([0.15 if i // third in open_blocks else 0.05 for i in range(blocks)]))
    arguments = tuple(t.double() for t in inputs("all different", batch_first, True))
    arguments = {
        "self": arguments[:1] * 3,
        "key is value": (arguments[0], arguments[1], arguments[1]),
        "all different": arguments,
    }[kind]
    for t in arguments:
        t.requires_grad_()
    mask = torch.zeros(L, arguments[1].shape[1 if batch_first else 0], dtype=torch.bool)
    mask[0, 1:] = True
    y, weights = ours(*arguments, attn_mask=mask, need_weights=need_weights)
    firsts = [t if batch_first else t.transpose(0, 1) for t in arguments]
    expected, expected_weights = attention_by_hand(ours, *firsts, mask)
    expected = expected if batch_first else expected.transpose(0, 1)
    torch.testing.assert_close(y, expected)
    if need_weights:
        torch.testing.assert_close(weights, expected_weights)
    leaves = list({id(t): t for t in [*arguments, ours.lora_A, ours.lora_B]}.values())
    found = torch.autograd.grad(y.square().sum(), leaves, allow_unused=True)
    wanted = torch.autograd.grad(expected.square().sum(), leaves, allow_unused=True)
    for one, two in zip(found, wanted, strict=True):
        assert (one is None or not one.any()) == (two is None or not two.any())
        if two is not None and one is not None:
            torch.testing.assert_close(one, two)


@pytest.mark.parametrize("part", [0, 1, 2], ids=["query", "key", "value"])
def test_each_of_query_key_and_value_is_selected_by_its_own_gate(part: int) -> None:
    ours = adapt(attention(), trained=True)
    with torch.no_grad():
        ours.gate.copy_(torch.tensor([0.15 if i == part else 0.05 for i in range(3)]))
    x = torch.randn(B, L, E)
    projected = ours.project(x)
    base = F.linear(x, ours.in_proj_weight, ours.in_proj_bias)
    for i in range(3):
        same = torch.equal(projected[..., i * E : (i + 1) * E], base[..., i * E : (i + 1) * E])
        assert same == (i != part)


@pytest.mark.parametrize("kind", ["self", "key is value", "all different"])
@pytest.mark.parametrize("policy", ["exact", "probe", "frozen"])
def test_gates_of_inactive_projections_learn_as_their_policy_says(kind: str, policy: str) -> None:
    ours = adapt(attention(), trained=True, inactive=policy, probe_every=1)
    with torch.no_grad():
        ours.gate.copy_(torch.tensor([0.05, 0.15, 0.05]))
    arguments = inputs(kind, True, True)
    ours(*arguments)[0].square().sum().backward()
    gate = ours.gate.grad.clone()
    assert bool(gate[1])
    assert bool(gate[0]) == bool(gate[2]) == (policy != "frozen")
    if policy == "frozen":
        return
    # Straight-through: the gradient of a factor on each block's update, 0 or 1 at present.
    on = torch.tensor([0.0, 1.0, 0.0]).double().requires_grad_()
    parts = []
    for i, t in enumerate(arguments):
        rows = slice(i * E, (i + 1) * E)
        update = F.linear(F.linear(t.double(), ours.lora_A[i].double()), ours.lora_B[i].double())
        base = F.linear(t.double(), ours.in_proj_weight[rows].double(), ours.in_proj_bias[rows].double())
        parts.append((base + ours.scaling * on[i] * update).unflatten(-1, (H, E // H)).transpose(1, 2))
    y = F.scaled_dot_product_attention(*parts).transpose(1, 2).flatten(2)
    ours.out_proj.double()(y).square().sum().backward()
    torch.testing.assert_close(gate.double(), on.grad, rtol=1e-4, atol=1e-4)


# Errors


def test_a_causal_hint_without_a_mask_is_refused_as_by_the_base() -> None:
    base = attention()
    ours = adapt(base)
    x = torch.randn(B, L, E)
    for need_weights in (True, False):
        with pytest.raises(RuntimeError):
            base.train()(x, x, x, is_causal=True, need_weights=need_weights)
        with pytest.raises(ShapeError, match=r"is_causal=True is a hint about attn_mask, which is None"):
            ours(x, x, x, is_causal=True, need_weights=need_weights)


@pytest.mark.parametrize("which", ["attn_mask", "key_padding_mask"])
def test_a_mask_of_integers_is_refused(which: str) -> None:
    mask = torch.zeros(L, L, dtype=torch.int64) if which == "attn_mask" else torch.zeros(B, L, dtype=torch.int64)
    x = torch.randn(B, L, E)
    with pytest.raises(ShapeError, match=rf"{which} has dtype torch.int64; expected torch.bool or a floating dtype"):
        adapt(attention())(x, x, x, **{which: mask})


def test_blocks_that_do_not_split_query_key_and_value_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"blocks=4 does not split query, key and value of 'attn' evenly"):
        adapt(attention(), blocks=4)
    with pytest.raises(ConfigError, match=r"blocks=5 does not divide out_features=72 of 'attn'"):
        adapt(attention(), blocks=5)


# Copies and the way back


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_computes_the_same_and_shares_nothing(copied: Callable[[nn.Module], nn.Module]) -> None:
    ours = adapt(attention(), trained=True).eval()
    x = torch.randn(B, L, E)
    twin = copied(ours)
    assert_same(twin(x, x, x), ours(x, x, x))
    assert not {p.data_ptr() for p in twin.parameters()} & {p.data_ptr() for p in ours.parameters()}


def test_base_parameters_keep_their_names_and_plain_gives_the_class_back() -> None:
    base = attention(add_bias_kv=True)
    names = set(base.state_dict())
    ours = adapt(base)
    assert names <= set(ours.state_dict())
    assert set(ours.state_dict()) - names == {
        *("lora_A", "lora_B", "gate"),
        *("out_proj.lora_A", "out_proj.lora_B", "out_proj.gate"),
    }
    assert type(ours.plain()) is nn.MultiheadAttention
    assert type(ours.plain().out_proj) is type(ours.out_proj), "children are swapped by slora.unload, each by itself"


def test_a_subclass_without_a_forward_of_its_own_is_adapted_like_the_base() -> None:
    class Named(nn.MultiheadAttention):
        pass

    base = Named(E, H, batch_first=True)
    ours = adapt(base)
    assert isinstance(ours, SelectiveLoRAAttention)
    assert type(ours.plain()) is Named


class Hidden(nn.MultiheadAttention):
    """Has a forward of its own, in which PyTorch's reads both weights."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("training", [True, False])
def test_a_subclass_that_hides_its_projections_sees_the_blocks_of_both(training: bool) -> None:
    ours, x = adapt(Hidden(E, H, batch_first=True), trained=True).train(training), torch.randn(B, L, E)
    (plain,) = slora.merge_and_unload(nn.Sequential(copy.deepcopy(ours)))
    y = ours(x, x, x)[0]
    torch.testing.assert_close(y, plain(x, x, x)[0], rtol=1e-4, atol=1e-4)
    y.sum().backward()
    assert ours.lora_B.grad.any()
    assert ours.out_proj.lora_B.grad.any()


# open_clip's own class


def open_clip_attention(**options: Any) -> nn.Module:
    transformer = pytest.importorskip("open_clip.transformer")
    base = transformer.Attention(E, H, **options)
    nn.init.normal_(base.in_proj_bias)
    return base


FORMS = {
    "plain": {},
    "qk norm": {"qk_norm": True},
    "scaled cosine": {"scaled_cosine": True},
    "scaled heads, inner norm": {"scale_heads": True, "inner_norm": True},
    "dropout": {"attn_drop": 0.3, "proj_drop": 0.2},
}


def cosine_fixed(base: nn.Module) -> nn.Module:
    """open_clip 3.3.0 calls `torch.bmm` on four dimensions in the scaled cosine form; `matmul` is what it means."""

    class Fixed(type(base)):
        def forward(self, x: Tensor, attn_mask: Tensor | None = None) -> Tensor:
            N, L, C = x.shape
            q, k, v = (
                t.reshape(N, L, self.num_heads, -1).transpose(1, 2)
                for t in F.linear(x, self.in_proj_weight, self.in_proj_bias).chunk(3, dim=-1)
            )
            scale = torch.clamp(self.logit_scale, max=self.logit_scale_max).exp()
            weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(-1, -2)) * scale
            weights = weights if attn_mask is None else weights + attn_mask
            return self.out_proj((weights.softmax(-1) @ v).transpose(1, 2).reshape(N, L, C))

    base.__class__ = Fixed
    return base


def form_of(form: str) -> nn.Module:
    base = open_clip_attention(**FORMS[form])
    return cosine_fixed(base) if form == "scaled cosine" else base


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("mask", ["none", "bool", "float"])
def test_open_clips_attention_is_its_own_bit_for_bit_until_the_first_step(form: str, mask: str) -> None:
    base = form_of(form)
    ours = adapt(base)
    assert isinstance(ours, ProjectionAttention)
    assert isinstance(ours, type(base))
    x = torch.randn(B, L, E)
    attn_mask = {"none": None, "bool": torch.rand(L, L) > 0.8, "float": torch.randn(L, L)}[mask]
    if form == "scaled cosine" and mask == "bool":
        attn_mask = None
    for training in (True, False):
        torch.manual_seed(3)
        expected = base.train(training)(x, attn_mask=attn_mask)
        torch.manual_seed(3)
        assert torch.equal(ours.train(training)(x, attn_mask=attn_mask), expected)


@pytest.mark.parametrize("form", [f for f in FORMS if f != "dropout"])
def test_open_clips_attention_after_training_is_that_of_the_merged_weights(form: str) -> None:
    ours = adapt(form_of(form), trained=True)
    x = torch.randn(B, L, E, requires_grad=True)
    with torch.no_grad():
        ours.gate[1] = 0.0
    (plain,) = slora.merge_and_unload(nn.Sequential(copy.deepcopy(ours)))
    assert not isinstance(plain, ProjectionAttention)
    y, expected = ours(x), plain(x)
    torch.testing.assert_close(y, expected, rtol=1e-4, atol=1e-4)
    (one,) = torch.autograd.grad(y.square().sum(), x)
    (two,) = torch.autograd.grad(expected.square().sum(), x)
    # fp32 through two projections and a softmax: 1e-4 of the largest element.
    torch.testing.assert_close(one, two, rtol=0, atol=1e-4 * float(two.abs().max()))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda m: pickle.loads(pickle.dumps(m))], ids=["deepcopy", "pickle"])
def test_a_copy_of_open_clips_attention_computes_the_same(copied: Callable[[nn.Module], nn.Module]) -> None:
    ours = adapt(open_clip_attention(), trained=True)
    x = torch.randn(B, L, E)
    twin = copied(ours)
    assert torch.equal(twin(x), ours(x))
    with torch.no_grad():
        twin.gate.zero_()
    assert not torch.equal(twin(x), ours(x))


class NoProjection(nn.Module):
    """Has the parameters, of which it reads the bias alone."""

    def __init__(self) -> None:
        super().__init__()
        self.in_proj_weight = nn.Parameter(torch.randn(3 * E, E))
        self.in_proj_bias = nn.Parameter(torch.randn(3 * E))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.in_proj_bias[:E]


def test_a_class_that_never_reads_its_projection_is_refused_rather_than_skipped() -> None:
    ours = adapt(NoProjection(), out_proj=False)
    with pytest.raises(TargetError, match=r"NoProjection does not read self.in_proj_weight"):
        ours(torch.randn(2, E))


class OwnProjection(NoProjection):
    """Multiplies by itself."""

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (x @ part.t() for part in self.in_proj_weight.chunk(3))
        return q + k * v + self.in_proj_bias[:E]


def test_a_class_that_multiplies_by_itself_sees_the_blocks() -> None:
    ours, x = adapt(OwnProjection(), trained=True, out_proj=False), torch.randn(2, E)
    (plain,) = slora.merge_and_unload(nn.Sequential(copy.deepcopy(ours)))
    torch.testing.assert_close(ours(x), plain(x), rtol=1e-4, atol=1e-4)


# torch.compile


@pytest.mark.parametrize("which", ["nn.MultiheadAttention", "open_clip"])
def test_compiled_attention_has_one_graph_and_the_same_results_while_gates_move(which: str) -> None:
    torch._dynamo.reset()
    ours = adapt(
        attention() if which == "nn.MultiheadAttention" else open_clip_attention(), trained=True, inactive="exact"
    )
    x = torch.randn(B, L, E, requires_grad=True)

    def run(x: Tensor) -> Tensor:
        return ours(x, x, x, need_weights=False)[0] if which == "nn.MultiheadAttention" else ours(x)

    def results(call: Callable[[Tensor], Tensor]) -> list[Tensor]:
        y = call(x)
        leaves = (x, ours.lora_A, ours.lora_B, ours.gate, ours.out_proj.lora_A, ours.out_proj.gate)
        return [y.detach(), *torch.autograd.grad(y.square().sum(), leaves)]

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager")
    results(compiled)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for gates in ([0.15, 0.15, 0.15], [0.05, 0.15, 0.05], [0.15, 0.05, 0.15]):
            with torch.no_grad():
                ours.gate.copy_(torch.tensor(gates))
            for one, two in zip(results(compiled), results(run), strict=True):
                torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)
    torch._dynamo.reset()
