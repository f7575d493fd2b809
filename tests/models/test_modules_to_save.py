"""Modules and single parameters that are trained in full beside the adapter."""

from __future__ import annotations

from torch import nn

import slora
from slora.models.injection_record import injection
from tests.models.adapting import names_of, small


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
