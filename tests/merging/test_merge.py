"""Merging against `W + scale c B A` built by hand in fp64 and rounded once; unmerging bit for bit."""

from __future__ import annotations

import copy
import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slora
from slora.errors import ConfigError
from slora.layers import LoRABlocks, adapted_layers
from tests.merging.merged_models import adapted, assert_restored, snapshot

pytestmark = pytest.mark.usefixtures("poisoned")

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def by_hand(layer: LoRABlocks, scale: float) -> Tensor:
    """`W + scale * c * B A` over the active blocks in fp64, not rounded."""
    weight = layer.base_weight.detach().double().clone()
    n = weight.shape[0] // layer.blocks
    for i, gate in enumerate(layer.gate.tolist()):
        if gate >= layer.threshold:
            update = layer.lora_B[i].detach().double() @ layer.lora_A[i].detach().double()
            weight[i * n : (i + 1) * n] += scale * layer.lora_alpha / layer.r * update
    return weight


def half_ulp(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Half the distance between neighbours of `dtype` around each fp64 number."""
    info = torch.finfo(dtype)
    exponent = torch.floor(torch.log2(x.abs().clamp(min=info.tiny)))
    return torch.exp2(exponent) * info.eps / 2


@pytest.mark.parametrize("scale", [1.0, 0.3, -2.0, 0.0])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_merged_weights_are_the_exact_sum_rounded_once(
    dtype: torch.dtype, scale: float, vit: nn.Module, randomise: Any
) -> None:
    model = adapted(vit, randomise, dtype)
    expected = {name: by_hand(layer, scale) for name, layer in adapted_layers(model)}
    slora.merge(model, scale)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    for name, layer in adapted_layers(model):
        weight, exact = layer.base_weight, expected[name]
        assert weight.dtype == dtype
        # Half a unit of the final rounding, and r + 1 = 4 products and sums in the wider dtype of numbers below 4.
        bound = half_ulp(exact, dtype) * (1 + 2 * torch.finfo(dtype).eps) + 4 * 4 * torch.finfo(wide).eps
        assert bool(((weight.double() - exact).abs() <= bound).all()), name


def test_a_small_update_of_bf16_weights_is_merged_by_nearest_rounding_of_the_sum(
    vit: nn.Module, randomise: Any
) -> None:
    # Adding bf16(c B A) to the bf16 weight rounds twice, and rounding B A in bf16 products more often.
    model = adapted(vit, randomise, torch.bfloat16)
    layer = model.get_submodule("blocks.0.attn.proj")
    with torch.no_grad():
        layer.lora_B.mul_(0.01)
    exact = by_hand(layer, 1.0)
    slora.merge(model)
    nearest = exact.float().bfloat16()
    share = float((layer.weight == nearest).float().mean())
    # fp32 and fp64 sums round to different bf16 numbers only within fp32 error of a tie: about 2^-15 of elements.
    assert share > 0.99


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_unmerging_restores_every_bit(dtype: torch.dtype, vit: nn.Module, randomise: Any) -> None:
    model = adapted(vit, randomise, dtype)
    before = snapshot(model)
    for scale in (1.0, 0.1, -3.0):
        slora.merge(model, scale)
        slora.unmerge(model)
        assert_restored(model, before)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_family_of_models_gets_all_its_bits_back(dtype: torch.dtype, family: Any, randomise: Any) -> None:
    model = family.build().to(dtype).eval()
    randomise(slora.inject(model, slora.SelectiveLoRAConfig(r=2)), active=0.6)
    before = snapshot(model)
    slora.merge(model, 0.7)
    assert any(not torch.equal(p, before[name][1]) for name, p in model.named_parameters())
    slora.unmerge(model)
    assert_restored(model, before)


def test_in_a_clip_only_weights_with_an_active_block_change(randomise: Any) -> None:
    open_clip = pytest.importorskip("open_clip")
    with torch.device("meta"):
        model = open_clip.CLIP(**open_clip.get_model_config("ViT-B-32")).to(torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.linspace(-0.05, 0.05, p.numel(), dtype=torch.bfloat16).view_as(p))
    slora.inject(model, slora.SelectiveLoRAConfig(r=4))
    randomise(model, active=0.06)
    active = slora.active_blocks(model)
    share = float(torch.cat(list(active.values())).float().mean())
    assert 0.03 < share < 0.09
    before = {name: layer.base_weight.detach().clone() for name, layer in adapted_layers(model)}
    versions = {name: p._version for name, p in model.named_parameters()}
    slora.merge(model)
    kept = 0
    for name, layer in adapted_layers(model):
        W, old, n = layer.base_weight, before[name], layer.base_weight.shape[0] // layer.blocks
        for i, on in enumerate(active[name].tolist()):
            rows = slice(i * n, (i + 1) * n)
            assert torch.equal(W[rows], old[rows]) != on, f"block {i} of {name}"
        assert (layer.weight_backup is not None) == bool(active[name].any())
        kept += layer.weight_backup is not None
    written = [name for name, p in model.named_parameters() if p._version != versions[name]]
    assert len(written) == kept, "nothing but these weights was written"
    slora.unmerge(model)
    for name, layer in adapted_layers(model):
        assert torch.equal(layer.base_weight, before[name]), name


def test_merged_output_is_the_adapted_output_and_takes_base_flops(vit: nn.Module, randomise: Any) -> None:
    model = adapted(vit, randomise)
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    with slora.disabled(model):
        base = model(x)
        flops = slora.ops.flops.count_flops(model, x)
    slora.merge(model)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(model(x), base, rtol=1e-4, atol=1e-5)
    assert slora.ops.flops.count_flops(model, x) == flops
    assert not model(x).requires_grad, "nothing is trained while merged"


def test_while_merged_gates_and_matrices_have_no_effect(vit: nn.Module, randomise: Any) -> None:
    model = slora.merge(adapted(vit, randomise))
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    randomise(model, active=0.5, seed=9)
    assert torch.equal(model(x), expected)


@pytest.mark.parametrize("keep", ["device", "cpu", None])
def test_only_weights_that_change_are_copied_and_none_moves(keep: Any, vit: nn.Module, randomise: Any) -> None:
    model = adapted(vit, randomise)
    before = snapshot(model)
    active = {name for name, on in slora.active_blocks(model).items() if on.any()}
    slora.merge(model, keep=keep)
    for name, layer in adapted_layers(model):
        changed = not torch.equal(layer.weight, before[f"{name}.weight"][1])
        assert changed == (name in active)
        assert (layer.weight_backup is not None) == (changed and keep is not None)
        assert bool(layer.unmerge_updates) == (changed and keep is None)
    slora.unmerge(model)
    # Addresses are part of captured CUDA graphs.
    assert {name: p.data_ptr() for name, p in model.named_parameters()} == {n: at for n, (at, _) in before.items()}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_without_a_copy_unmerging_comes_within_two_roundings(
    dtype: torch.dtype, vit: nn.Module, randomise: Any
) -> None:
    model = adapted(vit, randomise, dtype)
    before = snapshot(model)
    slora.merge(model, keep=None)
    merged = snapshot(model)
    randomise(model, seed=5)
    slora.unmerge(model)
    wide = torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32)
    for name, layer in adapted_layers(model):
        old, new = (which[f"{name}.weight"][1].double() for which in (before, merged))
        # Half a unit each way, of a number at most half a unit larger than the base itself, and twice the error of
        # sums of 3 products below 4.
        larger = torch.maximum(old.abs(), new.abs())
        allowed = 2 * half_ulp(larger * (1 + torch.finfo(dtype).eps), dtype) + 2 * 4 * 4 * wide.eps
        assert bool(((layer.weight.double() - old).abs() <= allowed).all()), name
    assert not any(layer.merged or layer.unmerge_updates for _, layer in adapted_layers(model))


def test_merging_without_a_copy_survives_a_copy_and_a_move(vit: nn.Module, randomise: Any) -> None:
    model = adapted(vit, randomise)
    before = snapshot(model)
    slora.merge(model, keep=None)
    for which in (copy.deepcopy(model), model.to(torch.float64)):
        slora.unmerge(which)
        for name, p in which.named_parameters():
            torch.testing.assert_close(p.float(), before[name][1], rtol=1e-6, atol=1e-6)


def test_an_unknown_choice_of_what_to_keep_is_refused(vit: nn.Module, randomise: Any) -> None:
    model = adapted(vit, randomise)
    before = snapshot(model)
    with pytest.raises(ConfigError, match=r'keep=\'disk\' is unknown; use "device", "cpu" or None'):
        slora.merge(model, keep="disk")  # type: ignore[arg-type]
    assert_restored(model, before)


def test_parameters_stay_the_same_objects(vit: nn.Module, randomise: Any) -> None:
    model = adapted(vit, randomise)
    before = {name: id(p) for name, p in model.named_parameters()}
    slora.unmerge(slora.merge(model))
    assert {name: id(p) for name, p in model.named_parameters()} == before


def test_a_merge_survives_a_move_and_a_copy(vit: nn.Module, randomise: Any) -> None:
    model = adapted(vit, randomise)
    before = snapshot(model)
    slora.merge(model)
    twin = copy.deepcopy(model)
    assert_restored(slora.unmerge(twin), before)
    slora.unmerge(model.to(torch.float64))
    assert all(p.dtype == torch.float64 for p in model.parameters())
    for name, p in model.named_parameters():
        assert torch.equal(p.float(), before[name][1]), name


def test_merge_and_unload_leaves_plain_pytorch(vit: nn.Module, randomise: Any) -> None:
    keys, kinds = list(vit.state_dict()), [type(module) for module in vit.modules()]
    model = adapted(vit, randomise, modules_to_save=["head"])
    x = torch.randn(2, 3, 16, 16)
    y = model(x)
    expected = {name: by_hand(layer, 1.0) for name, layer in adapted_layers(model)}
    plain = slora.merge_and_unload(model)
    assert plain is model
    assert list(plain.state_dict()) == keys
    assert [type(module) for module in plain.modules()] == kinds
    assert not hasattr(plain, "_slora")
    for name, weight in expected.items():
        torch.testing.assert_close(plain.get_submodule(name).weight.double(), weight, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(plain(x), y, rtol=1e-4, atol=1e-5)
    slora.inject(plain, slora.SelectiveLoRAConfig(r=2))


def test_merge_and_unload_of_a_merged_model_keeps_its_weights(vit: nn.Module, randomise: Any) -> None:
    model = slora.merge(adapted(vit, randomise), 0.5)
    merged = {name: layer.weight.clone() for name, layer in adapted_layers(model)}
    plain = slora.merge_and_unload(model)
    for name, weight in merged.items():
        assert torch.equal(plain.get_submodule(name).weight, weight)


def test_merge_and_unload_takes_a_scale(vit: nn.Module, randomise: Any) -> None:
    model = adapted(vit, randomise)
    other = copy.deepcopy(model)
    slora.merge(other, 0.25)
    slora.merge_and_unload(model, 0.25)
    for name, layer in adapted_layers(other):
        assert torch.equal(model.get_submodule(name).weight, layer.weight)


def test_rank_stabilised_scaling_is_merged(vit: nn.Module, randomise: Any) -> None:
    model = adapted(vit, randomise, use_rslora=True)
    layer = model.get_submodule("blocks.0.attn.proj")
    expected = layer.weight.double() + 4 / math.sqrt(3) * (layer.lora_B[0].double() @ layer.lora_A[0].double())
    slora.merge(model)
    torch.testing.assert_close(layer.weight.double(), expected, rtol=1e-6, atol=1e-6)
