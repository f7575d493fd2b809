"""Adapters that are damaged or hostile: named, with nothing changed."""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slora
from slora.errors import CheckpointError, ConfigError, StateError
from slora.layers import adapted_layers
from tests.adapters.adapter_files import edit
from tests.adapters.damaged_adapters import edit_tensor, refused, trained
from tests.mutations.adapters import CONFIG, SELECTIVE, WEIGHTS, Tiny, differences, plain, snapshot
from tests.mutations.limits import limited

pytestmark = pytest.mark.once

BOMB = "(([a-z0-9.]+)+)+!"


@pytest.mark.parametrize("value", [float("nan"), float("inf")], ids=str)
@pytest.mark.parametrize("name", ["qkv.lora_A.weight", "out.lora_B.weight", "head.weight", "scale"])
def test_a_tensor_that_is_not_finite_is_named_when_it_is_loaded(name: str, value: float, saved: Path) -> None:
    def change(tensor: Tensor) -> Tensor:
        tensor.view(-1)[-1] = value
        return tensor

    edit_tensor(saved, f"base_model.model.{name}", change)
    refused(saved, name, "not finite")


@pytest.mark.parametrize("name", ["qkv.lora_A", "out.lora_B", "head.weight", "scale", "norm.running_var"])
def test_a_tensor_that_is_not_finite_is_named_when_it_is_saved(name: str, tmp_path: Path) -> None:
    model = trained()
    model.state_dict()[name].view(-1)[-1] = float("nan")
    with pytest.raises(StateError, match=rf"'{name}.*' holds NaN or infinity: training diverged"):
        slora.save_adapter(model, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_block_that_is_off_is_not_saved_whatever_it_holds(tmp_path: Path) -> None:
    model = trained()
    with torch.no_grad():
        model.qkv.lora_B[1] = float("nan")
    slora.save_adapter(model, tmp_path)
    slora.load_adapter(plain(), tmp_path)


def test_a_mask_of_a_saved_module_may_hold_infinities(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = plain()
        model.head.register_buffer("mask", torch.full((2, 2), float("-inf")).triu(1))
        return model

    slora.save_adapter(trained(model=build()), tmp_path)
    assert slora.load_adapter(build(), tmp_path).head.mask[0, 1] == float("-inf")


def test_a_number_that_overflows_in_the_dtype_of_the_model_is_named(saved: Path) -> None:
    edit_tensor(saved, "base_model.model.head.bias", lambda bias: bias + 1e6)
    # Kept in fp32 when it is injected.
    with pytest.warns(slora.BaseModelWarning):
        slora.load_adapter(plain().half(), saved)
    model = slora.inject(plain(), CONFIG)
    model.head.half()
    refused(saved, "head.bias holds", "not finite in torch.float16", model=model)


def test_a_tensor_of_another_kind_of_dtype_is_named(saved: Path) -> None:
    edit_tensor(saved, "base_model.model.qkv.lora_A.weight", lambda A: A.to(torch.int64))
    refused(saved, "qkv.lora_A.weight has dtype torch.int64, expected torch.float32")


def test_tensors_that_the_model_ties_cannot_differ(tmp_path: Path) -> None:
    def build() -> nn.Module:
        model = plain()
        model.head = nn.Sequential(nn.Linear(6, 6), nn.Linear(6, 6))
        model.head[1].weight = model.head[0].weight
        return model

    slora.save_adapter(trained(model=build()), tmp_path)
    slora.load_adapter(build(), tmp_path)
    edit_tensor(tmp_path, "base_model.model.head.1.weight", lambda weight: weight + 1)
    refused(tmp_path, "head.1.weight and head.0.weight differ, but are one tensor", model=build())


GATES: dict[str, tuple[Any, str]] = {
    "NaN": ([float("nan"), 0.0, 0.2], "selective.json"),
    "null": ([None, 0.0, 0.2], "'qkv'"),
    "a list in a list": ([[0.15], 0.0, 0.2], "'qkv'"),
    "an integer of 400 digits": ([10**400, 0.0, 0.2], "selective.json"),
    "more than fp32 holds": ([1e39, 0.0, 0.2], "'qkv'"),
    "true": ([True, 0.0, 0.2], "'qkv'"),
    "text": ("abc", "'qkv'"),
    "no list": (0.3, "'qkv'"),
    "too few": ([0.3], "'gate' has 1 values, and 'blocks' is 3"),
    "others active": ([0.3, 0.15, 0.2], "active=[0, 2], but gate=[0.3, 0.15, 0.2] at threshold=0.1 gives [0, 1, 2]"),
}  # fmt: skip


@pytest.mark.parametrize("case", GATES)
def test_gates_that_are_none_or_contradict_the_active_blocks_are_refused(case: str, saved: Path) -> None:
    gate, text = GATES[case]
    edit(saved, lambda fields: fields["layers"]["qkv"].update(gate=gate))
    refused(saved, text)


def test_a_gate_on_the_threshold_is_compared_as_in_the_model(tmp_path: Path) -> None:
    # 0.1 is above its value in fp32, 0.7 below; gates are kept in fp32.
    for threshold in (0.1, 0.7, 1 / 3):
        model = trained(threshold=threshold, gate_init=threshold)
        with torch.no_grad():
            model.qkv.gate.fill_(threshold)
        slora.save_adapter(model, tmp_path)
        assert slora.load_adapter(plain(), tmp_path).qkv.activity().active == (0, 1, 2)


@pytest.mark.parametrize("field", ["gate_init", "threshold", "lora_alpha"])
@pytest.mark.parametrize("value", [10**400, 1e39, float("nan")], ids=["10**400", "1e39", "nan"])
def test_a_setting_beyond_fp32_is_refused_when_it_is_made(field: str, value: float) -> None:
    with pytest.raises(ConfigError, match=rf"^{field}="):
        slora.SelectiveLoRAConfig(**{field: value})


@pytest.mark.parametrize("asked", ["budget=--", "budget=1e999", "budget=0.5.5", "budget=2.5", "all", 4, None])
def test_a_budget_that_is_none_is_refused(asked: Any, saved: Path) -> None:
    edit(saved, lambda fields: fields.update(asked=asked))
    refused(saved, "selective.json is incomplete or damaged")


@pytest.mark.parametrize("field", ["r", "lora_alpha", "use_rslora", "threshold"])
def test_a_setting_of_the_mathematics_has_no_default_in_a_file(field: str, saved: Path) -> None:
    edit(saved, lambda fields: fields["config"].pop(field))
    refused(saved, field)


def test_a_fault_in_the_last_layer_leaves_the_first_as_it_was(saved: Path) -> None:
    edit(saved, lambda fields: fields["layers"]["out"].update(gate=[[0.15]]))
    refused(saved, "'out'")


def test_a_warning_that_is_raised_as_an_error_comes_before_the_first_change(saved: Path) -> None:
    for adapted in (False, True):
        model = plain()
        nn.init.normal_(model.qkv.weight)
        model = slora.inject(model, CONFIG) if adapted else model
        before = snapshot(model)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            with pytest.raises(slora.BaseModelWarning):
                slora.load_adapter(model, saved)
        assert not differences(before, snapshot(model))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, None])
def test_the_base_is_recognised_in_the_dtype_that_it_will_have(dtype: torch.dtype | None, tmp_path: Path) -> None:
    slora.save_adapter(trained(base_dtype=dtype), tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slora.load_adapter(plain(), tmp_path)


def test_a_model_without_values_is_refused(saved: Path) -> None:
    with torch.device("meta"):
        model = Tiny()
    with pytest.raises(StateError, match="is on meta"):
        slora.load_adapter(model, saved)
    assert type(model.qkv) is nn.Linear


def test_layers_are_those_listed_and_no_pattern_of_the_file_is_run(saved: Path) -> None:
    expected = slora.load_adapter(plain(), saved)
    for field in ("target_modules", "exclude_modules"):
        edit(saved, lambda fields, field=field: fields["config"].update({field: BOMB}))
    for field in ("rank_pattern", "alpha_pattern"):
        edit(saved, lambda fields, field=field: fields["config"].update({field: {BOMB: 2}}))
    # Names that the pattern tries for hours.
    with limited(5):
        loaded = slora.load_adapter(plain(), saved)
    for (name, one), (_, two) in zip(adapted_layers(expected), adapted_layers(loaded), strict=True):
        assert (one.r, one.blocks, one.lora_alpha) == (two.r, two.blocks, two.lora_alpha), name
        assert torch.equal(one.gate, two.gate), name


class Long(nn.Module):
    """A layer whose name takes the pattern above hours."""

    def __init__(self) -> None:
        super().__init__()
        self.add_module("a" * 60, nn.Linear(8, 8))


def test_a_pattern_that_never_ends_is_not_run_on_a_long_name(tmp_path: Path) -> None:
    model = slora.inject(Long(), slora.SelectiveLoRAConfig(r=2, alpha_pattern={"a+": 5.0}))
    slora.save_adapter(model, tmp_path)
    edit(tmp_path, lambda fields: fields["config"].update(target_modules=BOMB, alpha_pattern={BOMB: 5.0}))
    for target in (Long(), model):
        with limited(5), warnings.catch_warnings():
            warnings.simplefilter("ignore", slora.BaseModelWarning)
            loaded = slora.load_adapter(target, tmp_path)
        assert next(adapted_layers(loaded))[1].lora_alpha == 5.0
    edit(tmp_path, lambda fields: fields["layers"]["a" * 60].pop("lora_alpha"))
    refused(tmp_path, "lora_alpha is missing", 'add "lora_alpha" to each entry', model=Long())


def test_a_directory_without_listed_alphas_and_digest_is_loaded(saved: Path) -> None:
    def as_before(fields: dict[str, Any]) -> None:
        del fields["tensors_digest"]
        for entry in fields["layers"].values():
            del entry["lora_alpha"]

    expected = slora.load_adapter(plain(), saved)
    edit(saved, as_before)
    loaded = slora.load_adapter(plain(), saved)
    assert loaded.out.lora_alpha == expected.out.lora_alpha == 5.5
    for name, value in expected.state_dict().items():
        # A block that is off gets fresh matrices.
        assert name == "qkv.lora_A" or torch.equal(value, loaded.state_dict()[name]), name


@pytest.mark.parametrize("pattern", ["(" * 3000 + ")" * 3000, "a{99999999999999999999}", "("])
def test_a_pattern_that_cannot_be_compiled_is_a_config_error(pattern: str) -> None:
    with pytest.raises(ConfigError, match="is not a regular expression"):
        slora.SelectiveLoRAConfig(target_modules=pattern)


@pytest.mark.parametrize("name", [WEIGHTS, SELECTIVE])
@pytest.mark.parametrize("what", ["pipe", "device", "folder", "nothing"])
def test_what_is_no_file_is_named_and_not_read(name: str, what: str, saved: Path) -> None:
    (saved / name).unlink()
    if what == "pipe":
        os.mkfifo(saved / name)
    elif what == "device":
        (saved / name).symlink_to("/dev/zero")
    elif what == "folder":
        (saved / name).mkdir()
    refused(saved, name)


@pytest.mark.parametrize("text", ["[" * 2000 + "]" * 2000, '{"format":' * 2000 + "1" + "}" * 2000], ids=["[", "{"])
def test_json_that_is_nested_deep_is_named(text: str, saved: Path) -> None:
    (saved / SELECTIVE).write_text(text)
    refused(saved, SELECTIVE)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (lambda s: s["base"].pop("shapes"), ["'shapes' is missing"]),
        (lambda s: s.update(layers=[1]), ["'layers' is a list of 1, expected an object"]),
        (lambda s: s["layers"].update(qkv=[]), ["'qkv'", "it is a list of 0, expected an object"]),
        (lambda s: s["layers"]["qkv"].update(gate=[[0.15], 0, 0]), ["'qkv'", "'gate' is a list of 1, expected a numb"]),
        (lambda s: s["layers"]["qkv"].pop("r"), ["'qkv'", "'r' is missing"]),
        (lambda s: s["layers"]["qkv"].update(r=10**9), ["'qkv'", "'r' is 1000000000"]),
        (
            lambda s: (s["config"].update(alpha_pattern=None), s["layers"]["out"].update(lora_alpha=5.0)),
            ["'out'", "'lora_alpha' is 5.0, and the config, without alpha_pattern, has 4"],
        ),
        (lambda s: s.update(format=7), ["has format 7", "reads 1", "the version that wrote it"]),
    ],
    ids=["shapes", "layers", "entry", "gate", "no r", "r", "lora_alpha", "format"],
)
def test_a_damaged_entry_is_named_in_words(
    saved: Path, change: Callable[[dict[str, Any]], Any], named: list[str]
) -> None:
    edit(saved, change)
    with pytest.raises(CheckpointError) as caught:
        slora.load_adapter(plain(), saved)
    for text in (str(saved), *named):
        assert text in str(caught.value)
    assert "Error(" not in str(caught.value)


@pytest.mark.parametrize("kind", ["nothing", "file", "loop"])
def test_a_folder_that_is_none_is_named_by_what_it_is(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    if kind == "file":
        folder.write_text("text")
    if kind == "loop":
        folder.symlink_to(folder)
    said = {"nothing": "does not exist", "file": "Not a directory", "loop": "Too many levels of symbolic links"}
    with pytest.raises(CheckpointError, match=said[kind]):
        slora.load_adapter(plain(), folder)
