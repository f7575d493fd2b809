"""Files that are either the old one or the new one."""

from __future__ import annotations

import errno
import os
import resource
import stat
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from slora.errors import CheckpointError, WriteError
from slora.io.atomic import write_atomically, write_json, write_text, write_together
from slora.io.bounded import read_json


def test_text_and_json_come_back_as_they_were(tmp_path: Path) -> None:
    write_text(tmp_path / "deep" / "er" / "a.txt", "naïve\n")
    assert (tmp_path / "deep" / "er" / "a.txt").read_bytes() == "naïve\n".encode()
    value = {"b": [1, 2.5, None], "a": {"x": "ü"}}
    write_json(tmp_path / "a.json", value)
    assert read_json(tmp_path / "a.json") == value
    assert (tmp_path / "a.json").read_text().endswith("}\n")


def test_a_new_file_replaces_the_old_one_and_nothing_else_stays(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")
    write_text(path, "new")
    assert path.read_text() == "new"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_the_target_is_the_old_file_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        assert path.read_text() == "old"
        assert temporary.parent == path.parent, "a rename across file systems would not be atomic"

    write_atomically(path, write)
    assert path.read_text() == "half"


def test_the_content_is_on_disk_before_the_name_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    events: list[str] = []
    real_sync, real_replace = os.fsync, os.replace

    def sync(descriptor: int) -> None:
        events.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        real_sync(descriptor)

    def replace(*args: Any) -> None:
        events.append("rename")
        real_replace(*args)

    monkeypatch.setattr(os, "fsync", sync)
    monkeypatch.setattr(os, "replace", replace)
    write_text(tmp_path / "a.txt", "new")
    assert events == ["file", "rename", "folder"]
    events.clear()
    write_together({tmp_path / name: lambda p: p.write_text("x") for name in ("b", "c")})
    assert events == ["file", "file", "rename", "folder", "rename", "folder"]


@pytest.mark.parametrize(
    ("number", "remedy"),
    [
        (errno.ENOSPC, "free space or choose another folder"),
        (errno.EDQUOT, "free space or choose another folder"),
        (errno.EFBIG, "free space or choose another folder"),
        (errno.EACCES, "choose a folder that you may write to"),
        (errno.EROFS, "choose a folder that you may write to"),
        (errno.EIO, "choose another folder"),
    ],
    ids=errno.errorcode.get,
)
def test_what_the_system_refuses_becomes_an_error_that_names_the_file_and_the_remedy(
    number: int, remedy: str, tmp_path: Path
) -> None:
    error = OSError(number, os.strerror(number))
    path = tmp_path / "a.txt"
    write_text(path, "old")

    def write(temporary: Path) -> None:
        temporary.write_text("ha")
        raise error

    message = rf"a\.txt could not be written \({error.strerror}\); {remedy}\. The file is unchanged\."
    with pytest.raises(WriteError, match=message):
        write_atomically(path, write)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["a.txt"]


def test_a_file_in_the_place_of_a_folder_is_named(tmp_path: Path) -> None:
    (tmp_path / "afile").write_text("")
    for path in (tmp_path / "afile" / "a.txt", tmp_path / "afile" / "deeper" / "a.txt"):
        with pytest.raises(WriteError) as raised:
            write_text(path, "x")
        assert str(raised.value).startswith(
            f"{path} could not be written ({tmp_path / 'afile'} is not a folder); choose another folder."
        )
    with pytest.raises(WriteError, match=r"\(/dev/full is not a folder\); choose another folder\."):
        write_text("/dev/full/a.txt", "x")


def test_the_cause_is_found_in_the_text_of_safetensors(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (2000, hard))
    try:
        with pytest.raises(WriteError, match="; free space or choose another folder"):
            write_atomically(tmp_path / "a", lambda path: save_file({"x": torch.zeros(1000)}, path))
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_an_error_of_the_writer_passes_through_and_leaves_nothing(tmp_path: Path) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text("ha")
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        write_atomically(tmp_path / "a.txt", write)
    assert os.listdir(tmp_path) == []


def test_of_files_that_belong_together_none_changes_if_one_fails(tmp_path: Path) -> None:
    for name in ("one", "two"):
        write_text(tmp_path / name, "old")

    def fail(temporary: Path) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(CheckpointError, match="three could not be written"):
        write_together(
            {
                tmp_path / "one": lambda p: p.write_text("new"),
                tmp_path / "two": lambda p: p.write_text("new"),
                tmp_path / "three": fail,
            }
        )
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == {"one": "old", "two": "old"}


def test_new_files_have_the_permissions_that_the_umask_asks_for(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        write_text(tmp_path / "a.txt", "x")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "a.txt").stat().st_mode) == 0o640
    assert os.umask(before) == before, "the umask itself is what it was"


def test_numbers_that_json_does_not_know_are_refused_before_a_file_exists(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(tmp_path / "a.json", {"loss": float("nan")})
    assert os.listdir(tmp_path) == []


def test_what_killed_processes_left_of_a_file_goes_with_the_next_one_and_nothing_else(tmp_path: Path) -> None:
    old = time.time() - 3600

    def left(name: str) -> Path:
        path = tmp_path / name
        path.write_text("half")
        os.utime(path, (old, old))
        return path

    gone = left(".a.json.x1.tmp")
    kept = [left(".b.json.x1.tmp"), left("a.json.tmp"), left(".a.json.notes")]
    young = tmp_path / ".a.json.x2.tmp"
    young.write_text("just made")
    seen = []

    def write(path: Path) -> None:
        # Another process saves at the same time, and this one is slow.
        os.utime(path, (old, old))
        if path.parent == tmp_path and not seen:
            seen.append(path)
            write_text(tmp_path / "a.json", "the other's")
            assert path.exists()
        path.write_text("ours")

    write_atomically(tmp_path / "a.json", write)
    assert seen
    assert sorted(tmp_path.iterdir()) == sorted([*kept, young, tmp_path / "a.json"])
    assert not gone.exists()
    assert (tmp_path / "a.json").read_text() == "ours"
