"""The demo's vision transformer and the weights it learned on rendered letters."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from timm.models.vision_transformer import VisionTransformer
from torch import nn

from slora.demo.letters import CLASSES, IMAGE_SIZE
from slora.errors import CheckpointError

CHECKPOINT = Path(__file__).with_name("letters_vit.safetensors")


def build(num_classes: int) -> VisionTransformer:
    """A freshly initialised transformer for images [n, 1, 16, 16]: 16 patches, width 96, 6 layers, 0.68 M parameters.

    Its weights are drawn from torch's global generator. `forward_head(forward_features(x), pre_logits=True)`
    gives the features [n, 96] that the head, and k-NN, see.

    Args:
        num_classes: outputs of the head; 0 makes `forward` return the features.
    """
    return VisionTransformer(
        img_size=IMAGE_SIZE,
        patch_size=4,
        in_chans=1,
        num_classes=num_classes,
        embed_dim=96,
        depth=6,
        num_heads=3,
    )


def pretrained_metadata(path: Path | None = None) -> dict[str, str]:
    """What the checkpoint records about its making: `seed`, `epochs`, `accuracy` and `knn_accuracy` (0 to 1).

    Raises:
        CheckpointError: the checkpoint is missing or unreadable.
    """
    return _read(CHECKPOINT if path is None else path)[1]


def load_pretrained(num_classes: int | None = None, path: Path | None = None) -> VisionTransformer:
    """The transformer pretrained on rendered letters: float32, on the CPU, in evaluation mode.

    Args:
        num_classes: None or 52 keeps the head that names letters. Any other number replaces it by a head of zeros,
            so a fine-tuning run starts from the same point whatever the random seed.
        path: the checkpoint; None for the one that comes with slora.

    Raises:
        CheckpointError: the checkpoint is missing, unreadable, or of another model.
    """
    path = CHECKPOINT if path is None else path
    weights, _ = _read(path)
    model = build(len(CLASSES))
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        raise CheckpointError(
            f"{path} does not hold the demo's model ({error}); re-make it with `python -m slora.demo.pretrain`"
        ) from error
    if num_classes is not None and num_classes != len(CLASSES):
        model.reset_classifier(num_classes)
        if isinstance(model.head, nn.Linear):
            nn.init.zeros_(model.head.weight)
            nn.init.zeros_(model.head.bias)
    return model.eval()


def _read(path: Path) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
    """The checkpoint's tensors in float32 and its metadata."""
    if not path.is_file():
        raise CheckpointError(
            f"the demo's pretrained weights {path} are missing; reinstall slora, "
            "or re-make them in about ten minutes with `python -m slora.demo.pretrain`"
        )
    try:
        with safe_open(path, framework="pt") as file:
            weights = {name: file.get_tensor(name).float() for name in file.keys()}  # noqa: SIM118
            return weights, file.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"the demo's pretrained weights {path} are unreadable ({error}); reinstall slora, "
            "or re-make them in about ten minutes with `python -m slora.demo.pretrain`"
        ) from error
