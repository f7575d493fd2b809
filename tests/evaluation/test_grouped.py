"""Classes that are groups of a model's outputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slora import ConfigError
from slora.evaluation import GroupedLogits

pytestmark = pytest.mark.once


def test_the_largest_logit_of_a_group_is_that_of_its_class() -> None:
    logits = torch.tensor([[1.0, 5.0, 2.0, 9.0], [4.0, -1.0, -2.0, 0.0]])
    grouped = GroupedLogits(nn.Identity(), [(2,), (0, 1)])(logits)
    assert grouped.tolist() == [[2.0, 5.0], [-2.0, 4.0]]


def test_the_output_of_a_group_may_be_an_object_with_logits() -> None:
    class Output(nn.Module):
        def forward(self, images: Tensor) -> Any:
            return type("Output", (), {"logits": images})

    assert GroupedLogits(Output(), [(1,)])(torch.tensor([[1.0, 2.0]])).tolist() == [[2.0]]


@pytest.mark.parametrize(
    ("groups", "message"),
    [
        ([[0], []], "class 1 has no output"),
        ([], "there is no class"),
        ([[0], [-1]], "output -1 of class 1 is not"),
        ([[0], [1.5]], "output 1.5 of class 1 is not"),
    ],
)
def test_groups_that_are_none_are_refused(groups: list[list[int]], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        GroupedLogits(nn.Identity(), groups)


def test_an_output_that_the_model_does_not_have_is_refused() -> None:
    with pytest.raises(ConfigError, match="output 4 is not among the 2 of the model"):
        GroupedLogits(nn.Identity(), [[0], [4]])(torch.zeros(1, 2))
