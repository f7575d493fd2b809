"""The tiny CLIP of `tiny_clip.py`, for a whole file of tests."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from tests.clip import tiny_clip


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The name of a CLIP with two layers of `nn.MultiheadAttention` in each tower."""
    import open_clip.factory

    with pytest.MonkeyPatch.context() as patched:
        for attribute in ("_MODEL_CONFIGS", "_MODEL_CONFIG_PATHS"):
            value = getattr(open_clip.factory, attribute)
            patched.setattr(open_clip.factory, attribute, type(value)(value))
        tiny_clip.register(tmp_path_factory.mktemp("configs"))
        yield tiny_clip.NAME


@pytest.fixture(scope="module")
def weights(tiny: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """A file with weights of `tiny`."""
    path = tmp_path_factory.mktemp("weights") / "tiny.pt"
    torch.save(tiny_clip.model().state_dict(), path)
    return str(path)


@pytest.fixture(scope="module")
def images(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of images in three classes."""
    folder = tmp_path_factory.mktemp("images")
    tiny_clip.write_images(folder)
    return folder
