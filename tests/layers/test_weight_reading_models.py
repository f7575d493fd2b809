"""Models of timm, torchvision, open_clip and transformers that read weights past their layers."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

import slora
from slora.layers import adapted_layers


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
