"""Zero-shot classification: logits by class prompts, and classes that are groups of a model's outputs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slora import DataError
from slora.evaluation import GroupedLogits, ZeroShotClassifier, accuracy

TEMPLATES = ("a photo of a {}.", "art of the {}.")


def tokens(texts: list[str]) -> Tensor:
    """Letters as tokens of a vocabulary of 40, padded with 0 to a context of 7; the largest one ends a text."""
    ids = [[1 + ord(letter) % 37 for letter in text[-6:]] + [39] for text in texts]
    return torch.tensor([row + [0] * (7 - len(row)) for row in ids])


@pytest.fixture
def clip(families: dict[str, Any]) -> nn.Module:
    return families["open_clip"].build().eval()


def test_logits_are_scaled_cosines_to_the_mean_of_the_class_prompts(clip: Any) -> None:
    names = ["cat", "dog", "red fox"]
    images = torch.randn(5, 3, 16, 16)
    weights = []
    for name in names:
        each = [clip.encode_text(tokens([template.format(name)]))[0] for template in TEMPLATES]
        mean = sum(embedding / embedding.norm() for embedding in each)
        weights.append(mean / mean.norm())
    embedded = clip.encode_image(images)
    expected = torch.stack(
        [torch.stack([clip.logit_scale.exp() * (x / x.norm()) @ w for w in weights]) for x in embedded]
    )
    classifier = ZeroShotClassifier(clip.train(), tokens, names, TEMPLATES)
    assert clip.training
    assert torch.allclose(classifier.eval()(images), expected, rtol=1e-4, atol=1e-4)
    labels = expected.argmax(1)
    assert accuracy(classifier, [(images, labels)]).top1 == 1.0
    assert not [name for name, _ in classifier.named_parameters() if not name.startswith("clip.")]


def test_a_bias_of_the_logits_is_added(clip: Any) -> None:
    images = torch.randn(2, 3, 16, 16)
    plain = ZeroShotClassifier(clip, tokens, ["a", "b"], TEMPLATES)(images)
    clip.logit_bias = nn.Parameter(torch.tensor(-10.0))
    assert torch.allclose(ZeroShotClassifier(clip, tokens, ["a", "b"], TEMPLATES)(images), plain - 10)


@pytest.mark.parametrize("names", [[], ["cat", " "]])
def test_classes_without_a_name_are_refused(clip: Any, names: list[str]) -> None:
    with pytest.raises(DataError, match="class names"):
        ZeroShotClassifier(clip, tokens, names, TEMPLATES)


def test_the_largest_logit_of_a_group_is_that_of_its_class() -> None:
    logits = torch.tensor([[1.0, 5.0, 2.0, 9.0], [4.0, -1.0, -2.0, 0.0]])
    grouped = GroupedLogits(nn.Identity(), [(2,), (0, 1)])(logits)
    assert grouped.tolist() == [[2.0, 5.0], [-2.0, 4.0]]


def test_the_output_of_a_group_may_be_an_object_with_logits(make_mlp: Callable[..., nn.Module]) -> None:
    class Output(nn.Module):
        def forward(self, images: Tensor) -> Any:
            return type("Output", (), {"logits": images})

    assert GroupedLogits(Output(), [(1,)])(torch.tensor([[1.0, 2.0]])).tolist() == [[2.0]]
