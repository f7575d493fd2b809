"""Adapters on disk: round trips through plain, adapted and released models, and what a full disk leaves behind."""

from __future__ import annotations

import builtins
import copy
import errno
import os
import re
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

import slora
from slora.errors import CheckpointError, StateError
from slora.layers import adapted_layers
from tests.adapters.adapter_files import FILES, QKV, content, flags, small


def test_an_adapter_is_three_files(trained: Any, tmp_path: Path) -> None:
    slora.save_adapter(trained(), tmp_path / "new" / "folder")
    assert sorted(os.listdir(tmp_path / "new" / "folder")) == FILES


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"use_rslora": True, "r": 5},
        {"blocks": 4},
        {"rank_pattern": {"qkv": 5}, "alpha_pattern": {"fc2": 9.5}},
        {"threshold": 0.2, "gate_init": 0.25, "inactive": "exact"},
        {"modules_to_save": ["head", "norm"]},
        {"target_modules": ["qkv", "fc1"], "inactive": "frozen"},
        {"base_dtype": torch.bfloat16, "modules_to_save": ["head"]},
    ],
    ids=lambda settings: ", ".join(settings) or "default",
)
def test_a_plain_model_loads_what_another_saved(
    settings: dict[str, Any], fresh: Any, randomise: Any, image: Tensor, tmp_path: Path
) -> None:
    model = randomise(slora.inject(fresh().eval(), small(**settings)), 0.6)
    for name in settings.get("modules_to_save", ()):
        nn.init.normal_(model.get_submodule(name).weight)
    slora.save_adapter(model, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loaded = slora.load_adapter(fresh().eval(), tmp_path)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled="base_dtype" in settings):
        assert torch.equal(loaded(image), model(image))
    for (name, one), (_, two) in zip(adapted_layers(model), adapted_layers(loaded), strict=True):
        assert torch.equal(one.gate, two.gate), name
        assert (one.r, one.lora_alpha, one.blocks, one.inactive) == (two.r, two.lora_alpha, two.blocks, two.inactive)
        for i in one.activity().active:
            assert torch.equal(one.lora_A[i], two.lora_A[i])
            assert torch.equal(one.lora_B[i], two.lora_B[i])
        for i in one.activity().inactive:
            assert two.lora_A[i].any()
            assert not two.lora_B[i].any(), "inactive blocks start anew"
    assert [p.requires_grad for p in loaded.parameters()] == [p.requires_grad for p in model.parameters()]


def test_an_adapted_model_loads_in_place(trained: Any, fresh: Any, image: Tensor, tmp_path: Path) -> None:
    model = trained()
    slora.save_adapter(model, tmp_path)
    other = slora.inject(fresh().eval(), small())
    before = flags(other)
    assert slora.load_adapter(other, tmp_path) is other
    assert flags(other) == before, "the parameters are the same objects"
    assert torch.equal(other(image), model(image))


def test_saving_what_was_loaded_gives_the_same_files(trained: Any, fresh: Any, tmp_path: Path) -> None:
    slora.save_adapter(trained(modules_to_save=["head"]), tmp_path / "one")
    slora.save_adapter(slora.load_adapter(fresh(), tmp_path / "one"), tmp_path / "two")
    assert content(tmp_path / "one") == content(tmp_path / "two")


def test_a_model_without_an_active_block_makes_the_round_trip(fresh: Any, image: Tensor, tmp_path: Path) -> None:
    model = slora.inject(fresh().eval(), small(gate_init=0.05))
    slora.save_adapter(model, tmp_path)
    loaded = slora.load_adapter(fresh().eval(), tmp_path)
    assert torch.equal(loaded(image), model(image))
    assert load_file(tmp_path / "adapter_model.safetensors") == {}


def test_a_released_model_makes_the_round_trip(trained: Any, fresh: Any, image: Tensor, tmp_path: Path) -> None:
    model = trained(inactive="frozen")
    assert slora.release_frozen(model) > 0
    slora.save_adapter(model, tmp_path)
    for target in (fresh().eval(), model):
        assert torch.equal(slora.load_adapter(target, tmp_path)(image), model(image))


@pytest.mark.parametrize("name", ["timm-convnext", "open_clip", "bert", "llama", "encoder"])
def test_every_family_makes_the_round_trip(name: str, families: Any, randomise: Any, tmp_path: Path) -> None:
    family = families[name]
    plain = family.build().eval()
    model = randomise(slora.inject(copy.deepcopy(plain), small()), 0.6)
    slora.save_adapter(model, tmp_path)
    inputs = family.inputs()
    loaded = slora.load_adapter(plain, tmp_path)
    assert torch.equal(family.run(loaded, *inputs), family.run(model, *inputs))


def test_tied_weights_of_a_saved_module_can_be_written(fresh: Any, tmp_path: Path) -> None:
    model = fresh()
    model.head = nn.Sequential(nn.Linear(24, 24), nn.Linear(24, 24))
    model.head[1].weight = model.head[0].weight
    slora.save_adapter(slora.inject(model, small(target_modules=["qkv"], modules_to_save=["head"])), tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert torch.equal(tensors["base_model.model.head.0.weight"], tensors["base_model.model.head.1.weight"])


def test_gates_are_kept_exactly(fresh: Any, tmp_path: Path) -> None:
    model = slora.inject(fresh(), small())
    gate = model.get_submodule("blocks.0.attn.qkv").gate
    with torch.no_grad():
        gate.copy_(torch.tensor([1 / 3, -1e-30, 0.1]))
    slora.save_adapter(model, tmp_path)
    loaded = slora.load_adapter(fresh(), tmp_path)
    assert torch.equal(loaded.get_submodule("blocks.0.attn.qkv").gate, gate)


def test_states_that_do_not_allow_a_call_are_refused(trained: Any, fresh: Any, tmp_path: Path) -> None:
    with pytest.raises(StateError, match=r"VisionTransformer is not adapted; call slora.inject"):
        slora.save_adapter(fresh(), tmp_path)
    assert os.listdir(tmp_path) == []
    model = trained()
    slora.save_adapter(model, tmp_path)
    before = content(tmp_path)
    slora.merge(model)
    with pytest.raises(StateError, match=r"merged; call slora.unmerge\(model\) before saving"):
        slora.save_adapter(model, tmp_path)
    with pytest.raises(StateError, match=r"merged; call slora.unmerge\(model\) before loading"):
        slora.load_adapter(model, tmp_path)
    assert content(tmp_path) == before


@pytest.mark.parametrize("failing", FILES)
@pytest.mark.parametrize("how", ["open", "fsync"])
def test_a_full_disk_at_any_file_leaves_the_earlier_adapter_whole(
    failing: str, how: str, trained: Any, fresh: Any, image: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = trained()
    slora.save_adapter(old, tmp_path)
    before = content(tmp_path)
    new = trained()
    with torch.no_grad():
        for _, layer in adapted_layers(new):
            layer.gate.fill_(0.5)
    real_open, real_fsync = builtins.open, os.fsync
    full = OSError(errno.ENOSPC, "No space left on device")

    def fail_to_open(file: Any, *args: Any, **kwargs: Any) -> Any:
        if f".{failing}." in str(file):
            raise full
        return real_open(file, *args, **kwargs)

    def fail_to_sync(descriptor: int) -> None:
        if f".{failing}." in os.readlink(f"/proc/self/fd/{descriptor}"):
            raise full
        real_fsync(descriptor)

    with monkeypatch.context() as patch:
        if how == "open":
            patch.setattr(builtins, "open", fail_to_open)
        else:
            patch.setattr(os, "fsync", fail_to_sync)
        message = re.escape(f"{tmp_path / failing} could not be written (No space left on device); free space")
        with pytest.raises(CheckpointError, match=message):
            slora.save_adapter(new, tmp_path)
    assert content(tmp_path) == before, "no file is new, half written or left behind"
    assert torch.equal(slora.load_adapter(fresh().eval(), tmp_path)(image), old(image))


def test_a_folder_that_is_a_file_is_refused_by_name(trained: Any, tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("mine")
    with pytest.raises(CheckpointError, match="could not be written"):
        slora.save_adapter(trained(), tmp_path / "taken")
    assert (tmp_path / "taken").read_text() == "mine"


def test_gates_that_are_not_numbers_are_refused_before_anything_is_written(trained: Any, tmp_path: Path) -> None:
    model = trained()
    with torch.no_grad():
        model.get_submodule(QKV).gate[1] = float("nan")
    with pytest.raises(StateError, match=r"the gates of 'blocks\.0\.attn\.qkv' are \[.*nan.*\]: training diverged"):
        slora.save_adapter(model, tmp_path)
    assert os.listdir(tmp_path) == []
