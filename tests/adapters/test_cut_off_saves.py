"""Saving that is cut off, or that meets another save or a reader: an adapter is old or new, never a mixture."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slora
from slora.errors import CheckpointError
from tests.adapters.adapter_files import edit
from tests.adapters.damaged_adapters import refused, trained
from tests.mutations.adapters import SELECTIVE, WEIGHTS, plain

pytestmark = pytest.mark.once


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
