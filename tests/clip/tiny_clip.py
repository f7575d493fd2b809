"""A CLIP with two small towers, its weights in a file, and images to fine-tune it on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from torch import nn

NAME = "open_clip/ViT-tiny-clip"
CONFIG = {
    "embed_dim": 24,
    "vision_cfg": {"image_size": 16, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8},
    "text_cfg": {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
}
COLOURS = {"blue": (30, 40, 200), "green": (40, 190, 50), "red": (220, 30, 40)}


def register(folder: Path) -> None:
    """Let open_clip know the architectures `ViT-tiny-clip` and, with wider embeddings, `ViT-wide-clip`."""
    import open_clip

    folder.mkdir(exist_ok=True)
    (folder / "ViT-tiny-clip.json").write_text(json.dumps(CONFIG))
    (folder / "ViT-wide-clip.json").write_text(json.dumps({**CONFIG, "embed_dim": 32}))
    open_clip.add_model_config(folder)


def model() -> nn.Module:
    """A CLIP of random weights, the same at every call."""
    import open_clip

    with torch.random.fork_rng():
        torch.manual_seed(3)
        made: Any = open_clip.create_model("ViT-tiny-clip")
    return made


def write_images(folder: Path) -> None:
    """Write 3 x 10 images of one colour with noise, in folders named after their colours."""
    generator = torch.Generator().manual_seed(0)
    for name, colour in COLOURS.items():
        (folder / name).mkdir(parents=True)
        for i in range(10):
            pixels = torch.tensor(colour) + torch.randint(-25, 25, (16, 16, 3), generator=generator)
            Image.fromarray(pixels.clamp(0, 255).byte().numpy()).save(folder / name / f"{i}.png")
