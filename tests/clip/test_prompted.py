"""Zero-shot logits and the contrastive loss, against open_clip and against the formula by hand."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

import slora
from slora import ConfigError
from slora.clip import Clip, PromptedClip, Prompts
from slora.clip.prompts import templates
from slora.layers import adapted_layers
from slora.models.input_spec import InputSpec
from slora.training import TrainSettings, prepare
from tests.clip import tiny_clip

NAMES = ("cat", "small dog", "red fox", "owl")


def made(trains_text: bool = False, contrastive: bool = False, count: int = 3) -> PromptedClip:
    import open_clip

    clip = Clip(tiny_clip.model(), open_clip.get_tokenizer("ViT-tiny-clip"), InputSpec(3, 16))
    prompts = Prompts(NAMES, templates("simple")[:count])
    return PromptedClip(clip, prompts, trains_text, contrastive)


@pytest.fixture(autouse=True)
def _registered(tiny: str) -> None:
    """Every test builds the tiny CLIP."""


@pytest.fixture
def pixels() -> Tensor:
    return torch.randn(5, 3, 16, 16)


@pytest.mark.parametrize("trains_text", [False, True])
def test_zero_shot_logits_are_those_of_open_clips_classifier(trains_text: bool, pixels: Tensor) -> None:
    import open_clip

    model = made(trains_text).eval().requires_grad_(False)
    classifier = open_clip.build_zero_shot_classifier(model.clip, model.tokenizer, NAMES, model.prompts.templates)
    expected = model.clip.logit_scale.exp() * model.clip.encode_image(pixels, normalize=True) @ classifier
    with torch.no_grad():
        assert torch.allclose(model(pixels), expected, rtol=1e-5, atol=1e-5)


def by_hand(model: PromptedClip, pixels: Tensor, labels: list[int], chosen: list[int]) -> Tensor:
    """The loss of FLYP's code: InfoNCE in both directions, in which each pair alone is a positive."""
    texts = [model.prompts.templates[t].format(NAMES[label]) for t, label in zip(chosen, labels, strict=True)]
    image = F.normalize(model.clip.encode_image(pixels), dim=-1)
    text = F.normalize(model.clip.encode_text(model.tokenizer(texts)), dim=-1)
    similarities = model.clip.logit_scale.exp() * image @ text.T
    n = len(labels)
    rows = [-(similarities[i, i] - similarities[i].logsumexp(0)) for i in range(n)]
    columns = [-(similarities[i, i] - similarities[:, i].logsumexp(0)) for i in range(n)]
    return (sum(rows) + sum(columns)) / (2 * n)


def test_the_contrastive_loss_and_its_gradients_are_those_of_the_formula(pixels: Tensor) -> None:
    model = made(trains_text=True, contrastive=True).eval()
    # Two images of one class: each counts as a negative of the other.
    labels = [1, 0, 1, 3, 2]
    parameters = [p for p in model.clip.parameters() if p.requires_grad]
    ours = torch.autograd.grad(model(pixels, torch.tensor(labels)).loss, parameters, allow_unused=True)
    theirs = torch.autograd.grad(by_hand(model, pixels, labels, [0, 1, 2, 0, 1]), parameters, allow_unused=True)
    found = 0
    for mine, expected in zip(ours, theirs, strict=True):
        assert (mine is None) == (expected is None)
        if mine is not None and expected is not None:
            found += 1
            assert torch.allclose(mine, expected, rtol=1e-4, atol=1e-6 + 1e-5 * float(expected.abs().max()))
    names = [name for name, p in model.clip.named_parameters() if p.requires_grad]
    assert found == len(names)


def test_training_draws_the_template_of_each_image(pixels: Tensor) -> None:
    model = made(trains_text=True, contrastive=True).train()
    labels = [1, 0, 1, 3, 2]
    torch.manual_seed(11)
    loss = model(pixels, torch.tensor(labels)).loss
    torch.manual_seed(11)
    drawn = torch.randint(3, (5,)).tolist()
    assert torch.allclose(loss, by_hand(model, pixels, labels, drawn), rtol=1e-5)
    assert len({model(pixels, torch.tensor(labels)).loss.item() for _ in range(8)}) > 1


def test_cross_entropy_with_a_trained_text_tower_draws_a_prompt_for_each_class(pixels: Tensor) -> None:
    model = made(trains_text=True).train()
    torch.manual_seed(11)
    logits = model(pixels)
    torch.manual_seed(11)
    texts = [model.prompts.templates[t].format(name) for t, name in zip(torch.randint(3, (4,)), NAMES, strict=True)]
    text = F.normalize(model.clip.encode_text(model.tokenizer(texts)), dim=-1)
    expected = model.clip.logit_scale.exp() * F.normalize(model.clip.encode_image(pixels), dim=-1) @ text.T
    assert torch.allclose(logits, expected, rtol=1e-5, atol=1e-5)
    logits.sum().backward()
    assert model.clip.token_embedding.weight.grad is not None


def test_without_a_trained_text_tower_no_text_runs_in_training(pixels: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    model = made().train()
    model.before_training()
    monkeypatch.setattr(model.clip, "encode_text", None)
    assert model(pixels).shape == (5, 4)
    assert all(not module.training for module in model.eval().modules())


def test_class_embeddings_follow_the_blocks_of_the_text_tower(pixels: Tensor) -> None:
    model = made(trains_text=True)
    prepare(model, settings=TrainSettings(head="zero-shot", tower="text", r=2))
    model.eval()
    base = model.class_embeddings()
    assert model.class_embeddings() is base
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.lora_B.normal_(std=0.1)
    changed = model.class_embeddings()
    assert not torch.allclose(changed, base)
    with slora.disabled(model):
        assert torch.equal(model.class_embeddings(), base)
    slora.merge(model)
    # Merging rounds each weight once, relatively 2^-24 of it; in these layers that is far below a thousandth.
    assert (model.class_embeddings() - changed).norm() < 1e-3 * (changed - base).norm()
    slora.unmerge(model)
    slora.merge(model, 0.5)
    assert not torch.allclose(model.class_embeddings(), changed)
    slora.unmerge(model)
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.gate.fill_(0.0)
    assert torch.allclose(model.class_embeddings(), base, atol=1e-6)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_class_embeddings_follow_an_optimizer_step(optimizer: str, pixels: Tensor) -> None:
    from slora.training.optimizers import Optimizers

    model = made(trains_text=True)
    settings = TrainSettings(head="zero-shot", tower="text", r=2, optimizer=optimizer, lr=0.1)
    prepare(model, settings=settings)
    model.eval()
    base = model.class_embeddings()
    optimizers = Optimizers(model, settings)
    model.train()(pixels).sum().backward()
    optimizers.weights.step()
    assert not torch.equal(model.eval().class_embeddings(), base)


def test_names_of_layers_and_parameters_are_those_of_the_clip() -> None:
    model = made()
    prepare(model, settings=TrainSettings(head="zero-shot", tower="image", r=2))
    names = [name for name, _ in adapted_layers(model)]
    assert names == [name for name, _ in adapted_layers(model.clip)]
    assert names[0].startswith("visual.transformer.resblocks.0")
    trained = {name for name, p in model.clip.named_parameters() if p.requires_grad and "lora_" not in name}
    assert {name for name in trained if not name.endswith("gate")} == {"logit_scale"}


def test_the_scale_is_kept_within_the_bounds_of_pretraining() -> None:
    model = made()
    for value, expected in ((5.0, math.log(100)), (-0.5, 0.0), (2.0, 2.0)):
        torch.nn.init.constant_(model.clip.logit_scale, value)
        model.after_step()
        assert model.clip.logit_scale.item() == pytest.approx(expected)
    model.clip.logit_scale.requires_grad_(False)
    torch.nn.init.constant_(model.clip.logit_scale, 5.0)
    model.after_step()
    assert model.clip.logit_scale.item() == 5.0


def test_logits_are_fp32_under_autocast(pixels: Tensor) -> None:
    model = made(trains_text=True, contrastive=True).eval()
    exact = model(pixels)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(pixels).dtype == torch.float32
        assert model(pixels, torch.tensor([0, 1, 2, 3, 0])).loss.dtype == torch.float32
    assert exact.dtype == torch.float32


@pytest.mark.parametrize(
    ("names", "of", "message"),
    [
        ((), ("a {}",), "no name of a class"),
        (("cat",), (), "no template"),
        (("cat",), ("a {}", "a photo"), "'a photo'; a template has one {}"),
    ],
)
def test_prompts_that_name_nothing_are_refused(names: tuple[str, ...], of: tuple[str, ...], message: str) -> None:
    clip = Clip(tiny_clip.model(), lambda texts: torch.zeros(len(texts), 8), InputSpec(3, 16))
    with pytest.raises(ConfigError, match=message):
        PromptedClip(clip, Prompts(names, of), False, False)
