"""Trains the demo's pretrained weights from scratch: `python -m slora.demo.pretrain`, ten minutes on two cores.

Every epoch renders new letters, so the model never sees an image twice and cannot overfit.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from slora.demo.letters import CLASSES, letters
from slora.demo.model import CHECKPOINT, build
from slora.errors import ConfigError
from slora.evaluation.knn import features, knn_accuracy
from slora.io.atomic import write_atomically

N_PER_CLASS = 500
BATCH_SIZE = 256
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
WARMUP = 0.05  # share of all steps
LABEL_SMOOTHING = 0.1
CLIP_NORM = 1.0

NEIGHBOURS = 20

# Held-out letters; training draws its seeds from a million up.
BANK_SEED, BANK_PER_CLASS = 1, 100
QUERY_SEED, QUERY_PER_CLASS = 2, 50
_TRAINING_SEEDS = 1_000_000


def evaluate(
    model: VisionTransformer, bank: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor]
) -> tuple[float, float]:
    """Return the accuracies of the head and of weighted k-NN (20 neighbours) on the queries, from 0 to 1.

    Args:
        bank: images [b, 1, 16, 16] that vote in k-NN, and their labels [b].
        queries: images [q, 1, 16, 16] to classify, and their labels [q].
    """
    bank_features, bank_labels = features(model, [bank])
    query_features, query_labels = features(model, [queries])
    with torch.no_grad():
        predicted = model.head(query_features).argmax(dim=1)
    knn = knn_accuracy(bank_features, bank_labels, query_features, query_labels, k=(NEIGHBOURS,))
    return (predicted == query_labels).float().mean().item(), knn[NEIGHBOURS]


def pretrain(epochs: int, seed: int) -> tuple[VisionTransformer, dict[str, str]]:
    """Train on rendered letters and print the progress.

    Returns:
        The model, its weights rounded to float16 as in the checkpoint, and the metadata of the checkpoint:
        `seed`, `epochs`, and the `accuracy` and `knn_accuracy` of the rounded weights on held-out letters.

    Raises:
        ConfigError: `epochs` is below 1, or `seed` is negative.
    """
    if epochs < 1:
        raise ConfigError(f"epochs={epochs} trains nothing; use 1 or more")
    if seed < 0:
        raise ConfigError(f"seed={seed} is negative; use 0 or more")
    bank, queries = letters(BANK_PER_CLASS, BANK_SEED), letters(QUERY_PER_CLASS, QUERY_SEED)
    torch.manual_seed(seed)
    model = build(len(CLASSES))
    for module in model.blocks.modules():
        # timm's standard deviation of 0.02 suits width 768; at width 96 it wastes the first epochs. After four of
        # them at a learning rate of 1e-3 the accuracy is 0.33 instead of 0.67.
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    no_decay = [p for p in model.parameters() if p.ndim < 2]
    decay = [p for p in model.parameters() if p.ndim >= 2]
    optimizer = torch.optim.AdamW(
        [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": no_decay, "weight_decay": 0.0}],
        lr=LEARNING_RATE,
    )
    steps = epochs * -(-N_PER_CLASS * len(CLASSES) // BATCH_SIZE)
    schedule = torch.optim.lr_scheduler.OneCycleLR(
        optimizer, max_lr=LEARNING_RATE, total_steps=steps, pct_start=WARMUP, cycle_momentum=False
    )
    start = time.monotonic()
    for epoch in range(epochs):
        # Already in random order, so consecutive slices are random batches.
        images, labels = letters(N_PER_CLASS, _TRAINING_SEEDS * (seed + 1) + epoch)
        model.train()
        total = 0.0
        for batch, targets in zip(torch.split(images, BATCH_SIZE), torch.split(labels, BATCH_SIZE), strict=True):
            loss = F.cross_entropy(model(batch), targets, label_smoothing=LABEL_SMOOTHING)
            optimizer.zero_grad()
            torch.autograd.backward(loss)
            nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
            optimizer.step()
            schedule.step()
            total += loss.item() * len(batch)
        accuracy, knn = evaluate(model, bank, queries)
        print(
            f"epoch {epoch + 1}/{epochs}  loss {total / len(images):.3f}  accuracy {accuracy:.3f}  "
            f"k-NN {knn:.3f}  {time.monotonic() - start:.0f} s",
            flush=True,
        )
    model.half().float()
    accuracy, knn = evaluate(model, bank, queries)
    print(f"as stored in float16: accuracy {accuracy:.4f}  k-NN {knn:.4f}")
    metadata = {
        "seed": str(seed),
        "epochs": str(epochs),
        "accuracy": f"{accuracy:.4f}",
        "knn_accuracy": f"{knn:.4f}",
    }
    return model, metadata


def write(model: nn.Module, metadata: dict[str, str], path: Path) -> None:
    """Write the weights in float16, and the metadata, atomically as one safetensors file.

    Raises:
        CheckpointError: the disk is full or the folder cannot be written.
    """
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    write_atomically(path, lambda temporary: save_file(weights, temporary, metadata))


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: train, then write the checkpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m slora.demo.pretrain",
        description="Train the demo's pretrained weights again: a vision transformer that classifies rendered letters.",
    )
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="checkpoint to write (default: %(default)s)")
    parser.add_argument(
        "--epochs", type=int, default=24, help="epochs of 26 000 new images each (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and images (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not os.access(options.out.parent, os.W_OK):
        # Fail now rather than after ten minutes of training.
        parser.error(f"--out {options.out}: its folder is missing or cannot be written; choose another")
    try:
        model, metadata = pretrain(options.epochs, options.seed)
    except ConfigError as error:
        parser.error(str(error))
    write(model, metadata, options.out)
    print(f"wrote {options.out}, {options.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
