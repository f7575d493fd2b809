"""Settings in YAML: what is no mapping of settings is named, however it is built."""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from slora import ConfigError
from slora.io.yaml_files import LARGEST, read_yaml
from slora.training import TrainSettings

BOMBS = {
    "brackets": "lr: " + "[" * 200_000,
    "closed brackets": "lr: " + "[" * 9 + "]" * 9,
    "braces": "{a: " * 60_000,
    "dashes": "- " * 100_000,
    "questions": "? " * 100_000,
    "aliases": "a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]",
    "itself": "&a a: *a",
    "base 60": "lr: 1" + ":1" * 100_000,
    "base 60 with a point": "lr: " + "1:" * 100_000 + "1.5",
    "digits": "lr: " + "9" * 100_000,
    "date": "lr: 2001-99-99",
    "not a bool": "lr: !!bool x",
    "not an int": 'lr: !!int ""',
    "object": "lr: !!python/object/apply:os.system [ls]",
    "half a character": 'lr: "\\ud800"',
    "two documents": "lr: 1\n---\nlr: 2",
}


@pytest.mark.parametrize("name", BOMBS)
def test_a_bomb_is_refused_by_name_before_it_goes_off(name: str, tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(BOMBS[name])
    begin = time.monotonic()
    with pytest.raises(ConfigError, match=r"config\.yaml cannot be read as YAML"):
        read_yaml(path)
    assert time.monotonic() - begin < 5


def test_a_pipe_a_device_or_too_much_is_refused(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match=r"config\.yaml is a pipe, expected a file"):
        TrainSettings.from_yaml(tmp_path / "config.yaml")
    with pytest.raises(ConfigError, match="/dev/zero is a device, expected a file"):
        TrainSettings.from_yaml("/dev/zero")
    (tmp_path / "large.yaml").write_text("#" * (LARGEST + 1))
    with pytest.raises(ConfigError, match=r"large\.yaml is larger than 0\.25 MiB"):
        read_yaml(tmp_path / "large.yaml")


def test_what_settings_are_written_as_is_read(tmp_path: Path) -> None:
    import yaml

    settings = TrainSettings(
        target_modules=["qkv", "fc1"], rank_pattern={f"blocks.{i}.attn.qkv": 8 for i in range(500)}, seed=2**60 + 1
    )
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(settings.to_dict()))
    assert TrainSettings.from_yaml(path) == settings


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("gate_init", 10**400),
        ("lr", 10**400),
        ("epochs", 10**400),
        ("seed", 2**64),
        ("max_steps", "9" * 5000),
        ("batch_size", "1e300"),
        ("budget", 10**5000),
        ("blocks", 10**400),
        ("rank_pattern", {"a": 10**400}),
        ("model_args", "a=" + "[" * 3000),
        ("target_modules", ["a", ["b"]]),
        ("log_every", 2**40),
        ("retain_samples", 2**40),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else type(value).__name__,
)
def test_a_number_without_bounds_is_refused_in_a_line(name: str, value: object) -> None:
    with pytest.raises(ConfigError, match=name) as caught:
        TrainSettings.from_dict({name: value})
    assert len(str(caught.value)) < 500
