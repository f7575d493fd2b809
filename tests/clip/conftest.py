"""A tiny CLIP of open_clip, its weights in a file, and a folder of images to fine-tune it on."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image

CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The name of a CLIP with two layers of `nn.MultiheadAttention` in each tower."""
    import open_clip
    import open_clip.factory

    folder = tmp_path / "configs"
    folder.mkdir()
    (folder / "ViT-tiny-clip.json").write_text(json.dumps(CONFIG))
    (folder / "ViT-wide-clip.json").write_text(json.dumps({**CONFIG, "embed_dim": 32}))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIGS", dict(open_clip.factory._MODEL_CONFIGS))
    monkeypatch.setattr(open_clip.factory, "_MODEL_CONFIG_PATHS", list(open_clip.factory._MODEL_CONFIG_PATHS))
    open_clip.add_model_config(folder)
    return "open_clip/ViT-tiny-clip"


@pytest.fixture
def weights(tiny: str, tmp_path: Path) -> str:
    """A file with weights of `tiny`."""
    import open_clip

    torch.manual_seed(3)
    path = tmp_path / "tiny.pt"
    torch.save(open_clip.create_model(tiny.partition("/")[2]).state_dict(), path)
    return str(path)


@pytest.fixture
def images(tmp_path: Path) -> Path:
    """A folder of 3 x 10 images of one colour with noise, the class of each its colour."""
    generator = torch.Generator().manual_seed(0)
    for name, colour in (("blue", (30, 40, 200)), ("green", (40, 190, 50)), ("red", (220, 30, 40))):
        folder = tmp_path / "colours" / name
        folder.mkdir(parents=True)
        for i in range(10):
            pixels = torch.tensor(colour) + torch.randint(-25, 25, (16, 16, 3), generator=generator)
            Image.fromarray(pixels.clamp(0, 255).byte().numpy()).save(folder / f"{i}.png")
    return tmp_path / "colours"
