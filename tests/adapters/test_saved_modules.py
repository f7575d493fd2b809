"""Modules and single parameters that are saved beside the matrices, by slora and for PEFT."""

from __future__ import annotations

import copy
import json
import os
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import slora
from slora.errors import CheckpointError
from slora.layers import adapted_layers
from tests.adapters.adapter_files import FILES, content, edit_tensors, small


class Scaled(nn.Module):
    """A ViT whose logits are scaled as CLIP's are, by a parameter of its own."""

    def __init__(self, vit: nn.Module) -> None:
        super().__init__()
        self.visual = vit
        self.logit_scale = nn.Parameter(torch.tensor(2.0))

    def forward(self, images: Tensor) -> Tensor:
        return self.logit_scale.exp() * self.visual(images)


def scaled_and_trained(fresh: Any, trained: Any, entries: list[str]) -> nn.Module:
    """That model adapted, with a class token, a norm and a scale that training has changed."""
    model = slora.inject(Scaled(fresh()).eval(), small(modules_to_save=entries))
    with torch.no_grad():
        for name, layer in adapted_layers(model):
            layer.lora_B.copy_(trained().get_submodule(name.removeprefix("visual.")).lora_B)
        for name in ("logit_scale", "visual.cls_token", "visual.norm.weight"):
            model.get_parameter(name).mul_(1.5)
    return model


def test_single_parameters_are_saved_and_loaded_by_slora_and_peft(
    trained: Any, fresh: Any, image: Tensor, tmp_path: Path
) -> None:
    entries = ["logit_scale", "visual.cls_token", "visual.norm"]
    model = scaled_and_trained(fresh, trained, entries)
    slora.save_adapter(model, tmp_path)
    assert sorted(os.listdir(tmp_path)) == FILES
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert float(tensors["base_model.model.logit_scale"]) == 3.0
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["visual.norm"]
    plain = Scaled(fresh()).eval()
    with torch.no_grad():
        assert torch.equal(slora.load_adapter(plain, tmp_path)(image), model(image))
    assert plain.logit_scale.requires_grad
    assert torch.equal(slora.load_adapter(model, tmp_path)(image), plain(image))
    peft = pytest.importorskip("peft")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        theirs = peft.PeftModel.from_pretrained(Scaled(fresh()).eval(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(theirs(image), model(image), rtol=1e-4, atol=1e-4)


def test_a_parameter_that_does_not_fit_is_named(trained: Any, fresh: Any, tmp_path: Path) -> None:
    slora.save_adapter(scaled_and_trained(fresh, trained, ["logit_scale"]), tmp_path)
    other = slora.inject(Scaled(fresh()), small())
    with pytest.raises(CheckpointError, match=r"holds 'base_model.model.logit_scale', which this model does not have"):
        slora.load_adapter(other, tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.update({"base_model.model.logit_scale": torch.zeros(2)}))
    with pytest.raises(CheckpointError, match=r"logit_scale has shape \[2\], the model's has \[\]"):
        slora.load_adapter(Scaled(fresh()), tmp_path)
    edit_tensors(tmp_path, lambda tensors: tensors.pop("base_model.model.logit_scale"))
    with pytest.raises(CheckpointError, match=r"lacks 'base_model.model.logit_scale'"):
        slora.load_adapter(Scaled(fresh()), tmp_path)


def test_what_is_trained_but_not_saved_is_named_in_a_warning(trained: Any, fresh: Any, tmp_path: Path) -> None:
    model = scaled_and_trained(fresh, trained, ["head", "visual.cls_token"])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slora.save_adapter(model, tmp_path / "all")
    model.get_parameter("logit_scale").requires_grad_(True)
    model.get_submodule("visual.norm").requires_grad_(True)
    with pytest.warns(slora.UnsavedParameterWarning) as caught:
        slora.save_adapter(model, tmp_path / "some")
    (warning,) = caught
    assert ": 'logit_scale', 'visual.norm.weight', 'visual.norm.bias'. Name them in modules_to_save" in str(
        warning.message
    )
    assert warning.filename == __file__
    assert content(tmp_path / "all") == content(tmp_path / "some")
    model.get_submodule("visual.blocks").requires_grad_(True)
    with pytest.warns(slora.UnsavedParameterWarning, match=r"'visual.blocks.0.norm1.weight'.* and \d+ more\. Name"):
        slora.save_adapter(model, tmp_path / "some")


def test_modules_within_one_another_are_saved_once(fresh: Any, tmp_path: Path) -> None:
    model = fresh()
    model.head = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 5))
    plain = copy.deepcopy(model)
    slora.inject(model, small(modules_to_save=["head", "head.1"], target_modules=["qkv"]))
    slora.save_adapter(model, tmp_path)
    slora.load_adapter(plain, tmp_path)
