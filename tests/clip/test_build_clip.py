"""CLIPs by name, with both towers."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from slora import CheckpointError, ConfigError
from slora.clip import Clip, ClipClassifier
from slora.models.input_spec import InputSpec
from slora.sources.models import build, build_clip, check_name
from slora.sources.registry import CLIPS, ClipModel, register_clip


def test_a_clip_has_both_towers_with_the_weights_of_a_file(tiny: str, weights: str) -> None:
    import open_clip

    clip = build_clip(tiny, weights)
    plain = open_clip.create_model("ViT-tiny-clip", pretrained=weights)
    images, tokens = torch.randn(2, 3, 16, 16), clip.tokenizer(["a photo of a cat", "a dog"])
    assert tokens.dtype == torch.int64
    assert tokens.shape == (2, 12)
    assert torch.equal(clip.model.encode_image(images), plain.encode_image(images))
    assert torch.equal(clip.model.encode_text(tokens), plain.encode_text(tokens))
    assert (clip.input.channels, clip.input.size) == (3, 16)
    assert clip.input.mean == open_clip.OPENAI_DATASET_MEAN


def test_the_name_may_hold_the_file(tiny: str, weights: str) -> None:
    named, given = build_clip(f"{tiny}:{weights}"), build_clip(tiny, weights)
    assert torch.equal(named.model.token_embedding.weight, given.model.token_embedding.weight)


@pytest.fixture
def registered(tiny: str) -> Iterator[str]:
    def make(pretrained: bool, img_size: int | None, model_args: object) -> Clip:
        clip = build_clip(tiny)
        torch.nn.init.constant_(clip.model.logit_scale, float(pretrained))
        return Clip(clip.model, lambda texts: torch.ones(len(texts), 12, dtype=torch.int64), InputSpec(3, 16))

    register_clip("demo/some_clip", ClipModel(make))
    yield "demo/some_clip"
    del CLIPS["demo/some_clip"]


def test_a_registered_clip_comes_with_its_own_tokenizer_and_weights(registered: str, weights: str) -> None:
    clip = build_clip(registered, True)
    assert clip.tokenizer(["any text"]).tolist() == [[1] * 12]
    assert clip.model.logit_scale.item() == 1.0
    assert build_clip(registered, False).model.logit_scale.item() == 0.0
    loaded = build_clip(registered, weights)
    assert torch.equal(loaded.model.token_embedding.weight, torch.load(weights)["token_embedding.weight"])


def test_a_registered_clip_is_also_an_image_tower_with_a_new_head(registered: str) -> None:
    model, spec = build(registered, 7)
    assert isinstance(model, ClipClassifier)
    assert model(torch.zeros(1, spec.channels, spec.size, spec.size)).shape == (1, 7)


def test_weights_of_another_architecture_are_refused(tiny: str, weights: str) -> None:
    with pytest.raises(CheckpointError, match=r"tiny.pt does not hold weights of open_clip/ViT-wide-clip \(.*mismatch"):
        build_clip("open_clip/ViT-wide-clip", weights)


def test_a_file_that_holds_no_weights_is_refused(tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.pt"
    path.write_text("no weights")
    with pytest.raises(CheckpointError, match=r"notes.pt does not hold weights of open_clip/ViT-tiny-clip"):
        build_clip(tiny, str(path))


@pytest.mark.parametrize(
    ("name", "pretrained", "message"),
    [
        ("timm/vit_tiny_patch16_224", True, "'timm/vit_tiny_patch16_224' has no text tower; use a CLIP"),
        ("timm/vit_tiny_patch16_224", "openai", "pretrained='openai' names weights, which only a CLIP takes"),
        ("open_clip/ViT-B-32", "nowhere/x.pt", "'nowhere/x.pt' is neither a file nor a pretrained tag of open_clip/V"),
        ("open_clip/ViT-B-32", "opnai", "tag of open_clip/ViT-B-32 'opnai' is unknown; near names are openai"),
        ("open_clip/ViT-B-32:openai", "laion2b_e16", "name different weights; leave one of them out"),
    ],
)
def test_weights_that_do_not_fit_a_name_are_refused_early(name: str, pretrained: bool | str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_clip(name, pretrained)


def test_a_tag_may_be_given_apart_from_the_name() -> None:
    assert check_name("open_clip/ViT-B-32", "openai") == check_name("open_clip/ViT-B-32:openai")
