"""Adapters on disk: round trips, PEFT's reading of them, and what damage or another model leads to."""

from __future__ import annotations

import builtins
import copy
import errno
import json
import os
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import slora
from slora.errors import CheckpointError, StateError
from slora.layers import adapted_layers

FILES = ["adapter_config.json", "adapter_model.safetensors", "selective.json"]
Config = slora.SelectiveLoRAConfig


def small(**settings: Any) -> Config:
    return Config(**{"r": 3, "lora_alpha": 4, **settings})


@pytest.fixture
def fresh(vit: nn.Module) -> Callable[[], nn.Module]:
    """Return a builder of the same plain ViT, time and again."""
    return lambda: copy.deepcopy(vit)


@pytest.fixture
def trained(fresh: Any, randomise: Any) -> Callable[..., nn.Module]:
    """Return a builder of that ViT adapted, with random B; in the first layer only k is inactive."""

    def build(**settings: Any) -> nn.Module:
        model = randomise(slora.inject(fresh().eval(), small(**settings)), 0.6)
        with torch.no_grad():
            model.get_submodule("blocks.0.attn.qkv").gate.copy_(torch.tensor([0.3, 0.05, 0.1]))
            model.get_submodule("blocks.1.mlp.fc1").gate.fill_(-0.2)
        return model

    return build


@pytest.fixture
def image() -> Tensor:
    return torch.randn(2, 3, 16, 16)


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def flags(model: nn.Module) -> list[tuple[str, int, bool, torch.dtype]]:
    return [(name, id(p), p.requires_grad, p.dtype) for name, p in model.named_parameters()]


# Round trips


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


# The format


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


def test_gates_are_kept_exactly(fresh: Any, tmp_path: Path) -> None:
    model = slora.inject(fresh(), small())
    gate = model.get_submodule("blocks.0.attn.qkv").gate
    with torch.no_grad():
        gate.copy_(torch.tensor([1 / 3, -1e-30, 0.1]))
    slora.save_adapter(model, tmp_path)
    loaded = slora.load_adapter(fresh(), tmp_path)
    assert torch.equal(loaded.get_submodule("blocks.0.attn.qkv").gate, gate)


# PEFT


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


def test_peft_merges_the_folder_into_the_same_weights(trained: Any, fresh: Any, tmp_path: Path) -> None:
    peft = pytest.importorskip("peft")
    model = trained()
    slora.save_adapter(model, tmp_path)
    theirs = peft.PeftModel.from_pretrained(fresh(), tmp_path).merge_and_unload()
    ours = slora.merge_and_unload(model)
    for (name, one), (_, two) in zip(ours.state_dict().items(), theirs.state_dict().items(), strict=True):
        torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-6, msg=name)


# Refusals: nothing is lost


def assert_refused(model: nn.Module, folder: Path, image: Tensor, *texts: str) -> None:
    """Loading `folder` into `model` raises with `texts`, and the model is exactly what it was."""
    before = flags(model), [type(m) for m in model.modules()], sorted(model.__dict__)
    values = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError) as raised:
        slora.load_adapter(model, folder)
    for text in texts:
        assert text in str(raised.value)
    assert str(folder) in str(raised.value)
    assert (flags(model), [type(m) for m in model.modules()], sorted(model.__dict__)) == before
    for name, value in model.state_dict().items():
        assert torch.equal(value, values[name]), name


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    path = folder / "selective.json"
    fields = json.loads(path.read_text())
    change(fields)
    path.write_text(json.dumps(fields))


def edit_tensors(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path)
    # As a directory that was written before there was a digest.
    edit(folder, lambda fields: fields.pop("tensors_digest", None))


QKV = "blocks.0.attn.qkv"
DAMAGE: dict[str, tuple[Callable[[Path], Any], list[str]]] = {
    "no weights": (lambda f: (f / FILES[1]).unlink(), ["adapter_model.safetensors does not exist"]),
    "no selective.json": (lambda f: (f / FILES[2]).unlink(), ["selective.json does not exist"]),
    "half of the weights": (
        lambda f: (f / FILES[1]).write_bytes((f / FILES[1]).read_bytes()[: (f / FILES[1]).stat().st_size // 2]),
        ["is not a readable safetensors file", "damaged"],
    ),
    "empty weights": (lambda f: (f / FILES[1]).write_bytes(b""), ["is not a readable safetensors file"]),
    "half of selective.json": (
        lambda f: (f / FILES[2]).write_text((f / FILES[2]).read_text()[:200]),
        ["is not readable JSON", "damaged"],
    ),
    "binary selective.json": (lambda f: (f / FILES[2]).write_bytes(b"\xff\xfe\x00"), ["is not readable JSON"]),
    "a list": (lambda f: (f / FILES[2]).write_text("[]"), ["is incomplete or damaged"]),
    "no config": (lambda f: edit(f, lambda s: s.pop("config")), ["is incomplete or damaged"]),
    "no layers": (lambda f: edit(f, lambda s: s.pop("layers")), ["is incomplete or damaged"]),
    "no base": (lambda f: edit(f, lambda s: s.pop("base")), ["is incomplete or damaged"]),
    "no shapes": (lambda f: edit(f, lambda s: s["base"].pop("shapes")), ["is incomplete or damaged"]),
    "a later format": (lambda f: edit(f, lambda s: s.update(format=2)), ["has format 2, and this version of"]),
    "a config out of range": (lambda f: edit(f, lambda s: s["config"].update(r=0)), ["r=0 is not a rank"]),
    "an unknown setting": (lambda f: edit(f, lambda s: s["config"].update(use_dora=True)), ["['use_dora']"]),
    "a setting of another type": (lambda f: edit(f, lambda s: s["config"].update(threshold="x")), ["damaged"]),
    "no gate": (lambda f: edit(f, lambda s: s["layers"][QKV].pop("gate")), [QKV, "damaged"]),
    "gates as text": (lambda f: edit(f, lambda s: s["layers"][QKV].update(gate=["a", "b", "c"])), [QKV, "damaged"]),
    "a block too many": (lambda f: edit(f, lambda s: s["layers"][QKV].update(active=[0, 7])), [QKV, "damaged"]),
    "a layer that is null": (lambda f: edit(f, lambda s: s["layers"].update({QKV: None})), [QKV, "damaged"]),
    "another number of active blocks": (
        lambda f: edit(f, lambda s: s["layers"][QKV].update(active=[0], gate=[0.2, 0.0, 0.0])),
        ["A and B of 'blocks.0.attn.qkv' have shapes [6, 24] and [72, 6]; expected [3, 24] and [72, 3]"],
    ),
    "a layer too few": (
        lambda f: edit(f, lambda s: (s["layers"].pop(QKV), s["base"]["shapes"].pop(QKV))),
        [f"'{QKV}' is only in the model"],
    ),
    "a missing tensor": (
        lambda f: edit_tensors(f, lambda t: t.pop(f"base_model.model.{QKV}.lora_B.weight")),
        [f"lacks 'base_model.model.{QKV}.lora_B.weight'; the file is incomplete"],
    ),
    "a tensor too many": (
        lambda f: edit_tensors(f, lambda t: t.update({"base_model.model.head.weight": torch.zeros(5, 24)})),
        ["holds 'base_model.model.head.weight', which this model does not have"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", DAMAGE)
@pytest.mark.parametrize("target", ["plain", "adapted"])
def test_a_damaged_adapter_is_refused_and_the_model_stays_as_it_was(
    case: str, target: str, trained: Any, fresh: Any, image: Tensor, tmp_path: Path
) -> None:
    slora.save_adapter(trained(base_dtype=torch.bfloat16), tmp_path)
    damage, texts = DAMAGE[case]
    damage(tmp_path)
    model = fresh()
    model.head.requires_grad_(False)
    if target == "adapted":
        slora.inject(model, small(base_dtype=torch.bfloat16))
    assert_refused(model, tmp_path, image, *texts)


def test_an_adapter_of_another_model_is_refused(trained: Any, make_mlp: Any, image: Tensor, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    slora.save_adapter(trained(), tmp_path)
    wider = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=16, patch_size=8, embed_dim=48, depth=2, num_heads=3
    )
    assert_refused(
        wider,
        tmp_path,
        image,
        "belongs to a VisionTransformer whose 'blocks.0.attn.proj' has shape [24, 24]; in this VisionTransformer it "
        "has shape [48, 48]. Load the base model that the adapter was trained on.",
    )
    assert_refused(make_mlp(4, 4), tmp_path, image, "in this Sequential it does not exist")


def test_a_deeper_model_of_the_same_widths_is_refused(trained: Any, image: Tensor, tmp_path: Path) -> None:
    timm = pytest.importorskip("timm")
    slora.save_adapter(trained(), tmp_path)
    deeper = timm.create_model(
        "vit_tiny_patch16_224", pretrained=False, img_size=16, patch_size=8, embed_dim=24, depth=3, num_heads=3
    )
    assert_refused(
        deeper, tmp_path, image, "adapts 8 layers, the model 12", "'blocks.2.attn.proj' is only in the model"
    )


def test_other_weights_of_the_same_shapes_are_loaded_with_a_warning(
    trained: Any, fresh: Any, image: Tensor, tmp_path: Path
) -> None:
    slora.save_adapter(trained(), tmp_path)
    other = fresh()
    nn.init.normal_(other.get_submodule(QKV).weight)
    with pytest.warns(UserWarning, match=r"was trained on other base weights than this VisionTransformer has"):
        slora.load_adapter(other, tmp_path)


@pytest.mark.parametrize(
    ("settings", "text"),
    [
        ({"r": 4}, f"has r=3, blocks=3 for '{QKV}', the model r=4, blocks=3"),
        ({"blocks": 1}, f"has r=3, blocks=3 for '{QKV}', the model r=3, blocks=1"),
        ({"lora_alpha": 5}, f"has lora_alpha=4.0 for '{QKV}', the model lora_alpha=5.0"),
        ({"use_rslora": True}, f"has use_rslora=False for '{QKV}', the model use_rslora=True"),
        ({"threshold": 0.12}, f"has threshold=0.1 for '{QKV}', the model threshold=0.12"),
        ({"target_modules": ["qkv"]}, "adapts 8 layers, the model 2"),
    ],
    ids=lambda value: ", ".join(value) if isinstance(value, dict) else "",
)
def test_a_model_adapted_otherwise_is_refused_rather_than_filled_with_other_mathematics(
    settings: dict[str, Any], text: str, trained: Any, fresh: Any, image: Tensor, tmp_path: Path
) -> None:
    slora.save_adapter(trained(), tmp_path)
    assert_refused(slora.inject(fresh(), small(**settings)), tmp_path, image, text)


def test_settings_without_effect_on_the_output_may_differ(
    trained: Any, fresh: Any, image: Tensor, tmp_path: Path
) -> None:
    model = trained()
    slora.save_adapter(model, tmp_path)
    other = slora.inject(fresh().eval(), small(inactive="exact", lora_dropout=0.3, gate_init=0.5, probe_every=3))
    assert torch.equal(slora.load_adapter(other, tmp_path)(image), model(image))
    assert next(adapted_layers(other))[1].lora_dropout == 0.3


def test_a_trained_head_is_not_dropped_silently(trained: Any, fresh: Any, image: Tensor, tmp_path: Path) -> None:
    slora.save_adapter(trained(modules_to_save=["head"]), tmp_path)
    adapted = slora.inject(fresh(), small())
    assert_refused(adapted, tmp_path, image, "holds 'base_model.model.head.bias', which this model does not have")
    slora.save_adapter(trained(), tmp_path)
    adapted = slora.inject(fresh(), small(modules_to_save=["head"]))
    assert_refused(adapted, tmp_path, image, "lacks 'base_model.model.head.weight'")


def test_a_head_of_another_size_is_refused(trained: Any, fresh: Any, image: Tensor, tmp_path: Path) -> None:
    slora.save_adapter(trained(modules_to_save=["head"]), tmp_path)
    model = fresh()
    model.head = nn.Linear(24, 7)
    assert_refused(model, tmp_path, image, "head.weight has shape [5, 24], the model's has [7, 24]")


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


# A full disk


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
