"""`inject` and `unload` on every model family: what is targeted, what stays, and what a failure leaves behind."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slora
from slora.errors import ConfigError, StateError, TargetError
from slora.layers import LoRABlocks, ProjectionAttention, SelectiveLoRAAttention, SelectiveLoRALinear, adapted_layers
from slora.models.injection_record import injection
from slora.models.targets import targets

Config = slora.SelectiveLoRAConfig


@pytest.fixture
def slow_path() -> Iterator[None]:
    """PyTorch's attention as it runs in training; its fused inference kernels round differently."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    yield
    torch.backends.mha.set_fastpath_enabled(enabled)


def small(**settings: Any) -> Config:
    return Config(**{"r": 3, **settings})


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in adapted_layers(model)]


def state_of(model: nn.Module) -> dict[str, Any]:
    """Everything that a failed call must leave as it was."""
    return {
        "modules": [(name, type(module), id(module)) for name, module in model.named_modules()],
        "parameters": [(n, id(p), p.requires_grad, p.dtype, p.data_ptr()) for n, p in model.named_parameters()],
        "values": {name: value.clone() for name, value in model.state_dict().items()},
        "attributes": sorted(model.__dict__),
        "fused": [
            (name, getattr(module, "activation_relu_or_gelu", None), getattr(module, "use_nested_tensor", None))
            for name, module in model.named_modules()
        ],
    }


def assert_unchanged(model: nn.Module, before: dict[str, Any]) -> None:
    after = state_of(model)
    values, old = after.pop("values"), before.pop("values")
    assert after == before
    assert values.keys() == old.keys()
    for name, value in values.items():
        assert torch.equal(value, old[name]), name


# Every family


@pytest.mark.parametrize("training", [True, False], ids=["training", "eval"])
def test_after_injection_the_output_is_the_base_model_bit_for_bit(family: Any, training: bool, slow_path: None) -> None:
    model = family.build().train(training)
    inputs = family.inputs()

    def run() -> list[Tensor]:
        torch.manual_seed(5)
        found = [family.run(model, *inputs)]
        torch.manual_seed(5)
        with torch.no_grad():
            return [*found, family.run(model, *inputs)]

    expected = run()
    slora.inject(model, small())
    for one, two in zip(run(), expected, strict=True):
        assert torch.equal(one, two)
    with slora.disabled(model):
        for one, two in zip(run(), expected, strict=True):
            assert torch.equal(one, two)


@pytest.mark.parametrize("how", ["autocast", "bf16 model"])
def test_in_bf16_the_output_is_the_base_model_bit_for_bit(family: Any, how: str, slow_path: None) -> None:
    model, inputs = family.build().eval(), family.inputs()
    if how == "bf16 model":
        model.bfloat16()
        inputs = [t.bfloat16() if t.is_floating_point() else t for t in inputs]

    def run() -> Tensor:
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=how == "autocast"):
            return family.run(model, *inputs)

    expected = run()
    slora.inject(model, small())
    assert all(layer.lora_A.dtype == layer.gate.dtype == torch.float32 for _, layer in adapted_layers(model))
    assert torch.equal(run(), expected)


def test_in_inference_fused_kernels_of_the_base_agree_up_to_rounding(family: Any) -> None:
    model = family.build().eval()
    inputs = family.inputs()
    with torch.no_grad():
        expected = family.run(model, *inputs)
        slora.inject(model, small())
        # Outputs are normalised, so of order 1; two layers of fp32 sums in another order stay far below this.
        torch.testing.assert_close(family.run(model, *inputs), expected, rtol=1e-5, atol=1e-5)


def test_base_keys_are_unchanged_and_only_the_adapter_is_new_and_trainable(family: Any) -> None:
    model = family.build()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    slora.inject(model, small())
    after = model.state_dict()
    assert [name for name in after if name in before] == list(before)
    for name, value in before.items():
        assert torch.equal(after[name], value), name
    new = {name for name in after if name not in before}
    assert new == {f"{name}.{p}" for name in names_of(model) for p in ("lora_A", "lora_B", "gate")}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == new


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


def test_every_block_learns_and_the_base_stays(family: Any, randomise: Any) -> None:
    model = randomise(slora.inject(family.build(), small(inactive="exact")), 0.6)
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    inputs = family.inputs()
    optimizer = torch.optim.AdamW(slora.parameter_groups(model))
    before = family.run(model.eval(), *inputs).detach()
    family.run(model.train(), *inputs).square().mean().backward()
    for name, layer in adapted_layers(model):
        active = layer.gate >= 0.1
        for i in range(layer.blocks):
            for p in (layer.lora_A, layer.lora_B):
                assert (p.grad is not None and bool(p.grad[i].any())) == bool(active[i]), name
        assert layer.gate.grad.all(), name
    optimizer.step()
    assert not torch.equal(family.run(model.eval(), *inputs), before)
    for name, p in model.named_parameters():
        if name in base:
            assert torch.equal(p, base[name]), name
            assert p.grad is None


def test_merging_gives_the_output_of_the_adapted_model_and_unmerging_the_old_bits(
    family: Any, randomise: Any, slow_path: None
) -> None:
    model = randomise(slora.inject(family.build().eval(), small()), 0.6)
    inputs = family.inputs()
    base = {name: p.clone() for name, p in model.named_parameters()}
    with torch.no_grad():
        expected = family.run(model, *inputs)
        slora.merge(model)
        torch.testing.assert_close(family.run(model, *inputs), expected, rtol=1e-4, atol=1e-4)
        slora.unmerge(model)
        assert torch.equal(family.run(model, *inputs), expected)
    for name, p in model.named_parameters():
        assert torch.equal(p, base[name]), name


def test_unload_gives_the_plain_model_back(family: Any, randomise: Any, slow_path: None) -> None:
    model = family.build().eval()
    inputs = family.inputs()
    expected = family.run(model, *inputs)
    kinds = [(name, type(module)) for name, module in model.named_modules()]
    fused = state_of(model)["fused"]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    randomise(slora.inject(model, small()))
    family.run(model, *inputs)
    assert slora.unload(model) is model
    assert [(name, type(module)) for name, module in model.named_modules()] == kinds
    assert state_of(model)["fused"] == fused
    assert list(model.state_dict()) == list(state)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state[name])
    assert not any(p.requires_grad for p in model.parameters()), "the base stays frozen, as documented"
    for p in model.parameters():
        p.requires_grad_(True)
    assert torch.equal(family.run(model, *inputs), expected)
    slora.inject(model, small())
    assert len(names_of(model)) == family.adapted


def test_a_copy_of_an_adapted_model_is_adapted_and_independent(family: Any, randomise: Any) -> None:
    model = randomise(slora.inject(family.build().eval(), small()))
    inputs = family.inputs()
    expected = family.run(model, *inputs)
    twin = copy.deepcopy(model)
    assert torch.equal(family.run(twin, *inputs), expected)
    with torch.no_grad():
        for _, layer in adapted_layers(twin):
            layer.gate.zero_()
    assert not torch.equal(family.run(twin, *inputs), expected)
    assert torch.equal(family.run(model, *inputs), expected)
    assert injection(twin).config == injection(model).config


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


# Which modules


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


def test_single_parameters_are_trained_in_full(vit: nn.Module) -> None:
    model = slora.inject(vit, small(modules_to_save=["cls_token", "blocks.1.norm1.weight", "head"]))
    full = {
        name
        for name, p in model.named_parameters()
        if p.requires_grad and not name.endswith(("lora_A", "lora_B", "gate"))
    }
    assert full == {"cls_token", "blocks.1.norm1.weight", "head.weight", "head.bias"}
    assert injection(model).modules_to_save == ("head",)
    assert injection(model).parameters_to_save == ("cls_token", "blocks.1.norm1.weight")
    groups = slora.parameter_groups(model)
    (saved,) = (group["params"] for group in groups if group["name"] == "saved_no_decay")
    assert any(p is model.get_parameter("blocks.1.norm1.weight") for p in saved)


def test_an_ending_of_a_parameter_means_all_that_end_so(vit: nn.Module) -> None:
    model = slora.inject(vit, small(modules_to_save=["norm1.bias"]))
    assert injection(model).parameters_to_save == ("blocks.0.norm1.bias", "blocks.1.norm1.bias")


def test_modules_to_save_are_trained_in_full_and_not_adapted(vit: nn.Module) -> None:
    model = slora.inject(vit, small(modules_to_save=["head", "blocks.1.mlp"]))
    trainable = {
        name for name, p in model.named_parameters() if p.requires_grad and "lora" not in name and "gate" not in name
    }
    assert trainable == {
        *("head.weight", "head.bias"),
        *(f"blocks.1.mlp.{fc}.{p}" for fc in ("fc1", "fc2") for p in ("weight", "bias")),
    }
    assert not any(name.startswith("blocks.1.mlp") for name in names_of(model))
    assert injection(model).modules_to_save == ("head", "blocks.1.mlp")


def test_an_explicit_number_of_blocks_applies_everywhere(vit: nn.Module) -> None:
    model = slora.inject(vit, small(blocks=4))
    assert {layer.blocks for _, layer in adapted_layers(model)} == {4}


def test_auto_blocks_are_three_for_fused_qkv_and_one_elsewhere(vit: nn.Module) -> None:
    model = slora.inject(vit, small())
    assert {name.rpartition(".")[2]: layer.blocks for name, layer in adapted_layers(model)} == {
        "qkv": 3, "proj": 1, "fc1": 1, "fc2": 1,
    }  # fmt: skip


def test_base_dtype_is_kept_by_the_weights_of_adapted_layers_only(vit: nn.Module) -> None:
    model = slora.inject(vit, small(base_dtype=torch.bfloat16, modules_to_save=["head"]))
    for name, layer in adapted_layers(model):
        assert layer.weight.dtype == layer.bias.dtype == torch.bfloat16, name
        assert layer.lora_A.dtype == torch.float32
    assert model.head.weight.dtype == model.patch_embed.proj.weight.dtype == torch.float32
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = model(torch.randn(2, 3, 16, 16))
    y.float().sum().backward()
    assert model.get_submodule("blocks.0.attn.qkv").lora_B.grad.any()


def test_without_a_config_the_defaults_hold(vit: nn.Module) -> None:
    assert injection(slora.inject(vit)).config == Config()


# Errors, and what they leave behind

FAILURES: dict[str, tuple[Config, type[Exception], list[str]]] = {
    "no match, list": (
        small(target_modules=["qvk"]),
        TargetError,
        ["target_modules entry 'qvk' matches no module", "'qkv'"],
    ),
    "no match, regex": (
        small(target_modules=r"blocks\.0\.atn\.qkv"),
        TargetError,
        [
            r"target_modules='blocks\\.0\\.atn\\.qkv' is a string, so a regular expression for whole names of modules",
            "near names are 'blocks.0.attn.qkv'",
        ],
    ),
    "a name for a regex": (
        small(target_modules="qkv"),
        TargetError,
        ["'qkv' is a string, so a regular expression for whole names", "use a list: target_modules=['qkv']"],
    ),
    "names for a regex": (small(exclude_modules="fc1,fc2"), TargetError, ["a list: exclude_modules=['fc1', 'fc2']"]),
    "one entry of several": (small(target_modules=["qkv", "fc3"]), TargetError, ["'fc3' matches no module", "'fc1'"]),
    "only a convolution": (
        small(target_modules=["patch_embed.proj"]),
        TargetError,
        ["matches only modules that cannot be adapted, such as 'patch_embed.proj' (Conv2d)"],
    ),
    "exclude without match": (small(exclude_modules=["fc3"]), TargetError, ["exclude_modules entry 'fc3'", "'fc1'"]),
    "save a base weight": (
        small(modules_to_save=["blocks.0.attn.qkv.weight"]),
        TargetError,
        ["'blocks.0.attn.qkv.weight'", "'blocks.0.attn.qkv' is adapted", "exclude_modules"],
    ),
    "save a base bias": (small(modules_to_save=["fc1.bias"]), TargetError, ["'blocks.0.mlp.fc1' is adapted"]),
    "save a parameter without match": (
        small(modules_to_save=["cls_tokn"]),
        TargetError,
        ["modules_to_save entry 'cls_tokn' matches no module or parameter", "'cls_token'"],
    ),
    "save without match": (small(modules_to_save=["haed"]), TargetError, ["modules_to_save entry 'haed'", "'head'"]),
    "everything excluded": (small(target_modules=["qkv"], exclude_modules=["qkv"]), TargetError, ["no layer to adapt"]),
    "everything saved": (small(target_modules=["fc1"], modules_to_save=["mlp"]), TargetError, ["no layer to adapt"]),
    "blocks": (small(blocks=5), ConfigError, ["blocks=5 does not divide out_features=72 of 'blocks.0.attn.qkv'"]),
    "rank": (small(r=25), ConfigError, ["r=25 is above min(in_features, out_features)=24 of 'blocks.0.attn.qkv'"]),
    "rank of a late layer": (
        small(rank_pattern={r"blocks\.1\.mlp\.fc2": 30}),
        ConfigError,
        ["r=30 is above", "'blocks.1.mlp.fc2'"],
    ),
}


@pytest.mark.parametrize("case", FAILURES)
def test_a_refused_injection_names_the_reason_and_leaves_the_model_as_it_was(case: str, vit: nn.Module) -> None:
    config, kind, texts = FAILURES[case]
    vit.blocks[0].requires_grad_(False)
    before = state_of(vit)
    with pytest.raises(kind) as raised:
        slora.inject(vit, config)
    for text in texts:
        assert text in str(raised.value)
    assert isinstance(raised.value, (slora.SLoRAError, ValueError))
    assert_unchanged(vit, before)
    slora.inject(vit, small())


def test_an_injection_that_fails_half_way_leaves_the_model_as_it_was(
    family: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = family.build()
    next(model.parameters()).requires_grad_(False)
    before = state_of(model)
    made = []

    def out_of_memory(*args: Any, **kwargs: Any) -> None:
        made.append(1)
        if len(made) == 3:
            raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(nn.init, "kaiming_uniform_", out_of_memory)
    with pytest.raises(torch.OutOfMemoryError):
        slora.inject(model, small(base_dtype=torch.bfloat16))
    assert_unchanged(model, before)


def test_injecting_twice_is_refused_and_changes_nothing(vit: nn.Module) -> None:
    model = slora.inject(vit, small())
    before = state_of(model)
    for part in (model, model.blocks[1]):
        with pytest.raises(StateError, match=r"adapted already \(\d layers, the first '.*'\); call slora.unload"):
            slora.inject(part, small())
    assert_unchanged(model, before)


def test_a_part_of_a_model_can_be_adapted_alone(vit: nn.Module) -> None:
    slora.inject(vit.blocks[1], small())
    assert {name.split(".")[1] for name in names_of(vit)} == {"1"}
    assert vit.blocks[0].attn.qkv.weight.requires_grad


class Trainer(nn.Module):
    """A module of a user around the one that was adapted."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model


@pytest.mark.parametrize("where", ["around", "deep around", "part", "slice"])
def test_another_module_than_the_one_that_was_adapted_is_told_which_to_pass(where: str, tmp_path: Path) -> None:
    model = slora.inject(nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Linear(4, 4))), small(r=2))
    slora.save_adapter(model, tmp_path / "own")
    other, message = {
        "around": (Trainer(model), r"Trainer is not adapted itself, its 'model' is; pass .*, as in model\.model$"),
        "deep around": (
            nn.Sequential(Trainer(model)), r"its '0.model' is; .* as in model\.get_submodule\('0.model'\)$"
        ),
        "part": (model[1], "Sequential holds adapted layers, the first '0', but is not the module that slora.inject"),
        "slice": (model[:1], "Sequential holds adapted layers, the first '0', but is not the module that slora.inject"),
    }[where]  # fmt: skip
    for call in (slora.save_adapter, slora.load_adapter):
        with pytest.raises(StateError, match=message):
            call(other, tmp_path / ("new" if call is slora.save_adapter else "own"))
    assert not (tmp_path / "new").exists()
    if "around" in where:
        with pytest.raises(
            StateError, match=r"adapted already \(2 layers, the first '.*', by slora.inject of its '.*'\)"
        ):
            slora.inject(other, small(r=2))


class LoraConfig:
    """A config of another library."""

    r = 4


@pytest.mark.parametrize("config", [LoraConfig(), {"r": 4}, "all-linear"])
def test_a_config_of_another_library_is_refused(config: Any, vit: nn.Module) -> None:
    kind = rf"{type(config).__module__}\.{type(config).__name__}"
    with pytest.raises(ConfigError, match=rf"config is a {kind}; use slora.SelectiveLoRAConfig\(r=\.\.\., target"):
        slora.inject(vit, config)


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_with_adapters_of_peft_is_refused(whole: bool) -> None:
    peft = pytest.importorskip("peft")
    plain = nn.Sequential(nn.Linear(8, 8), nn.ReLU(), nn.Linear(8, 2))
    config = peft.LoraConfig(r=2, target_modules=["0"])
    model = peft.get_peft_model(plain, config) if whole else peft.inject_adapter_in_model(config, plain)
    before = state_of(model)
    first = r"the model is a peft\.peft_model\.PeftModel" if whole else r"'0' is a peft\.tuners\.lora\.layer\.Linear"
    with pytest.raises(StateError, match=rf"{first} of PEFT, .*merge_and_unload\(\)"):
        slora.inject(model, small(r=2))
    assert_unchanged(model, before)
    if whole:
        assert names_of(slora.inject(model.merge_and_unload(), small(r=2))) == ["0", "2"]


class Conv1D(nn.Module):
    """As in GPT-2 of transformers."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4))


def tied_head() -> nn.Module:
    model = nn.Sequential()
    model.add_module("embed", nn.Embedding(7, 4))
    model.add_module("body", nn.Sequential(Conv1D(), Conv1D()))
    model.add_module("lm_head", nn.Linear(4, 7, bias=False))
    model.lm_head.weight = model.embed.weight
    return model


HEAD_ONLY = nn.Sequential()
HEAD_ONLY.add_module("body", nn.Conv2d(3, 4, 3))
HEAD_ONLY.add_module("head", nn.Linear(4, 2))

UNFIT: dict[str, tuple[nn.Module, str]] = {
    "convolutions of size 1": (nn.Sequential(nn.Conv2d(3, 4, 1)), "timm's ConvNeXt with conv_mlp=False"),
    "convolutions": (nn.Sequential(nn.Conv2d(3, 4, 3)), "Sequential has no linear layer to adapt; convolutions"),
    "a lone linear": (nn.Linear(3, 4), "wrap it first, as in nn.Sequential(layer), or use slora.SelectiveLoRALinear"),
    "a tied head": (
        tied_head(),
        f"no linear layer below its head to adapt (2 layers are {__name__}.Conv1D, such as 'body.0': not supported "
        "yet); convolutions, embeddings and norms are not adapted: choose another model",
    ),
    "a head": (
        HEAD_ONLY,
        "no linear layer below its head to adapt; adapt the head itself with target_modules=['head']",
    ),
}


@pytest.mark.parametrize("case", UNFIT)
def test_a_model_with_nothing_to_adapt_is_refused_with_what_to_do(case: str) -> None:
    model, message = UNFIT[case]
    with pytest.raises(TargetError) as raised:
        slora.inject(model, small())
    assert message in str(raised.value)


def test_what_the_refusals_advise_works() -> None:
    timm = pytest.importorskip("timm")
    tiny = {"pretrained": False, "depths": (1, 1, 1, 1), "dims": (8, 8, 16, 16), "num_classes": 5}
    model = timm.create_model("convnext_tiny", conv_mlp=True, **tiny)
    with pytest.raises(TargetError, match="conv_mlp=False"):
        slora.inject(model, small())
    assert len(names_of(slora.inject(timm.create_model("convnext_tiny", conv_mlp=False, **tiny), small()))) == 8
    assert names_of(slora.inject(nn.Sequential(nn.Linear(3, 4)), small(r=1))) == ["0"]
    assert names_of(slora.inject(copy.deepcopy(HEAD_ONLY), small(r=1, target_modules=["head"]))) == ["head"]


def test_unloading_a_merged_model_is_refused(vit: nn.Module, randomise: Any) -> None:
    model = slora.merge(randomise(slora.inject(vit, small())))
    before = state_of(model)
    with pytest.raises(StateError, match=r"'blocks.0.attn.qkv' is merged; call slora.unmerge\(model\) first"):
        slora.unload(model)
    assert_unchanged(model, before)


# Layers that cannot be adapted


class Doubling(nn.Linear):
    """A subclass whose forward computes something else, as quantised layers do."""

    def forward(self, x: Tensor) -> Tensor:
        return 2 * super().forward(x)


class Packed(nn.Parameter):
    """A parameter of a class of its own, as quantised weights are, with the dtype that it computes in."""


def odd_layers() -> dict[str, tuple[nn.Module, str]]:
    """Linear layers that cannot be adapted, and what is said of each."""

    def with_weight(weight: Tensor, kind: type = nn.Parameter) -> nn.Linear:
        linear = nn.Linear(8, 8)
        linear.weight = kind(weight, requires_grad=False)
        return linear

    utils, normed = nn.utils, nn.utils.parametrizations
    pruned, pruned_bias = nn.Linear(8, 8), nn.Linear(8, 8)
    utils.prune.l1_unstructured(pruned, "weight", 0.5)
    utils.prune.random_unstructured(pruned_bias, "bias", 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        old_norm = utils.weight_norm(nn.Linear(8, 8))
        warnings.simplefilter("ignore", DeprecationWarning)
        packed = torch.ao.quantization.quantize_dynamic(nn.Sequential(nn.Linear(8, 8)), {nn.Linear})
    replaced = nn.Linear(8, 8)
    forward = replaced.forward
    replaced.forward = lambda x: 2 * forward(x)
    parametrized = r"remove_parametrizations\(module, 'weight'\)"
    return {
        "own forward": (Doubling(8, 8), r"Doubling has a forward of its own; adapt the model before"),
        "packed by torch": (packed[0], r"torch\.ao\.nn\.quantized\.dynamic\.\S*Linear keeps its weight quantised"),
        "replaced forward": (replaced, "its forward was replaced on the instance"),
        "parametrised": (normed.orthogonal(nn.Linear(8, 8)), parametrized),
        "weight norm": (normed.weight_norm(nn.Linear(8, 8)), parametrized),
        "parametrised bias": (
            normed.weight_norm(nn.Linear(8, 8), "bias", dim=0), "its bias is computed from others"
        ),
        "weight norm by hooks": (old_norm, r"remove_weight_norm\(module, 'weight'\)"),
        "spectral norm by hooks": (utils.spectral_norm(nn.Linear(8, 8)), r"remove_spectral_norm\(module, 'weight'\)"),
        "pruned": (pruned, r"its weight is pruned at each call; torch.nn.utils.prune.remove\(module, 'weight'\)"),
        "pruned bias": (pruned_bias, r"its bias is pruned at each call; torch.nn.utils.prune.remove\(module, 'bias'\)"),
        "integer weight": (with_weight(torch.ones(8, 8, dtype=torch.int8)), "its weight has dtype torch.int8; adapt"),
        "float8 weight": (with_weight(torch.ones(8, 8).to(torch.float8_e4m3fn)), "dtype torch.float8_e4m3fn; adapt"),
        "packed weight": (with_weight(torch.ones(32, 1)), r"its weight has shape \[32, 1\], packed or sharded"),
        "quantised weight": (with_weight(torch.ones(8, 8), Packed), "its weight is a Packed; inject before it is"),
        "sparse weight": (with_weight(torch.ones(8, 8).to_sparse()), "its weight has layout torch.sparse_coo"),
    }  # fmt: skip


@pytest.mark.parametrize("kind", odd_layers())
def test_layers_that_compute_their_weight_or_output_otherwise_are_left_alone_by_name(kind: str) -> None:
    odd, reason = odd_layers()[kind]
    model = nn.Sequential()
    model.add_module("odd", odd)
    with pytest.raises(
        TargetError, match=rf"Sequential has no linear layer that can be adapted; 'odd' cannot: .*{reason}"
    ):
        slora.inject(model, small())
    model.add_module("usual", nn.Linear(8, 8))
    with pytest.raises(TargetError, match=rf"modules that cannot be adapted, such as 'odd' \(\w+\): .*{reason}"):
        slora.inject(model, small(target_modules=["odd"]))
    with pytest.warns(slora.SkippedLayerWarning, match=rf"leaves out linear layers .*: 'odd': .*{reason}"):
        slora.inject(model, small())
    assert names_of(model) == ["usual"]
    slora.unload(model)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slora.inject(model, small(exclude_modules=["odd"]))


class Language(nn.Module):
    """An embedding whose matrix is also that of the head."""

    def __init__(self, tied: str) -> None:
        super().__init__()
        self.embed, self.body, self.lm_head = nn.Embedding(6, 8), nn.Linear(8, 8), nn.Linear(8, 6, bias=False)
        if tied == "parameter":
            self.lm_head.weight = self.embed.weight
        else:
            self.lm_head.weight = nn.Parameter(self.embed.weight.data)


@pytest.mark.parametrize("device", ["cpu", "meta"])
@pytest.mark.parametrize("tied", ["parameter", "memory"])
def test_a_tied_head_is_refused_at_inject_and_left_out_by_all_linear(tied: str, device: str) -> None:
    if (tied, device) == ("memory", "meta"):
        pytest.skip("on meta nothing lies anywhere")
    with torch.device(device):
        model = Language(tied)
    before = [id(p) for p in model.parameters()]
    with pytest.raises(TargetError, match=r"the weight of 'lm_head' is also 'embed.weight'.*a weight of its own"):
        slora.inject(model, small(target_modules=["body", "lm_head"]))
    assert [id(p) for p in model.parameters()] == before
    assert names_of(slora.inject(model, small())) == ["body"]
    slora.unload(model)
    model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
    assert names_of(slora.inject(model, small(target_modules=["body", "lm_head"]))) == ["body", "lm_head"]


def test_a_tied_head_of_a_language_model_is_refused_at_inject() -> None:
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=40, hidden_size=24, num_hidden_layers=1, num_attention_heads=2, intermediate_size=48,
        tie_word_embeddings=True,
    )  # fmt: skip
    model = transformers.LlamaForCausalLM(config)
    with pytest.raises(TargetError, match=r"the weight of 'lm_head' is also 'model.embed_tokens.weight'"):
        slora.inject(model, small(target_modules=["q_proj", "lm_head"]))


def test_two_layers_that_share_a_weight_are_left_out_by_all_linear_by_name() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = model[0].weight
    with pytest.warns(
        slora.SkippedLayerWarning, match=r"'0': its weight is also '1.weight'; '1': its weight is also '0"
    ):
        slora.inject(model, small())
    assert names_of(model) == ["2"]


def test_lazy_layers_have_to_be_run_once_before() -> None:
    model = nn.Sequential(nn.LazyLinear(8), nn.LazyLinear(8))
    with pytest.raises(TargetError, match=r"'0.weight' of a lazy module has no shape yet; run the model once"):
        slora.inject(model, small())
    assert all(p.requires_grad for p in model.parameters())
    model(torch.randn(2, 6))
    assert names_of(slora.inject(model, small())) == ["0", "1"]


@pytest.mark.parametrize("options", [{"kdim": 8}, {"vdim": 8}], ids=str)
def test_attention_with_separate_projections_is_left_alone_with_its_output_projection(options: dict[str, int]) -> None:
    # nn.MultiheadAttention reads out_proj.weight and never calls it: blocks there would be skipped silently.
    model = nn.Sequential()
    model.add_module("attn", nn.MultiheadAttention(12, 2, **options))
    model.add_module("fc", nn.Linear(12, 12))
    model.add_module("fc2", nn.Linear(12, 12))
    with pytest.warns(slora.SkippedLayerWarning, match=r"'attn.out_proj': attention that cannot be adapted reads its"):
        slora.inject(model, small())
    assert names_of(model) == ["fc2"]
    slora.unload(model)
    with pytest.raises(TargetError, match=r"cannot be adapted, such as 'attn.out_proj' \(.*\): attention that cannot"):
        slora.inject(model, small(target_modules=["out_proj"]))


class OwnForward(nn.MultiheadAttention):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        return super().forward(*args, **kwargs)


@pytest.mark.parametrize("attention", [nn.MultiheadAttention, OwnForward])
@pytest.mark.parametrize(
    "config",
    [{"target_modules": ["out_proj"]}, {"exclude_modules": ["attn"]}],
    ids=["out_proj alone", "attention excluded"],
)
def test_an_output_projection_that_is_never_called_is_refused(
    attention: type[nn.Module], config: dict[str, Any]
) -> None:
    model = nn.Sequential()
    model.add_module("attn", attention(12, 2))
    model.add_module("fc2", nn.Linear(12, 12))
    before = state_of(model)
    with pytest.raises(TargetError, match=r"'attn.out_proj' belongs to an nn.MultiheadAttention, which reads"):
        slora.inject(model, small(**config))
    assert_unchanged(model, before)


# Shared modules and weights, hooks


class Shared(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.one = nn.Linear(6, 6)
        self.two = self.one
        self.deep = nn.Sequential(self.one, nn.Tanh(), nn.Linear(6, 6))

    def forward(self, x: Tensor) -> Tensor:
        return self.deep(self.two(torch.tanh(self.one(x))))


def test_a_module_in_several_places_is_adapted_once_and_stands_in_all_of_them(randomise: Any) -> None:
    model = Shared()
    x = torch.randn(3, 6)
    expected = model(x)
    slora.inject(model, small())
    assert model.one is model.two is model.deep[0]
    assert isinstance(model.one, SelectiveLoRALinear)
    assert len(names_of(model)) == 2
    assert torch.equal(model(x), expected)
    randomise(model)
    one = model.one
    weight = one.weight + one.scaling * one.lora_B[0] @ one.lora_A[0]
    step = torch.tanh(F.linear(x, weight, one.bias))
    torch.testing.assert_close(
        model(x), model.deep[2](torch.tanh(F.linear(F.linear(step, weight, one.bias), weight, one.bias)))
    )
    slora.unload(model)
    assert type(model.one) is nn.Linear
    assert model.one is model.two is model.deep[0]
    assert torch.equal(model(x), expected)


def test_hooks_stay_on_their_modules_and_can_be_removed(vit: nn.Module) -> None:
    seen: list[str] = []
    layer = vit.get_submodule("blocks.0.mlp.fc1")
    handle = layer.register_forward_hook(lambda *_: seen.append("fc1"))
    model = slora.inject(vit, small())
    x = torch.randn(1, 3, 16, 16)
    model(x)
    assert seen == ["fc1"]
    slora.unload(model)
    model(x)
    assert seen == ["fc1", "fc1"]
    handle.remove()
    model(x)
    assert seen == ["fc1", "fc1"]


def test_a_hook_that_replaces_the_output_still_does(vit: nn.Module) -> None:
    vit.get_submodule("blocks.1.mlp.fc2").register_forward_hook(lambda m, i, y: torch.zeros_like(y))
    x = torch.randn(1, 3, 16, 16)
    expected = vit(x)
    assert torch.equal(slora.inject(vit, small())(x), expected)


# nn.TransformerEncoder: fused inference would read weights past the blocks


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


# torch.compile of a whole model


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_results(model: nn.Module, call: Callable[[Tensor], Tensor], x: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    y = call(x)
    y.square().mean().backward()
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {"y": y.detach(), **found}


@pytest.mark.once
def test_a_vit_block_compiled_by_inductor_is_one_graph_that_serves_while_gates_move(
    vit: nn.Module, randomise: Any, fresh_dynamo: None
) -> None:
    model = randomise(slora.inject(vit.blocks[0], small(inactive="exact")))
    x = torch.randn(2, 5, 24)
    compiled = torch.compile(model, fullgraph=True)
    compiled_results(model, compiled, x)
    with torch._dynamo.config.patch(error_on_recompile=True):
        for share in (1.0, 0.5, 0.0):
            randomise(model, share)
            one, two = compiled_results(model, compiled, x), compiled_results(model, model, x)
            assert one.keys() == two.keys() | {n for n in one if "lora_" in n}
            for name in two:
                torch.testing.assert_close(one[name], two[name], rtol=1e-3, atol=1e-5, msg=name)


def test_every_family_compiles_to_one_graph(family: Any, randomise: Any, fresh_dynamo: None) -> None:
    model = randomise(slora.inject(family.build().eval(), small(inactive="exact")), 0.6)
    inputs = family.inputs()

    def run(*inputs: Tensor) -> Tensor:
        return family.run(model, *inputs)

    expected = run(*inputs)
    found = torch.compile(run, fullgraph=True, backend="aot_eager")(*inputs)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)


def test_the_layer_classes_are_those_that_users_may_look_for(vit: nn.Module) -> None:
    model = slora.inject(vit, small())
    assert all(isinstance(layer, (LoRABlocks, nn.Linear)) for _, layer in adapted_layers(model))
    assert isinstance(model.get_submodule("blocks.0.attn.qkv"), slora.SelectiveLoRALinear)
