"""`nn.TransformerEncoder`, whose fused inference would read weights past the blocks, and decoders."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slora
from slora.layers import SelectiveLoRAAttention, adapted_layers
from tests.models.adapting import small


def encoder_of(norm_first: bool = False) -> nn.TransformerEncoder:
    layer = nn.TransformerEncoderLayer(16, 2, 32, dropout=0.1, batch_first=True, norm_first=norm_first)
    return nn.TransformerEncoder(layer, 2, enable_nested_tensor=not norm_first)


def padding() -> Tensor:
    mask = torch.zeros(3, 6, dtype=torch.bool)
    mask[0, 4:] = True
    mask[2, 2:] = True
    return mask


@pytest.mark.parametrize(
    "targeted", [["linear1"], ["linear2"], ["self_attn"], ["self_attn", "out_proj"], "all-linear"], ids=str
)
@pytest.mark.parametrize("masked", ["none", "padding", "causal", "both"])
@pytest.mark.parametrize("norm_first", [False, True], ids=["post-norm", "pre-norm"])
def test_fused_encoder_inference_never_skips_the_blocks(
    targeted: Any, masked: str, norm_first: bool, randomise: Any
) -> None:
    model = encoder_of(norm_first).eval()
    x = torch.randn(3, 6, 16)
    masks: dict[str, Any] = {}
    if masked in ("padding", "both"):
        masks["src_key_padding_mask"] = padding()
    if masked in ("causal", "both"):
        masks["mask"] = torch.ones(6, 6, dtype=torch.bool).triu(1)
    kept = ~padding() if masked in ("padding", "both") else torch.ones(3, 6, dtype=torch.bool)
    base = model(x, **masks)
    slora.inject(model, small(target_modules=targeted))
    with torch.no_grad():
        # Nested tensors give zeros at padding; elsewhere the results agree.
        torch.testing.assert_close(model(x, **masks)[kept], base[kept], rtol=1e-5, atol=1e-5)
    randomise(model)
    trained = model(x, **masks)
    with torch.no_grad():
        torch.testing.assert_close(model(x, **masks)[kept], trained[kept], rtol=1e-5, atol=1e-5)
    assert (trained - base)[kept].abs().max().item() > 1e-2, "the adapter changes the output visibly"
    merged = slora.merge_and_unload(copy.deepcopy(model))
    with torch.no_grad():
        torch.testing.assert_close(merged(x, **masks)[kept], trained[kept], rtol=1e-4, atol=1e-4)


def test_unloading_gives_the_encoder_its_fused_path_back() -> None:
    model = encoder_of().eval()
    x, masks = torch.randn(3, 6, 16), {"src_key_padding_mask": padding()}
    with torch.no_grad():
        expected = model(x, **masks)
        slora.unload(slora.inject(model, small()))
        assert torch.equal(model(x, **masks), expected)


def test_layers_of_an_encoder_without_blocks_keep_their_fused_path(randomise: Any) -> None:
    model = encoder_of().eval()
    slora.inject(model, small(target_modules=["layers.0.linear1"]))
    assert model.layers[0].activation_relu_or_gelu == 0
    assert model.layers[1].activation_relu_or_gelu == 1


def test_an_encoder_layer_outside_an_encoder_is_covered_too(randomise: Any) -> None:
    model = nn.Sequential()
    model.add_module("layer", nn.TransformerEncoderLayer(16, 2, 32, batch_first=True))
    slora.inject(model.eval(), small(target_modules=["linear1"]))
    x = torch.randn(3, 6, 16)
    before = model(x)
    randomise(model)
    with torch.no_grad():
        assert (model(x) - before).abs().max().item() > 1e-2


def test_a_decoder_with_cross_attention_is_adapted(randomise: Any, slow_path: None) -> None:
    model = nn.TransformerDecoder(nn.TransformerDecoderLayer(16, 2, 32, dropout=0.0, batch_first=True), 2)
    x, memory = torch.randn(2, 5, 16), torch.randn(2, 7, 16)
    mask = nn.Transformer.generate_square_subsequent_mask(5)
    expected = model(x, memory, tgt_mask=mask, tgt_is_causal=True)
    slora.inject(model, small())
    assert sum(isinstance(layer, SelectiveLoRAAttention) for _, layer in adapted_layers(model)) == 4
    assert torch.equal(model(x, memory, tgt_mask=mask, tgt_is_causal=True), expected)
    randomise(model)
    trained = model(x, memory, tgt_mask=mask, tgt_is_causal=True)
    merged = slora.merge_and_unload(model)(x, memory, tgt_mask=mask, tgt_is_causal=True)
    torch.testing.assert_close(merged, trained, rtol=1e-4, atol=1e-4)
