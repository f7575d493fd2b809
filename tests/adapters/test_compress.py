"""Adapters compressed to signs, and back: for slora and PEFT, with named errors."""

from __future__ import annotations

import json
import os
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import slora
from slora.adapters.compress import compress_adapter, decompress_adapter
from slora.errors import CheckpointError, ConfigError, StateError, WriteError
from slora.layers import adapted_layers
from tests.adapters.adapter_files import FILES, content
from tests.adapters.damaged_adapters import edit_tensor, trained
from tests.mutations.adapters import plain

pytestmark = pytest.mark.once


def _update(layer: Any, i: int) -> Tensor:
    return (layer.lora_B[i] @ layer.lora_A[i]).detach()


@pytest.fixture
def small(saved: Path, tmp_path: Path) -> Path:
    """The compressed file of a small adapter."""
    compress_adapter(saved, tmp_path / "small.safetensors", 0.5)
    return tmp_path / "small.safetensors"


@pytest.mark.parametrize("scale", ["norm", "fit", "1.5"])
def test_a_compressed_adapter_loads_with_the_reported_error(scale: str, saved: Path, tmp_path: Path) -> None:
    report = compress_adapter(saved, tmp_path / "small", 0.3, scale)
    decompress_adapter(tmp_path / "small", tmp_path / "again")
    before, after = (slora.load_adapter(plain(), folder) for folder in (saved, tmp_path / "again"))
    squares: dict[str, list[float]] = {}
    for (name, one), (_, two) in zip(adapted_layers(before), adapted_layers(after), strict=True):
        assert torch.equal(one.gate, two.gate)
        active = one.activity().active
        errors = [float((_update(one, i) - _update(two, i)).square().sum()) for i in active]
        sizes = [float(_update(one, i).square().sum()) for i in active]
        squares[name] = [one.scaling**2 * sum(errors), one.scaling**2 * sum(sizes)]
        assert report.errors[name] == pytest.approx((sum(errors) / sum(sizes)) ** 0.5, rel=1e-4)
        for i in active:
            assert len(two.lora_A[i].unique()) <= 3
            assert int((two.lora_A[i] != 0).sum()) == max(1, round(0.3 * one.lora_A[i].numel()))
            if scale == "norm":
                assert float(_update(two, i).norm()) == pytest.approx(float(_update(one, i).norm()), rel=1e-4)
    error, size = (sum(values) for values in zip(*squares.values(), strict=True))
    assert report.error == pytest.approx((error / size) ** 0.5, rel=1e-4)


def test_modules_trained_in_full_and_gates_are_exact(saved: Path, small: Path, tmp_path: Path) -> None:
    decompress_adapter(small, tmp_path / "again")
    before, after = (load_file(folder / FILES[1]) for folder in (saved, tmp_path / "again"))
    assert before.keys() == after.keys()
    for name, value in before.items():
        assert value.shape == after[name].shape
        assert value.dtype == after[name].dtype
        assert torch.equal(value, after[name]) == (".lora_" not in name)
    one, two = (json.loads((folder / FILES[2]).read_text()) for folder in (saved, tmp_path / "again"))
    assert one | {"tensors_digest": ""} == two | {"tensors_digest": ""}
    assert (saved / FILES[0]).read_bytes() == (tmp_path / "again" / FILES[0]).read_bytes()


def test_the_sizes_are_those_of_the_files(saved: Path, tmp_path: Path) -> None:
    report = compress_adapter(saved, tmp_path / "small")
    assert report.before == sum((saved / name).stat().st_size for name in FILES)
    assert report.after == (tmp_path / "small").stat().st_size < report.before
    exact = [value for name, value in load_file(saved / FILES[1]).items() if ".lora_" not in name]
    assert report.exact == sum(value.nbytes for value in exact)


def test_the_same_adapter_gives_the_same_file(saved: Path, small: Path, tmp_path: Path) -> None:
    compress_adapter(saved, tmp_path / "other", 0.5)
    assert (tmp_path / "other").read_bytes() == small.read_bytes()


def test_peft_loads_what_was_decompressed_with_the_same_output(
    trained: Any, fresh: Callable[[], nn.Module], image: Tensor, tmp_path: Path
) -> None:
    peft = pytest.importorskip("peft")
    slora.save_adapter(trained(modules_to_save=["head"]), tmp_path / "adapter")
    compress_adapter(tmp_path / "adapter", tmp_path / "small")
    decompress_adapter(tmp_path / "small", tmp_path / "again")
    ours = slora.load_adapter(fresh().eval(), tmp_path / "again")
    theirs = peft.PeftModel.from_pretrained(fresh().eval(), tmp_path / "again")
    with torch.no_grad():
        torch.testing.assert_close(theirs(image), ours(image), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("density", [0.0, -0.1, 1.5, float("nan"), "0.2", None, True])
def test_a_density_that_is_no_share_is_named(density: Any, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"density=.* is not a share"):
        compress_adapter(saved, tmp_path / "small", density)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("scale", ["nrom", "0", "-1", "nan", 0.0, None, [1]])
def test_a_scale_that_is_none_is_named(scale: Any, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"scale=.* is neither norm nor fit"):
        compress_adapter(saved, tmp_path / "small", scale=scale)


def test_an_adapter_without_active_blocks_is_refused(tmp_path: Path) -> None:
    model = trained()
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.gate.zero_()
    slora.save_adapter(model, tmp_path / "none")
    with pytest.raises(ConfigError, match="none has no active block"):
        compress_adapter(tmp_path / "none", tmp_path / "small")


def test_existing_outputs_are_left_alone(saved: Path, small: Path, tmp_path: Path) -> None:
    before = small.read_bytes(), content(saved)
    with pytest.raises(ConfigError, match=r"small.safetensors exists"):
        compress_adapter(saved, small)
    with pytest.raises(ConfigError, match="adapter exists"):
        decompress_adapter(small, saved)
    assert (small.read_bytes(), content(saved)) == before


def test_a_value_that_is_not_finite_is_named(saved: Path, tmp_path: Path) -> None:
    def change(tensor: Tensor) -> Tensor:
        return tensor.index_fill(0, torch.tensor([0]), float("nan"))

    edit_tensor(saved, "base_model.model.proj.lora_A.weight", change)
    with pytest.raises(StateError, match=r"proj.lora_A.weight' holds NaN"):
        compress_adapter(saved, tmp_path / "small")


def test_a_folder_that_cannot_be_written_is_named(saved: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(WriteError, match="is not a folder"):
        compress_adapter(saved, tmp_path / "file" / "small")


def _enlarge(tensors: dict[str, Tensor]) -> None:
    """Give every layer more outputs than any computer has bytes."""
    held = json.loads(zlib.decompress(tensors["json"].numpy().tobytes()))
    for shape in held["selective"]["base"]["shapes"].values():
        shape[0] = 3 * 10**30
    tensors["json"] = torch.frombuffer(bytearray(zlib.compress(json.dumps(held).encode())), dtype=torch.uint8)


DAMAGE: dict[str, tuple[Callable[[dict[str, Tensor]], Any], str]] = {
    "no signs": (lambda t: t.pop("signs"), "lacks 'signs'"),
    "half of the signs": (lambda t: t.update(signs=t["signs"][:-9]), "damaged"),
    "a sign of another value": (lambda t: t["signs"].__setitem__(20, t["signs"][20] ^ 1), "damaged"),
    "signs in fp32": (lambda t: t.update(signs=t["signs"].float()), "damaged"),
    "another scale": (lambda t: t["scales"].mul_(2), "tensors are not those"),
    "a scale too few": (lambda t: t.update(scales=t["scales"][1:]), "'scales' is torch.float32"),
    "no json": (lambda t: t.pop("json"), "lacks 'json'"),
    "half of the json": (lambda t: t.update(json=t["json"][:50]), "damaged"),
    "layers without end": (_enlarge, "damaged"),
    "another head": (lambda t: t["base_model.model.head.bias"].add_(1), "tensors are not those"),
    "no head": (lambda t: t.pop("base_model.model.head.bias"), "tensors are not those"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_named_and_nothing_is_written(damage: str, small: Path, tmp_path: Path) -> None:
    change, text = DAMAGE[damage]
    tensors = load_file(small)
    change(tensors)
    save_file({name: value.contiguous() for name, value in tensors.items()}, small)
    with pytest.raises(CheckpointError, match=text) as raised:
        decompress_adapter(small, tmp_path / "again")
    assert str(small) in str(raised.value)
    assert not (tmp_path / "again").exists()


def test_a_file_of_another_kind_is_named(small: Path, saved: Path, tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="lacks 'signs'; give a file that slora compress wrote"):
        decompress_adapter(saved / FILES[1], tmp_path / "again")
    small.write_bytes(small.read_bytes()[:100])
    with pytest.raises(CheckpointError, match="not a readable safetensors file"):
        decompress_adapter(small, tmp_path / "again")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(CheckpointError, match="is a pipe"):
        decompress_adapter(tmp_path / "pipe", tmp_path / "again")
