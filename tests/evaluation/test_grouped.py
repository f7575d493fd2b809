"""Classes that are groups of a model's outputs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from slora.evaluation import GroupedLogits


def test_the_largest_logit_of_a_group_is_that_of_its_class() -> None:
    logits = torch.tensor([[1.0, 5.0, 2.0, 9.0], [4.0, -1.0, -2.0, 0.0]])
    grouped = GroupedLogits(nn.Identity(), [(2,), (0, 1)])(logits)
    assert grouped.tolist() == [[2.0, 5.0], [-2.0, 4.0]]


def test_the_output_of_a_group_may_be_an_object_with_logits() -> None:
    class Output(nn.Module):
        def forward(self, images: Tensor) -> Any:
            return type("Output", (), {"logits": images})

    assert GroupedLogits(Output(), [(1,)])(torch.tensor([[1.0, 2.0]])).tolist() == [[2.0]]
