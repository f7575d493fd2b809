"""Which layers a config targets, in names, regular expressions and patterns, and how many blocks each has."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

import slora
from slora.errors import TargetError
from slora.layers import LoRABlocks, ProjectionAttention, adapted_layers
from slora.models.targets import targets
from tests.models.adapting import names_of, small


def test_all_linear_adapts_every_linear_layer_but_the_head(family: Any) -> None:
    model = family.build()
    linears = {name for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    attention = {name for name, module in model.named_modules() if hasattr(module, "in_proj_weight")}
    slora.inject(model, small())
    found = names_of(model)
    assert set(found) == (linears - set(family.head)) | attention
    assert len(found) == family.adapted
    for name in family.head:
        assert type(model.get_submodule(name)) is nn.Linear


def test_the_families_use_every_kind_of_layer(families: dict[str, Any]) -> None:
    found = {
        name: {type(layer).__mro__[0].__name__ for _, layer in adapted_layers(slora.inject(family.build(), small()))}
        for name, family in families.items()
    }
    assert found["timm-vit"] == {"SelectiveLoRALinear"}
    assert found["open_clip"] == {"SelectiveLoRALinear", "SelectiveLoRAAttention"}
    assert found["encoder"] == {"SelectiveLoRALinear", "SelectiveLoRAAttention"}


def test_open_clip_has_adapted_layers_in_both_towers(families: dict[str, Any]) -> None:
    model = slora.inject(families["open_clip"].build(), small())
    assert [name for name in names_of(model) if name.startswith("visual.transformer.resblocks.1.")] == [
        "visual.transformer.resblocks.1.attn",
        "visual.transformer.resblocks.1.attn.out_proj",
        "visual.transformer.resblocks.1.mlp.c_fc",
        "visual.transformer.resblocks.1.mlp.c_proj",
    ]
    assert len([name for name in names_of(model) if name.startswith("transformer.resblocks.")]) == 8


def test_open_clips_custom_blocks_get_its_own_attention_class_adapted(slow_path: None) -> None:
    open_clip = pytest.importorskip("open_clip")
    model = open_clip.CLIP(
        embed_dim=16,
        vision_cfg={
            "layers": 1, "width": 32, "head_width": 8, "patch_size": 8, "image_size": 16,
            "block_type": "custom", "qk_norm": True,
        },
        text_cfg={"context_length": 7, "vocab_size": 40, "width": 24, "heads": 3, "layers": 1},
    )  # fmt: skip
    if not any(isinstance(m, open_clip.transformer.Attention) for m in model.modules()):
        pytest.skip("this open_clip has no option for its own attention class")
    image = torch.randn(2, 3, 16, 16)
    expected = model.encode_image(image)
    slora.inject(model, small())
    assert any(isinstance(layer, ProjectionAttention) for _, layer in adapted_layers(model))
    assert torch.equal(model.encode_image(image), expected)


def test_a_regular_expression_matches_whole_names(vit: nn.Module) -> None:
    assert list(targets(vit, small(target_modules=r"blocks\.\d+\.attn\.qkv"))) == [
        "blocks.0.attn.qkv",
        "blocks.1.attn.qkv",
    ]
    with pytest.raises(TargetError):
        targets(vit, small(target_modules=r"attn\.qkv"))


def test_a_list_matches_whole_parts_at_the_end_of_names(vit: nn.Module) -> None:
    found = list(targets(vit, small(target_modules=["qkv", "mlp.fc2"])))
    assert found == ["blocks.0.attn.qkv", "blocks.0.mlp.fc2", "blocks.1.attn.qkv", "blocks.1.mlp.fc2"]
    with pytest.raises(TargetError, match="target_modules entry 'kv' matches no module"):
        targets(vit, small(target_modules=["kv"]))


def test_an_ending_that_also_hits_a_convolution_adapts_the_linears_only(vit: nn.Module) -> None:
    assert isinstance(vit.get_submodule("patch_embed.proj"), nn.Conv2d)
    assert list(targets(vit, small(target_modules=["proj"]))) == ["blocks.0.attn.proj", "blocks.1.attn.proj"]


@pytest.mark.parametrize("exclude", [["qkv", "fc1"], r".*(qkv|fc1)"], ids=["list", "regex"])
def test_excluded_modules_are_left_alone(vit: nn.Module, exclude: Any) -> None:
    model = slora.inject(vit, small(exclude_modules=exclude))
    assert {name.rpartition(".")[2] for name in names_of(model)} == {"proj", "fc2"}
    assert type(model.get_submodule("blocks.0.attn.qkv")) is nn.Linear


def test_the_head_is_adapted_where_it_is_named(vit: nn.Module) -> None:
    assert names_of(slora.inject(vit, small(target_modules=["head"]))) == ["head"]


def test_rank_and_alpha_patterns_override_by_name(vit: nn.Module) -> None:
    model = slora.inject(
        vit,
        small(
            r=2, lora_alpha=4,
            rank_pattern={"qkv": 5, r"blocks\.0\.mlp\.fc1": 7}, alpha_pattern={"fc[12]": 10},
        ),
    )  # fmt: skip
    layers = dict(adapted_layers(model))
    assert {name: (layer.r, layer.lora_alpha) for name, layer in layers.items() if name.startswith("blocks.0")} == {
        "blocks.0.attn.qkv": (5, 4.0),
        "blocks.0.attn.proj": (2, 4.0),
        "blocks.0.mlp.fc1": (7, 10.0),
        "blocks.0.mlp.fc2": (2, 10.0),
    }
    assert layers["blocks.1.mlp.fc1"].r == 2
    assert layers["blocks.0.attn.qkv"].lora_A.shape == (3, 5, 24)


@pytest.mark.parametrize("field", ["rank_pattern", "alpha_pattern"])
def test_a_pattern_that_is_about_no_adapted_layer_is_refused_with_near_names(vit: nn.Module, field: str) -> None:
    before = {name: type(module) for name, module in vit.named_modules()}
    with pytest.raises(TargetError, match=rf"{field} entry 'qvk' matches no layer that is adapted; .*'qkv'"):
        slora.inject(vit, small(**{field: {"fc1": 3, "qvk": 2}}))
    with pytest.raises(TargetError, match=rf"{field} entry 'kv' matches no"):
        slora.inject(vit, small(**{field: {"kv": 3}}))
    assert {name: type(module) for name, module in vit.named_modules()} == before


def test_an_explicit_number_of_blocks_applies_everywhere(vit: nn.Module) -> None:
    model = slora.inject(vit, small(blocks=4))
    assert {layer.blocks for _, layer in adapted_layers(model)} == {4}


def test_auto_blocks_are_three_for_fused_qkv_and_one_elsewhere(vit: nn.Module) -> None:
    model = slora.inject(vit, small())
    assert {name.rpartition(".")[2]: layer.blocks for name, layer in adapted_layers(model)} == {
        "qkv": 3, "proj": 1, "fc1": 1, "fc2": 1,
    }  # fmt: skip


def test_the_layer_classes_are_those_that_users_may_look_for(vit: nn.Module) -> None:
    model = slora.inject(vit, small())
    assert all(isinstance(layer, (LoRABlocks, nn.Linear)) for _, layer in adapted_layers(model))
    assert isinstance(model.get_submodule("blocks.0.attn.qkv"), slora.SelectiveLoRALinear)
