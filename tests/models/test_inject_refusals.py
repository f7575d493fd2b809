"""Injections that are refused: the reason in words, and the model as it was."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import slora
from slora.errors import ConfigError, StateError, TargetError
from tests.models.adapting import Config, assert_unchanged, names_of, small, state_of

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
