"""What is read is a regular file of a sensible size and depth, and anything else is named."""

from __future__ import annotations

import json
import os
import socket
import time
from pathlib import Path

import pytest

from slora.errors import CheckpointError
from slora.io.bounded import parse_json, read_bytes, read_json, read_text, require_file


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe"], ids=["empty", "half", "binary"])
def test_a_file_that_is_not_json_is_refused_by_name(content: bytes, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    path.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"a\.json is not readable JSON"):
        read_json(path)
    with pytest.raises(CheckpointError, match=r"b\.json does not exist"):
        read_json(tmp_path / "b.json")


@pytest.mark.parametrize("kind", ["pipe", "device", "folder", "socket", "link to a pipe"])
def test_what_is_no_regular_file_is_named_at_once(kind: str, tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    if kind == "device":
        path = Path("/dev/zero")
    elif kind == "folder":
        path.mkdir()
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as end:
            end.bind(str(path))
    else:
        os.mkfifo(path)
        if kind != "pipe":
            path, target = tmp_path / "link", path
            path.symlink_to(target)
    named = "cannot be read" if kind == "socket" else f"is a {kind.split()[-1]}, expected a file"
    for read in (read_json, read_text, read_bytes, require_file):
        with pytest.raises(CheckpointError, match=named):
            read(path)


def test_a_link_to_a_file_is_read_and_one_to_itself_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text("[1]")
    (tmp_path / "link").symlink_to("a.json")
    assert read_json(tmp_path / "link") == [1]
    (tmp_path / "round").symlink_to("round")
    with pytest.raises(CheckpointError, match=r"round cannot be read"):
        read_json(tmp_path / "round")
    with pytest.raises(CheckpointError, match="cannot be read"):
        read_json("a\0b")


def test_a_file_larger_than_any_of_its_kind_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a.json"
    with open(path, "wb") as file:
        file.truncate(1 << 40)
    with pytest.raises(CheckpointError, match=r"larger than 64 MiB"):
        read_json(path)
    path.write_bytes(b" " * 10)
    assert read_bytes(path, 10) == b" " * 10
    with pytest.raises(CheckpointError, match="larger than"):
        read_bytes(path, 9)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        "[" * 2000 + "]" * 2000,
        '{"a":' * 33 + "1" + "}" * 33,
        "9" * 5000,
        "1" + "0" * 400,
        "1e999",
        "-1e999",
        "NaN",
        "[Infinity]",
        '"\\ud800"',
        '{"\\udfff": 1}',
    ],
    ids=lambda text: f"{text[:8]}-{len(text)}",
)
def test_depth_and_numbers_that_break_what_follows_are_refused(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(text)
    begin = time.monotonic()
    with pytest.raises(CheckpointError, match="is not readable JSON"):
        read_json(tmp_path / "a.json")
    assert time.monotonic() - begin < 5


def test_values_as_slora_writes_them_are_read() -> None:
    deep = '{"a":' * 32 + "[]" + "}" * 32
    for text in ("[1.5, null, true]", '"\\ud83d\\ude00"', str(2**64), deep[5:-1]):
        assert parse_json(text) == json.loads(text)
