"""`slora compress` and `slora decompress`."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.cli.conftest import QUICK, Outcome

pytestmark = pytest.mark.once


def test_a_run_is_compressed_and_becomes_an_adapter_again(slora: Callable[..., Outcome], tmp_path: Path) -> None:
    assert slora("finetune", *QUICK, "--out", "run").code == 0
    outcome = slora("compress", "run", "--out", "small.safetensors", "--density", "0.1")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[-2].startswith("36 blocks: ")
    assert "relative error of the update 0." in lines[-2] or "relative error of the update 1." in lines[-2]
    assert lines[-1].endswith("slora decompress small.safetensors --out FOLDER")
    assert slora("decompress", "small.safetensors", "--out", "adapter").out == "adapter holds the adapter\n"
    assert slora("inspect", "adapter").code == 0
    for command in (["compress", "run"], ["decompress", "small.safetensors"]):
        refused = slora(*command, "--out", "small.safetensors")
        assert refused.code == 2
        assert "small.safetensors exists; choose another" in refused.err
