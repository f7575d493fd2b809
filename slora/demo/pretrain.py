"""Makes the demo's pretrained weights from nothing: `python -m slora.demo.pretrain`, about ten minutes on two cores.

Every epoch renders new letters, so the model never sees an image twice and has nothing to overfit.
"""

from __future__ import annotations

import argparse
import os
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors.torch import save
from timm.models.vision_transformer import VisionTransformer
from torch import Tensor, nn
from torch.nn import functional as F

from slora.demo.letters import CLASSES, letters
from slora.demo.model import CHECKPOINT, build

N_PER_CLASS = 500
BATCH_SIZE = 256
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
WARMUP = 0.05  # share of all steps
LABEL_SMOOTHING = 0.1
CLIP_NORM = 1.0

NEIGHBOURS = 20
TEMPERATURE = 0.07

# Held-out letters; training draws its seeds from a million up.
BANK_SEED, BANK_PER_CLASS = 1, 100
QUERY_SEED, QUERY_PER_CLASS = 2, 50
_TRAINING_SEEDS = 1_000_000


@torch.inference_mode()
def embed(model: VisionTransformer, images: Tensor) -> tuple[Tensor, Tensor]:
    """Features [n, 96] and logits [n, classes] of images [n, 1, 16, 16]."""
    model.eval()
    features = [
        model.forward_head(model.forward_features(batch), pre_logits=True) for batch in torch.split(images, 512)
    ]
    joined = torch.cat(features)
    return joined, model.head(joined)


def knn_accuracy(bank: Tensor, bank_labels: Tensor, queries: Tensor, query_labels: Tensor) -> float:
    """Share of queries [q, d] named rightly by their 20 nearest in the bank [b, d].

    Neighbours are nearest by cosine and vote with weight exp(cosine / 0.07), as in DINO (Caron et al., 2021).
    """
    cosines = F.normalize(queries, dim=1) @ F.normalize(bank, dim=1).T
    nearest, rows = cosines.topk(NEIGHBOURS, dim=1)
    votes = torch.zeros(len(queries), int(bank_labels.max()) + 1)
    votes.scatter_add_(1, bank_labels[rows], (nearest / TEMPERATURE).exp())
    return (votes.argmax(dim=1) == query_labels).float().mean().item()


def evaluate(
    model: VisionTransformer, bank: tuple[Tensor, Tensor], queries: tuple[Tensor, Tensor]
) -> tuple[float, float]:
    """Accuracy of the head and of weighted k-NN on the queries; both sets are (images, labels)."""
    bank_features, _ = embed(model, bank[0])
    query_features, logits = embed(model, queries[0])
    accuracy = (logits.argmax(dim=1) == queries[1]).float().mean().item()
    return accuracy, knn_accuracy(bank_features, bank[1], query_features, queries[1])


def pretrain(epochs: int, seed: int) -> tuple[VisionTransformer, dict[str, str]]:
    """Train on rendered letters and report to standard output.

    Returns:
        The model, its weights rounded to float16 as the checkpoint stores them, and the checkpoint's metadata:
        `seed`, `epochs`, and the `accuracy` and `knn_accuracy` of the rounded weights on held-out letters.

    Raises:
        ValueError: `epochs` is below 1, or `seed` is negative.
    """
    if epochs < 1:
        raise ValueError(f"epochs={epochs} trains nothing; use 1 or more")
    if seed < 0:
        raise ValueError(f"seed={seed} is negative; use 0 or more")
    bank, queries = letters(BANK_PER_CLASS, BANK_SEED), letters(QUERY_PER_CLASS, QUERY_SEED)
    torch.manual_seed(seed)
    model = build(len(CLASSES))
    for module in model.blocks.modules():
        # timm draws weights of standard deviation 0.02, which suits width 768; at width 96 the first epochs are
        # then wasted. Measured after four, at a rate of 1e-3: accuracy 0.33 instead of 0.67.
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


def write(model: VisionTransformer, metadata: dict[str, str], path: Path) -> None:
    """Write the weights in float16 to a temporary name, then rename: `path` is never half a file."""
    weights = {name: tensor.half().contiguous() for name, tensor in model.state_dict().items()}
    temporary = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            file.write(save(weights, metadata=metadata))
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: train, then write the checkpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m slora.demo.pretrain",
        description="Re-make the demo's pretrained weights: a vision transformer taught to read rendered letters.",
    )
    parser.add_argument("--out", type=Path, default=CHECKPOINT, help="checkpoint to write (default: %(default)s)")
    parser.add_argument(
        "--epochs", type=int, default=24, help="epochs of 26 000 new images each (default: %(default)s)"
    )
    parser.add_argument("--seed", type=int, default=0, help="of initial weights and images (default: %(default)s)")
    options = parser.parse_args(arguments)
    if not options.out.parent.is_dir():
        # Found out now rather than after ten minutes of training.
        parser.error(f"--out {options.out}: the folder {options.out.parent} does not exist; create it first")
    model, metadata = pretrain(options.epochs, options.seed)
    write(model, metadata, options.out)
    print(f"wrote {options.out}, {options.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
