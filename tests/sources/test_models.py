"""Models by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

import slora.demo  # noqa: F401 (registers its model and data sets)
from slora import CheckpointError, ConfigError
from slora.sources.models import ClipClassifier, build, check_name
from slora.training import TrainSettings, prepare


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (None, "no model was named; use --model timm/NAME, open_clip/ARCH:PRETRAINED or demo/letters_vit"),
        ("vit", "does not say where it comes from; write timm/NAME"),
        ("vit_base_patch16_224", "does not say where it comes from"),
        ("timm/", "does not say where it comes from"),
        (
            "timm/vit_base_patch16_225",
            "model 'timm/vit_base_patch16_225' is unknown; near names are timm/vit_base_patch16",
        ),
        (
            "timm/vit_base_patch16_224.augreg",
            "tag of timm/vit_base_patch16_224 'augreg' is unknown; near names are augreg_",
        ),
        ("open_clip/ViT-B-33", "model 'open_clip/ViT-B-33' is unknown; near names are open_clip/ViT-B-32"),
        ("open_clip/ViT-B-32:openia", "tag of open_clip/ViT-B-32 'openia' is unknown; near names are openai"),
        ("demo/letter_vit", "'demo/letter_vit' is unknown; near names are demo/letters_vit"),
    ],
)
def test_an_unknown_model_is_refused_early_with_near_names(name: str | None, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        check_name(name)


def test_pretrained_open_clip_weights_have_to_be_named() -> None:
    with pytest.raises(ConfigError, match=r"write one of open_clip/ViT-B-32:openai"):
        check_name("open_clip/ViT-B-32", pretrained=True)


def test_the_demo_model_comes_with_a_head_of_the_asked_size() -> None:
    model, spec = build("demo/letters_vit", 10)
    assert model(torch.zeros(2, spec.channels, spec.size, spec.size)).shape == (2, 10)
    assert (spec.channels, spec.size, spec.mean, spec.std) == (1, 16, (0.0,), (1.0,))


def test_a_timm_model_says_what_images_it_takes() -> None:
    model, spec = build("timm/vit_tiny_patch16_224", 7)
    assert (spec.channels, spec.size, spec.crop) == (3, 224, 0.9)
    assert spec.mean == (0.5, 0.5, 0.5)
    assert model.get_parameter("head.weight").shape == (7, 192)


def test_weights_that_cannot_be_fetched_are_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    import timm

    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise ConnectionError("no route to host\nand much more")

    monkeypatch.setattr(timm, "create_model", unreachable)
    with pytest.raises(
        CheckpointError, match=r"weights of timm/vit_tiny_patch16_224 .*\(no route to host\); check the"
    ):
        build("timm/vit_tiny_patch16_224", 7, pretrained=True)
    with pytest.raises(ConnectionError):
        build("timm/vit_tiny_patch16_224", 7)


@pytest.fixture
def tiny_clip(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    import open_clip
    import open_clip.factory

    config = {
        "embed_dim": 24,
        "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
        "text_cfg": {"context_length": 8, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1},
    }
    (tmp_path / "ViT-tiny-test.json").write_text(json.dumps(config))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    open_clip.add_model_config(tmp_path)
    return "open_clip/ViT-tiny-test"


def test_an_open_clip_tower_gets_a_head_and_every_method_fits_it(tiny_clip: str) -> None:
    model, spec = build(tiny_clip, 5)
    assert isinstance(model, ClipClassifier)
    assert (spec.size, len(spec.mean)) == (16, 3)
    images = torch.randn(2, 3, 16, 16)
    assert model(images).shape == (2, 5)
    assert model.forward_head(model.forward_features(images), pre_logits=True).shape == (2, 24)
    prepare(model, "selective", TrainSettings(r=2))
    trained = {name.rpartition(".")[2] for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {"lora_A", "lora_B", "gate", "weight", "bias"}
    assert {name for name, p in model.named_parameters() if p.requires_grad and name.startswith("head")} == {
        "head.weight",
        "head.bias",
    }


def test_a_timm_model_is_built_for_images_of_another_size_and_with_more_arguments() -> None:
    model, spec = build("timm/vit_tiny_patch16_224", 7, img_size=64, model_args={"depth": 2, "class_token": False,
                                                                               "global_pool": "avg"})  # fmt: skip
    assert spec.size == 64
    assert len(model.get_submodule("blocks")._modules) == 2
    assert model.get_parameter("pos_embed").shape == (1, 16, 192)
    assert model(torch.zeros(1, 3, 64, 64)).shape == (1, 7)


def test_a_timm_model_for_images_of_any_size_is_given_those_asked_for() -> None:
    model, spec = build("timm/resnet18", 7, img_size=32, model_args={"in_chans": 1})
    assert (spec.channels, spec.size) == (1, 32)
    assert spec.mean == (pytest.approx((0.485 + 0.456 + 0.406) / 3),)
    assert model(torch.zeros(2, 1, 32, 32)).shape == (2, 7)


def test_an_open_clip_tower_takes_images_of_another_size_and_more_arguments(tiny_clip: str) -> None:
    model, spec = build(tiny_clip, 5, img_size=24, model_args={"force_quick_gelu": True})
    assert spec.size == 24
    assert model(torch.zeros(1, 3, 24, 24)).shape == (1, 5)
    assert {type(module).__name__ for module in model.modules()} >= {"QuickGELU"}


@pytest.mark.parametrize(
    ("name", "size", "arguments", "message"),
    [
        ("timm/vit_tiny_patch16_224", None, {"dept": 3}, "holds 'dept', which timm/vit_tiny_patch16_224 does not take"),
        ("timm/resnet18", 32, {"dept": 3}, "holds 'dept', which timm/resnet18 does not take"),
        ("clip", 24, {"dept": 3}, "holds 'dept', which open_clip/ViT-tiny-test does not take"),
        ("timm/vit_tiny_patch16_224", 64, {"depth": "x"}, "cannot be built with img_size=64, depth='x' "),
        ("timm/vit_tiny_patch16_224", None, {"in_chans": 4}, "in_chans=4, but images have 1 or 3 channels"),
        ("demo/letters_vit", 32, {}, "and images of 16 x 16 pixels, but img_size=32 was given; remove it"),
        ("demo/letters_vit", None, {"depth": 3}, "takes no arguments .* but depth=3 was given; remove it"),
    ],
)
def test_what_a_model_does_not_take_is_named(
    name: str, size: int | None, arguments: dict[str, Any], message: str, tiny_clip: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        build(tiny_clip if name == "clip" else name, 5, img_size=size, model_args=arguments)


def test_pretrained_weights_that_do_not_fit_the_arguments_are_told_from_a_network_that_fails(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import timm

    def misfit(*args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("Error(s) in loading state_dict for VisionTransformer:\n\tUnexpected key(s)")

    monkeypatch.setattr(timm, "create_model", misfit)
    with pytest.raises(ConfigError, match=r"weights of timm/vit_tiny_patch16_224 do not fit it with depth=2; remove"):
        build("timm/vit_tiny_patch16_224", 7, pretrained=True, model_args={"depth": 2})
