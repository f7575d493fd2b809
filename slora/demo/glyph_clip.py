"""A small CLIP of captioned letters, of open_clip's own class, and its pretrained weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from open_clip.model import CLIP
from torch import nn

from slora.adapters.tensors import read_safetensors
from slora.demo.captions import CONTEXT_LENGTH, VOCABULARY
from slora.demo.letters import FONTS, IMAGE_SIZE
from slora.errors import CheckpointError

CLIP_CHECKPOINT = Path(__file__).with_name("glyph_clip.safetensors")

# Fonts that pretraining never sees. No other font of cmss10's design is among the rest.
HELD_OUT_FONTS = ("DejaVuSansMono-Oblique", "DejaVuSerif-Bold", "STIXGeneralItalic", "cmss10")
TRAINING_FONTS = tuple(name for name in FONTS if name not in HELD_OUT_FONTS)

# As in open_clip's model configurations.
CONFIG: dict[str, Any] = {
    "embed_dim": 64,
    "vision_cfg": {"image_size": IMAGE_SIZE, "patch_size": 4, "width": 80, "head_width": 40, "layers": 6},
    "text_cfg": {"context_length": CONTEXT_LENGTH, "vocab_size": len(VOCABULARY), "width": 64, "heads": 2, "layers": 2},
}


def build_clip() -> CLIP:
    """Return a new CLIP for images [n, 3, 16, 16] and tokens [n, 16], with embeddings of 64; 0.6 M parameters.

    Its weights are drawn from torch's global generator.
    """
    return CLIP(**CONFIG)


def load_clip(path: Path | None = None) -> CLIP:
    """Return the CLIP pretrained on captioned letters: float32, on the CPU, in evaluation mode.

    Args:
        path: the checkpoint; None for the one that comes with slora.

    Raises:
        CheckpointError: the checkpoint is missing, unreadable, or of another model.
    """
    path = CLIP_CHECKPOINT if path is None else path
    model: nn.Module = build_clip()
    try:
        model.load_state_dict({name: value.float() for name, value in read_safetensors(path).items()})
    except (CheckpointError, RuntimeError) as error:
        raise CheckpointError(
            f"the glyph CLIP's weights {path} cannot be loaded ({error}); reinstall slora, or train them again in "
            f"about five minutes with `python -m slora.demo.pretrain_clip`"
        ) from error
    return model.eval()
