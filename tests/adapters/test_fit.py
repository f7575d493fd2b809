"""Adapters that are damaged or do not fit the model: refused by name, and the model stays as it was."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slora
from slora.errors import CheckpointError
from slora.layers import adapted_layers
from tests.adapters.adapter_files import FILES, QKV, edit, edit_tensors, flags, small


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
    with pytest.warns(UserWarning, match=r"was trained on other base weights \(.*\) than this VisionTransformer has"):
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
