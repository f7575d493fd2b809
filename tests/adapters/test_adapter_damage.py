"""Adapters that are damaged, hostile or half written: named, with nothing changed; and saving that is cut off."""

from __future__ import annotations

import functools
import json
import os
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import slora
from slora.errors import CheckpointError, ConfigError, StateError
from slora.layers import adapted_layers
from tests.mutations.adapters import CONFIG, SELECTIVE, WEIGHTS, Tiny, differences, plain, snapshot
from tests.mutations.limits import limited

pytestmark = pytest.mark.once

BOMB = "(([a-z0-9.]+)+)+!"


def trained(seed: int = 1, model: nn.Module | None = None, **settings: Any) -> nn.Module:
    """An adapted model in which the second block of qkv is off."""
    fields = {**CONFIG.to_dict(), **settings}
    model = slora.inject(plain() if model is None else model, slora.SelectiveLoRAConfig(**fields))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.lora_B.copy_(torch.randn(layer.lora_B.shape, generator=generator))
        model.qkv.gate.copy_(torch.tensor([0.3, 0.05, 0.2]))
    return model


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    """The folder of an adapter."""
    slora.save_adapter(trained(), tmp_path / "adapter")
    return tmp_path / "adapter"


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change `selective.json`."""
    fields = json.loads((folder / SELECTIVE).read_text())
    change(fields)
    (folder / SELECTIVE).write_text(json.dumps(fields))


def edit_tensor(folder: Path, name: str, change: Callable[[Tensor], Tensor]) -> None:
    """Change one tensor, as in a directory that was written before there was a digest."""
    tensors = load_file(folder / WEIGHTS)
    tensors[name] = change(tensors[name]).contiguous()
    save_file(tensors, folder / WEIGHTS)
    edit(folder, lambda fields: fields.pop("tensors_digest", None))


def refused(folder: Path, *texts: str, model: nn.Module | None = None) -> None:
    """Loading raises an error that says `texts` within seconds, and plain and adapted models are what they were."""
    for target in [plain(), slora.inject(plain(), CONFIG)] if model is None else [model]:
        before = snapshot(target)
        with pytest.raises(slora.SLoRAError) as raised, limited(5):
            slora.load_adapter(target, folder)
        assert not differences(before, snapshot(target))
        for text in texts:
            assert text in str(raised.value)


# Values


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


# Before the first change


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


# Patterns


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


# Files that are none


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


def test_a_link_in_the_place_of_a_file_is_replaced_and_not_written_through(saved: Path, tmp_path: Path) -> None:
    outside = {name: tmp_path / f"outside-{name}" for name in os.listdir(saved)}
    for name, path in outside.items():
        os.replace(saved / name, path)
        (saved / name).symlink_to(path)
    before = {name: path.read_bytes() for name, path in outside.items()}
    slora.load_adapter(plain(), saved)
    slora.save_adapter(trained(seed=2), saved)
    assert {name: path.read_bytes() for name, path in outside.items()} == before
    assert sorted(os.listdir(saved)) == sorted(outside)
    assert not any((saved / name).is_symlink() for name in outside)


# Two adapters


@pytest.mark.parametrize("name", [WEIGHTS, SELECTIVE])
def test_files_of_two_adapters_are_not_mixed(name: str, saved: Path, tmp_path: Path) -> None:
    slora.save_adapter(trained(seed=2), tmp_path / "other")
    (saved / name).write_bytes((tmp_path / "other" / name).read_bytes())
    refused(saved, f"{WEIGHTS} holds other tensors than {SELECTIVE} was written with")


def _save_until(model: nn.Module, folder: Path, calls: int) -> bool:
    """Save in a process that ends without a word before that call of the file system; whether it was reached."""
    child = os.fork()
    if child == 0:
        left = calls

        def counted(real: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
            nonlocal left
            if left == 0:
                os._exit(1)
            left -= 1
            return real(*args, **kwargs)

        try:
            for name in ("replace", "rename", "unlink", "remove", "fsync", "chmod"):
                setattr(os, name, functools.partial(counted, getattr(os, name)))
            slora.save_adapter(model, folder)
        except BaseException:
            os._exit(2)
        os._exit(0)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code in (0, 1)
    return code == 1


def _holds(folder: Path, models: list[nn.Module]) -> int:
    """Which of `models` the folder holds the adapter of."""
    loaded = slora.load_adapter(plain(), folder)
    (found,) = [i for i, model in enumerate(models) if torch.equal(model.qkv.lora_B[0], loaded.qkv.lora_B[0])]
    for name in ("qkv", "proj", "attention", "out"):
        one, two = (m.get_submodule(name) for m in (models[found], loaded))
        assert torch.equal(one.gate, two.gate)
        for i in one.activity().active:
            assert torch.equal(one.lora_B[i], two.lora_B[i])
    return found


def test_a_kill_at_any_file_call_leaves_the_earlier_adapter_or_the_new_one(tmp_path: Path) -> None:
    models = [trained(seed) for seed in range(3)]
    with torch.no_grad():
        models[1].qkv.gate.copy_(torch.tensor([0.3, 0.3, 0.3]))
        models[2].out.gate.fill_(0.0)
    start = tmp_path / "start"
    slora.save_adapter(models[0], start)
    results = []
    folder = tmp_path / "adapter"
    for first in range(100):
        _copy(start, folder)
        reached = _save_until(models[1], folder, first)
        results.append(_holds(folder, models))
        if not reached:
            break
        if not any(path.name.endswith(".earlier") for path in folder.iterdir()):
            continue
        # What was cut off once may be cut off again.
        cut = tmp_path / "cut"
        _copy(folder, cut)
        for second in range(first % 4, 100, 4):
            _copy(cut, folder)
            again = _save_until(models[2], folder, second)
            assert _holds(folder, models) in ((results[-1], 2) if again else (2,)), (first, second)
            if not again:
                break
    assert results[0] == 0
    assert results[-1] == 1
    assert results == sorted(results)
    assert sorted(os.listdir(folder)) == ["adapter_config.json", WEIGHTS, SELECTIVE]


def _copy(source: Path, target: Path) -> None:
    target.mkdir(exist_ok=True)
    for path in target.iterdir():
        path.unlink()
    for path in source.iterdir():
        (target / path.name).write_bytes(path.read_bytes())


def test_a_directory_from_before_the_digest_survives_a_kill_as_well(tmp_path: Path) -> None:
    models = [trained(seed) for seed in range(2)]
    start, folder = tmp_path / "start", tmp_path / "adapter"
    slora.save_adapter(models[0], start)
    edit(start, lambda fields: fields.pop("tensors_digest", None))
    results = []
    for calls in range(100):
        _copy(start, folder)
        reached = _save_until(models[1], folder, calls)
        results.append(_holds(folder, models))
        if not reached:
            break
    assert results == sorted(results)
    assert set(results) == {0, 1}


def test_an_error_at_any_rename_leaves_the_earlier_files(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = {path.name: path.read_bytes() for path in saved.iterdir()}
    real = os.replace
    for failing in range(6):
        count = 0

        def replace(source: Any, target: Any, failing: int = failing) -> None:
            nonlocal count
            count += 1
            if count == failing + 1:
                raise OSError(5, "Input/output error", str(source), None, str(target))
            real(source, target)

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            if failing == 5:
                slora.save_adapter(trained(seed=2), saved)
                assert count == 5
                return
            with pytest.raises(CheckpointError, match=r"could not be written \(Input/output error\)"):
                slora.save_adapter(trained(seed=2), saved)
        assert {path.name: path.read_bytes() for path in saved.iterdir()} == before


def test_an_adapter_that_is_saved_while_it_is_read_is_read_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from slora.adapters import tensors

    first, second = trained(), trained()
    with torch.no_grad():
        second.get_parameter("qkv.lora_B").add_(1)
    slora.save_adapter(first, tmp_path)
    read, calls = tensors.read_tensors, []

    def late(folder: Path, digest: str | None) -> dict[str, Tensor]:
        calls.append(digest)
        if len(calls) == 1:
            slora.save_adapter(second, folder)
        if len(calls) == 2:
            slora.save_adapter(first, folder)
            raise CheckpointError("unable to open file")
        return read(folder, digest)

    monkeypatch.setattr(tensors, "read_tensors", late)
    other = trained()
    slora.load_adapter(other, tmp_path)
    assert len(calls) == 3
    assert torch.equal(other.get_parameter("qkv.lora_B")[0], first.get_parameter("qkv.lora_B")[0])
    (tmp_path / "adapter_model.safetensors").write_bytes(b"damage")
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        slora.load_adapter(other, tmp_path)
    assert len(calls) == 4, "what nobody writes is not read again"


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
