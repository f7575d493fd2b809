"""The demo's vision transformer, and its weights pretrained on rendered letters."""

from __future__ import annotations

from pathlib import Path

from timm.models.vision_transformer import VisionTransformer
from torch import nn

from slora.adapters.tensors import read_safetensors
from slora.demo.letters import CLASSES, IMAGE_SIZE
from slora.errors import CheckpointError

CHECKPOINT = Path(__file__).with_name("letters_vit.safetensors")


def build(num_classes: int) -> VisionTransformer:
    """Return a new transformer for images [n, 1, 16, 16]: 16 patches, width 96, 6 layers, 0.68 M parameters.

    Its weights are drawn from torch's global generator. `forward_head(forward_features(x), pre_logits=True)`
    gives the features [n, 96], the input of the head and of k-NN.

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


def load_pretrained(num_classes: int | None = None, path: Path | None = None) -> VisionTransformer:
    """Return the transformer pretrained on rendered letters: float32, on the CPU, in evaluation mode.

    Args:
        num_classes: None or 52 keeps the head for letters. Any other number replaces it by a head of zeros, so that a
            fine-tuning run starts from the same weights whatever the random seed.
        path: the checkpoint; None for the one that comes with slora.

    Raises:
        CheckpointError: the checkpoint is missing, unreadable, or of another model.
    """
    path = CHECKPOINT if path is None else path
    model = build(len(CLASSES))
    try:
        model.load_state_dict({name: value.float() for name, value in read_safetensors(path).items()})
    except (CheckpointError, RuntimeError) as error:
        raise CheckpointError(
            f"the demo's pretrained weights {path} cannot be loaded ({error}); reinstall slora, or train them again in "
            f"about ten minutes with `python -m slora.demo.pretrain`"
        ) from error
    if num_classes is not None and num_classes != len(CLASSES):
        model.reset_classifier(num_classes)
        if isinstance(model.head, nn.Linear):
            nn.init.zeros_(model.head.weight)
            nn.init.zeros_(model.head.bias)
    return model.eval()
