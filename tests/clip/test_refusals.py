"""What is refused before training, and leaves nothing behind."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

import slora.demo  # noqa: F401 (registers its model)
from slora import CheckpointError, ConfigError, SLoRAError, TargetError
from slora.clip import Clip, PromptedClip, Prompts
from slora.models.input_spec import InputSpec
from slora.training import TrainSettings, prepare, train
from slora.training.finetune_run import finetune
from tests.clip import tiny_clip

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tower": "text"}, "tower='text' needs head='zero-shot'; a linear head reads the image tower alone"),
        ({"tower": "both"}, "tower='both' needs head='zero-shot'"),
        ({"loss": "contrastive"}, "loss='contrastive' needs head='zero-shot'"),
        ({"templates": "simple"}, "templates='simple' needs head='zero-shot'"),
        ({"class_names": "names.txt"}, "class_names='names.txt' needs head='zero-shot'"),
        ({"head": "zero-shot", "method": "linear"}, "method='linear' trains a linear head, of which"),
        ({"head": "zero-shot", "head_first": 5}, "head_first=5 needs head='linear'"),
        (
            {"head": "zero-shot", "tower": "both", "label_smoothing": 0.1},
            "label_smoothing=0.1 needs loss='cross-entropy'",
        ),
        (
            {"head": "zero-shot", "tower": "text", "retain_data": "generic"},
            "retain_data='generic' keeps the image embeddings, which tower='text' does not change",
        ),
        ({"head": "zero-shot", "replay_data": "letters"}, "replay_data='letters' needs a pretrained linear head"),
        (
            {"head": "zero-shot", "tower": "both", "drift_penalty": 0.1},
            "drift_penalty=0.1 is measured on images, which do not reach the layers of the text tower",
        ),
        (
            {"head": "zero-shot", "tower": "text", "loss": "cross-entropy", "budget": 0.5, "budget_unit": "flops"},
            "budget_unit='flops' with tower='text' needs loss='contrastive'",
        ),
        ({"head": "zero-shot", "tower": "both", "batch_size": 1}, "batch_size=1 has no negatives"),
        ({"head": "zeroshot"}, "head='zeroshot' is not 'linear' or 'zero-shot'"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainSettings(**settings)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        (
            {"model": "timm/vit_tiny_patch16_224"},
            ConfigError,
            "'timm/vit_tiny_patch16_224' has no text tower; use a",
        ),
        ({"pretrained": False}, ConfigError, "would start from random weights; add --pretrained, with the tag or file"),
        ({"model": "demo/letters_vit", "pretrained": True}, ConfigError, "'demo/letters_vit' has no text tower"),
        ({"templates": "opnai"}, ConfigError, "templates='opnai' is neither openai nor simple nor a file"),
        ({"class_names": "two.txt"}, ConfigError, "two.txt has 2 names, but imagefolder:.* has 3 classes, from 'blue'"),
        ({"model": "open_clip/ViT-wide-clip"}, CheckpointError, "does not hold weights of open_clip/ViT-wide-clip"),
        ({"target_modules": ["visual.proj"]}, TargetError, "visual.proj"),
        (
            {"tower": "text", "target_modules": ["visual.transformer.resblocks.0.mlp.c_fc"]},
            TargetError,
            "names no layer of the text tower",
        ),
    ],
)
def test_a_run_that_cannot_begin_leaves_no_directory(
    settings: dict[str, Any], error: type[SLoRAError], message: str, weights: str, images: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    Path("two.txt").write_text("blue\nred\n")
    given = {"model": tiny_clip.NAME, "pretrained": weights, "data": f"imagefolder:{images}", "head": "zero-shot"}
    given |= {"device": "cpu", "budget": 2, **settings}
    if not settings.get("model", "open_clip").startswith("open_clip"):
        given["pretrained"] = True
    with pytest.raises(error, match=message):
        finetune(given, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_model_without_towers_is_refused_by_name(vit: Any) -> None:
    with pytest.raises(ConfigError, match="VisionTransformer has no image and text tower; use an open_clip model"):
        prepare(vit, settings=TrainSettings(head="zero-shot"))
    assert all(parameter.requires_grad for parameter in vit.parameters())


def test_a_criterion_for_a_model_with_a_loss_of_its_own_is_refused(tiny: str) -> None:
    import open_clip

    clip = Clip(tiny_clip.model(), open_clip.get_tokenizer("ViT-tiny-clip"), InputSpec(3, 16))
    model = PromptedClip(clip, Prompts(("cat", "dog"), ("a {}",)), trains_text=True, contrastive=True)
    data = torch.randn(4, 3, 16, 16), torch.tensor([0, 1, 0, 1])
    settings = TrainSettings(head="zero-shot", tower="both", batch_size=2, max_steps=1, device="cpu", precision="fp32")
    with pytest.raises(ConfigError, match="criterion has no effect on a PromptedClip, which computes its own loss"):
        train(prepare(model, settings=settings), data, settings=settings, criterion=lambda logits, labels: logits.sum())
