"""Models by name."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from slora import CheckpointError, ConfigError
from slora.training import TrainSettings, prepare
from slora.training.models import ClipClassifier, build, check_name


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
