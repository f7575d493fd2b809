"""Trains the glyph CLIP from scratch: `python -m slora.demo.pretrain_clip`, five minutes on one core.

Each step renders and captions new letters in the training fonts. Several captions of a batch may be true of an image,
so the targets of the contrastive loss are spread over all true pairs (UniCL, arXiv 2204.03610, equation 2, with "true
of" in place of "of the same class"). Digits are never shown. Their names are learnt last, from text alone: random
embeddings, which the trained tower has never read, give nearly equal captions, between which no image could choose.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES, build_zero_shot_classifier
from open_clip.model import CLIP
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional as F

from slora.demo.captions import DIGITS, TEMPLATES, VOCABULARY, GlyphTokenizer, captions
from slora.demo.glyph_clip import CLIP_CHECKPOINT, HELD_OUT_FONTS, TRAINING_FONTS, build_clip
from slora.demo.letters import CLASSES, styled_letters
from slora.demo.pretrain import write
from slora.errors import ConfigError
from slora.io.atomic import write_atomically

PER_CLASS = 4
LEARNING_RATE = 2e-3
WEIGHT_DECAY = 0.05
WARMUP = 0.05  # share of all steps
CLIP_NORM = 1.0
MOST_LOGIT_SCALE = math.log(100)

# Of the last stage, in which only the embeddings of the digits' names are trained.
DIGIT_STEPS, DIGIT_LEARNING_RATE, DIGIT_SCALE = 300, 1e-2, 20.0

# Held-out letters; training draws its seeds from a million up.
TEST_SEED, TEST_PER_CLASS = 3, 40
_TRAINING_SEEDS = 1_000_000

_TOKENIZE = GlyphTokenizer()


def zero_shot_accuracy(
    model: CLIP, images: Tensor, labels: Tensor, classes: Sequence[str] = CLASSES, templates: Any = TEMPLATES
) -> float:
    """Return the share of images [n, 1, 16, 16] whose class a zero-shot classifier finds, from 0 to 1."""
    was_training = model.training
    model.eval()
    weights = build_zero_shot_classifier(model, _TOKENIZE, list(classes), list(templates))
    with torch.no_grad():
        found = [(model.encode_image(part.expand(-1, 3, -1, -1)) @ weights).argmax(1) for part in images.split(512)]
    model.train(was_training)
    return (torch.cat(found) == labels).double().mean().item()


def contrastive_loss(images: Tensor, texts: Tensor, scale: Tensor, true: Tensor) -> Tensor:
    """Return the mean of the cross-entropies from images to texts and from texts to images.

    Args:
        images, texts: normalised embeddings [n, d].
        scale: the factor of the cosines.
        true: [n, n] bool, whether text j is true of image i; on the diagonal it is.
    """
    logits = scale * images @ texts.T
    positives = true.to(logits.dtype)
    to_texts = positives / positives.sum(1, keepdim=True)
    to_images = positives.T / positives.T.sum(1, keepdim=True)
    return 0.5 * (F.cross_entropy(logits, to_texts) + F.cross_entropy(logits.T, to_images))


def new_clip(seed: int) -> CLIP:
    """Return a CLIP to train, its weights drawn with this seed."""
    torch.manual_seed(seed)
    model = build_clip()
    # open_clip leaves the image tower at PyTorch's defaults and draws tokens with a standard deviation of 0.02; the
    # first suits large widths, and from the second the untrained words would stay nearly equal.
    for module in model.visual.transformer.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    nn.init.normal_(model.token_embedding.weight, std=0.2)
    nn.init.normal_(model.positional_embedding, std=0.05)
    return model


class Pretraining:
    """A pretraining of `steps` steps that can be saved and continued bit for bit."""

    def __init__(self, steps: int, seed: int) -> None:
        if steps < 1:
            raise ConfigError(f"steps={steps} trains nothing; use 1 or more")
        if seed < 0:
            raise ConfigError(f"seed={seed} is negative; use 0 or more")
        self.steps, self.seed, self.step = steps, seed, 0
        self.model = new_clip(seed)
        # Decay would shrink the embeddings of words that no caption holds.
        kept = ("token_embedding.weight", "positional_embedding", "visual.positional_embedding", "logit_scale")
        named = dict(self.model.named_parameters())
        decay = [p for name, p in named.items() if p.ndim >= 2 and name not in kept]
        rest = [p for name, p in named.items() if p.ndim < 2 or name in kept]
        self.optimizer = torch.optim.AdamW(
            [{"params": decay, "weight_decay": WEIGHT_DECAY}, {"params": rest, "weight_decay": 0.0}], lr=LEARNING_RATE
        )

    def train_step(self) -> float:
        """Render, caption, and take one step; returns the loss."""
        seed = _TRAINING_SEEDS * (self.seed + 1) + self.step
        styled = styled_letters(PER_CLASS, seed, TRAINING_FONTS)
        written = captions(styled, seed, OPENAI_IMAGENET_TEMPLATES)
        tokens, rows = _TOKENIZE(written.texts).unique(dim=0, return_inverse=True)
        for group in self.optimizer.param_groups:
            group["lr"] = LEARNING_RATE * self._rate()
        images = self.model.encode_image(styled.images.expand(-1, 3, -1, -1), normalize=True)
        texts = self.model.encode_text(tokens, normalize=True)[rows]
        loss = contrastive_loss(images, texts, self.model.logit_scale.exp(), written.true)
        self.optimizer.zero_grad()
        torch.autograd.backward(loss)
        nn.utils.clip_grad_norm_(self.model.parameters(), CLIP_NORM)
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(max=MOST_LOGIT_SCALE)
        self.step += 1
        return loss.item()

    def _rate(self) -> float:
        warmup = max(1, round(WARMUP * self.steps))
        if self.step < warmup:
            return (self.step + 1) / warmup
        return 0.5 * (1 + math.cos(math.pi * (self.step - warmup) / max(1, self.steps - warmup)))

    def save(self, path: Path) -> None:
        """Write weights and optimizer state, from which `load` goes on."""
        tensors = {f"model.{name}": value.contiguous() for name, value in self.model.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{name}": value for name, value in state.items()}
        metadata = {"step": str(self.step), "steps": str(self.steps), "seed": str(self.seed)}
        write_atomically(path, lambda temporary: save_file(tensors, temporary, metadata))

    def load(self, path: Path) -> None:
        """Go on from what `save` wrote.

        Raises:
            ConfigError: it is of a training of another length or seed.
        """
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata()
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        if (metadata["steps"], metadata["seed"]) != (str(self.steps), str(self.seed)):
            raise ConfigError(
                f"{path} is of a training with steps={metadata['steps']} and seed={metadata['seed']}; use the same, or "
                f"remove the file"
            )
        self.model.load_state_dict({n.removeprefix("model."): v for n, v in tensors.items() if n.startswith("model.")})
        state: dict[int, dict[str, Tensor]] = {}
        for name, value in tensors.items():
            if name.startswith("optimizer."):
                _, i, key = name.split(".")
                state.setdefault(int(i), {})[key] = value
        self.optimizer.load_state_dict(self.optimizer.state_dict() | {"state": state})
        self.step = int(metadata["step"])


def learn_digits(model: CLIP, seed: int) -> None:
    """Train the embeddings of the digits and their names, so that captions of different digits differ, in place.

    A caption of a digit is to be nearer to another of the same digit, "3" or "three", than to captions of other digits
    and of letters (InfoNCE, arXiv 1807.03748). No other weight changes, and no caption of a letter, but for those that
    hold the word "one".
    """
    rng = np.random.default_rng((seed, 2))
    weight = model.token_embedding.weight
    trained = torch.zeros(len(VOCABULARY), 1)
    trained[[VOCABULARY.index(word) for pair in DIGITS for word in pair]] = 1
    # Of all other rows the gradient is set to 0, with which Adam without decay changes nothing.
    optimizer = torch.optim.Adam([weight], lr=DIGIT_LEARNING_RATE)

    def embedded(names: Sequence[str]) -> Tensor:
        chosen = rng.integers(len(OPENAI_IMAGENET_TEMPLATES), size=len(names))
        texts = [OPENAI_IMAGENET_TEMPLATES[i](name) for i, name in zip(chosen, names, strict=True)]
        embeddings: Tensor = model.encode_text(_TOKENIZE(texts), normalize=True)
        return embeddings

    same = torch.arange(len(DIGITS))
    for _ in range(DIGIT_STEPS):
        with torch.no_grad():
            letters = embedded(CLASSES)
        one, other = (embedded([pair[rng.integers(2)] for pair in DIGITS]) for _ in range(2))
        loss = F.cross_entropy(DIGIT_SCALE * one @ torch.cat([other, letters]).T, same)
        loss += F.cross_entropy(DIGIT_SCALE * other @ torch.cat([one, letters]).T, same)
        model.zero_grad()
        torch.autograd.backward(loss, inputs=[weight])
        weight.grad.mul_(trained)
        optimizer.step()


def pretrain(steps: int, seed: int, continued: Path | None = None) -> tuple[CLIP, dict[str, str]]:
    """Train on captioned letters and print the progress.

    Args:
        continued: file for the state of the training, every 100 steps; if it is there, the training goes on from it.

    Returns:
        The model, its weights rounded to float16 as in the checkpoint, and the metadata of the checkpoint: `seed`,
        `steps`, and of the rounded weights the zero-shot `accuracy` on letters in fonts that were held out and its
        `accuracy_training_fonts` on new letters in the others.

    Raises:
        ConfigError: `steps` is below 1, `seed` is negative, or `continued` is of another training.
    """
    training = Pretraining(steps, seed)
    if continued is not None and continued.exists():
        training.load(continued)
    held_out = styled_letters(TEST_PER_CLASS, TEST_SEED, HELD_OUT_FONTS)
    seen = styled_letters(TEST_PER_CLASS, TEST_SEED, TRAINING_FONTS)
    start = time.monotonic()
    losses: list[float] = []
    while training.step < steps:
        losses.append(training.train_step())
        if training.step % 100 == 0 or training.step == steps:
            accuracy = zero_shot_accuracy(training.model, held_out.images, held_out.labels)
            print(
                f"step {training.step}/{steps}  loss {sum(losses) / len(losses):.3f}  zero-shot {accuracy:.3f}  "
                f"{time.monotonic() - start:.0f} s",
                flush=True,
            )
            losses = []
            if continued is not None:
                training.save(continued)
    learn_digits(training.model, seed)
    model = training.model.half().float().eval()
    accuracy = zero_shot_accuracy(model, held_out.images, held_out.labels)
    of_seen = zero_shot_accuracy(model, seen.images, seen.labels)
    print(f"as stored in float16: zero-shot {accuracy:.4f} in held-out fonts, {of_seen:.4f} in training fonts")
    metadata = {
        "seed": str(seed),
        "steps": str(steps),
        "accuracy": f"{accuracy:.4f}",
        "accuracy_training_fonts": f"{of_seen:.4f}",
    }
    return model, metadata


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line: train, then write the checkpoint."""
    parser = argparse.ArgumentParser(
        prog="python -m slora.demo.pretrain_clip",
        description="Train the glyph CLIP again: a small CLIP of captioned letters.",
    )
    parser.add_argument("--out", type=Path, default=CLIP_CHECKPOINT, help="checkpoint to write (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=900, help="of 208 new images each (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of initial weights, images and captions")
    parser.add_argument(
        "--state", type=Path, default=None, help="file to save the training in, and to go on from if it is there"
    )
    options = parser.parse_args(arguments)
    if not os.access(options.out.parent, os.W_OK):
        # Fail now rather than after minutes of training.
        parser.error(f"--out {options.out}: its folder is missing or cannot be written; choose another")
    try:
        model, metadata = pretrain(options.steps, options.seed, options.state)
    except ConfigError as error:
        parser.error(str(error))
    write(model, metadata, options.out)
    print(f"wrote {options.out}, {options.out.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
