"""Attention with one `in_proj_weight`: the bits of PyTorch's own until it is trained, copies, and the way back."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import slora
from slora.errors import ConfigError, ShapeError
from slora.layers import SelectiveLoRAAttention
from tests.layers.attention_modules import B, E, H, L, S, adapt, assert_same, attention, inputs

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.filterwarnings("ignore:Support for mismatched key_padding_mask and attn_mask"),
]

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
