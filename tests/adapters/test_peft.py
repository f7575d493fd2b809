"""PEFT's format: its keys and shapes, its config, and the same output where PEFT loads the folder."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import slora
from slora.layers import adapted_layers


def test_keys_and_shapes_are_those_of_peft_and_only_active_blocks_are_written(trained: Any, tmp_path: Path) -> None:
    model = trained(modules_to_save=["head"])
    slora.save_adapter(model, tmp_path)
    found = {name: tuple(t.shape) for name, t in load_file(tmp_path / "adapter_model.safetensors").items()}
    expected = {"base_model.model.head.weight": (5, 24), "base_model.model.head.bias": (5,)}
    for name, layer in adapted_layers(model):
        active = len(layer.activity().active)
        if active:
            expected[f"base_model.model.{name}.lora_A.weight"] = (active * 3, layer.in_features)
            expected[f"base_model.model.{name}.lora_B.weight"] = (layer.out_features, active * 3)
    assert found == expected
    assert "base_model.model.blocks.1.mlp.fc1.lora_A.weight" not in found


def test_several_blocks_are_stacked_and_block_diagonal(trained: Any, tmp_path: Path) -> None:
    model = trained()
    slora.save_adapter(model, tmp_path)
    layer = model.get_submodule("blocks.0.attn.qkv")
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.blocks.0.attn.qkv.lora_{x}.weight"] for x in "AB")
    assert torch.equal(A, torch.cat([layer.lora_A[0], layer.lora_A[2]]))
    zero = torch.zeros(24, 3)
    rows = [torch.cat([layer.lora_B[0], zero], 1), torch.cat([zero, zero], 1), torch.cat([zero, layer.lora_B[2]], 1)]
    assert torch.equal(B, torch.cat(rows))


def test_the_config_of_peft_names_active_layers_and_their_ranks(trained: Any, tmp_path: Path) -> None:
    model = trained(modules_to_save=["head"])
    slora.save_adapter(model, tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"
    assert (config["r"], config["lora_alpha"], config["use_rslora"], config["bias"]) == (3, 4, False, "none")
    active = {name for name, on in slora.active_blocks(model).items() if on.any()}
    assert set(config["target_modules"]) == active
    assert config["modules_to_save"] == ["head"]
    assert config["rank_pattern"]["^blocks.0.attn.qkv$"] == 6
    assert config["alpha_pattern"]["^blocks.0.attn.qkv$"] == 8


@pytest.mark.parametrize("rslora", [False, True], ids=["lora", "rslora"])
@pytest.mark.parametrize("r", [3, 4])
def test_peft_loads_the_folder_and_computes_the_same_output(
    r: int, rslora: bool, trained: Any, fresh: Any, image: Tensor, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    model = trained(r=r, use_rslora=rslora, rank_pattern={"fc2": 5}, alpha_pattern={r"attn\.proj": 7})
    slora.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*(missing|unexpected).*keys.*")
        theirs = peft.PeftModel.from_pretrained(fresh().eval(), tmp_path)
    with torch.no_grad():
        expected, found = model(image), theirs(image)
        with slora.disabled(model):
            base = model(image)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    assert not torch.allclose(found, base, rtol=1e-2, atol=1e-2)


def test_peft_loads_a_trained_head_too(trained: Any, fresh: Any, image: Tensor, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = trained(modules_to_save=["head"])
    nn.init.normal_(model.head.weight)
    nn.init.normal_(model.head.bias)
    slora.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(fresh().eval(), tmp_path)
    with torch.no_grad():
        torch.testing.assert_close(theirs(image), model(image), rtol=1e-4, atol=1e-5)


def test_peft_merges_the_folder_into_the_same_weights(trained: Any, fresh: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = trained()
    slora.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(fresh(), tmp_path).merge_and_unload()
    ours = slora.merge_and_unload(model)
    for (name, one), (_, two) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6, msg=name)
