"""What `setup.py` decides to build, by the compiler that is there."""

from __future__ import annotations

import os
import runpy
from pathlib import Path
from typing import Any

import pytest
import setuptools
import torch

from slora.merging import extension_info

pytestmark = pytest.mark.once

ROOT = Path(__file__).parents[2]


@pytest.fixture
def setup(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """The functions of setup.py, which builds nothing here."""
    monkeypatch.setattr(setuptools, "setup", lambda **_: None)
    monkeypatch.setenv("SLORA_SKIP_EXT", "1")
    monkeypatch.chdir(ROOT)
    return runpy.run_path(str(ROOT / "setup.py"))


def toolkit(folder: Path, release: str, architectures: str) -> str:
    """A CUDA_HOME whose nvcc answers the two questions that setup.py asks."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir()
    nvcc.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = --version ] && echo "Cuda compilation tools, release {release}, V{release}.1"\n'
        f'[ "$1" = --list-gpu-arch ] && printf "%s\\n" {architectures}\n'
        "exit 0\n"
    )
    nvcc.chmod(0o755)
    return str(folder)


@pytest.mark.parametrize(
    ("listed", "expected"),
    [
        ("compute_75 compute_80 compute_90", "8.0;9.0+PTX"),
        ("compute_80 compute_90 compute_100 compute_120", "8.0;9.0;10.0+PTX"),
        ("compute_75 compute_80 compute_86", "8.0+PTX"),
    ],
)
def test_code_is_built_for_what_this_nvcc_knows(
    listed: str, expected: str, setup: dict[str, Any], tmp_path: Path
) -> None:
    assert setup["architectures_of"](toolkit(tmp_path, "12.4", listed)) == expected


def test_the_reason_against_cuda_says_what_to_set(setup: dict[str, Any], tmp_path: Path) -> None:
    why = setup["why_no_cuda"]
    assert (
        why("13.0", str(tmp_path)) == f"CUDA_HOME={tmp_path} has no bin/nvcc; set it to the folder of the CUDA toolkit"
    )
    assert why("13.0", None) == "nvcc was not found; set CUDA_HOME"
    home = toolkit(tmp_path, "12.4", "compute_80")
    assert why("13.0", home) == "nvcc is of CUDA 12, torch of CUDA 13.0"
    assert why("12.8", home) is None
    assert why(None, home) == "this torch has no CUDA"


def test_where_nvcc_fits_this_torch_the_extension_has_cuda(setup: dict[str, Any]) -> None:
    # Otherwise every test of its CUDA side would be skipped without a word.
    info, home = extension_info(), os.environ.get("CUDA_HOME") or "/usr/local/cuda"
    why_not = setup["why_no_cuda"](torch.version.cuda, home)
    if why_not or not info["available"]:
        pytest.skip(why_not or info["reason"])
    assert info["cuda"] is not None
