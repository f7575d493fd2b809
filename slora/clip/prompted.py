"""`PromptedClip`: a CLIP as a classifier whose head is the text tower on prompts of the classes.

Two losses. Cross-entropy on the zero-shot logits `exp(logit_scale) * image @ class embeddings`. Or the contrastive loss
of FLYP ("Finetune like you pretrain", Goyal et al. 2023, arXiv 2212.00638): each image with a prompt of its class, by a
template drawn at random, and the symmetric cross-entropy of pretraining on the similarities within the batch. As in
FLYP's code, other images of the same class in the batch count as negatives. A CLIP that was pretrained on sigmoids
(SigLIP) is trained on the same two losses; its `logit_bias` moves neither of them and stays.
"""

from __future__ import annotations

import math
from collections.abc import Hashable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from slora.clip.clip import Clip
from slora.clip.prompts import Prompts, require_prompts
from slora.layers import adapted_layers
from slora.module_tree.modes import evaluating

# As open_clip's training: the factor on similarities is from 1 to 100.
LARGEST_LOGIT_SCALE = math.log(100)

# Classes whose prompts run through the text tower at once.
_CLASSES_AT_ONCE = 10


class Output(NamedTuple):
    """What a model returns that computes its own loss."""

    loss: Tensor
    logits: Tensor | None
    """`[n, classes]`; None if the loss does not need them."""


class PromptedClip(nn.Module):
    """A CLIP with the prompts of a data set: images to zero-shot logits, or images and labels to a contrastive loss.

    slora sees through it as through a wrapper: names of layers and parameters, adapters and merged weights are those of
    the CLIP inside.

    Args:
        clip: both towers.
        prompts: the names of the classes and the templates.
        trains_text: whether the text tower is trained. If not, class embeddings are computed once.
        contrastive: whether to train on the contrastive loss.

    Raises:
        ConfigError: there is no name of a class or no template, or a template has no `{}` or more than one.

    Attributes:
        takes_labels: whether training calls it with `(images, labels)`, and takes the loss from the `Output`.
    """

    def __init__(self, clip: Clip, prompts: Prompts, trains_text: bool, contrastive: bool) -> None:
        super().__init__()
        require_prompts(prompts)
        self.clip: Any = clip.model
        self.prompts, self.tokenizer = prompts, clip.tokenizer
        self.trains_text, self.takes_labels = trains_text, contrastive
        self._tokens = self._tokenized() if trains_text or contrastive else None
        self._embeddings: tuple[Hashable, Tensor] | None = None

    def forward(self, images: Tensor, labels: Tensor | None = None) -> Tensor | Output:
        """Return logits `[n, classes]` in fp32; with `labels`, the contrastive loss in an `Output`.

        With gradients of the text tower the logits are those of one prompt for each class, in training mode by a
        template drawn at random: all templates would cost as many forward and backward passes. Otherwise a class
        embedding is the mean over all templates.
        """
        with_gradients = self.trains_text and torch.is_grad_enabled()
        if with_gradients:
            # A step may follow, and fused optimizers do not count as a new version of what they change.
            self._embeddings = None
        embeddings = _unit(self.clip.encode_image(images))
        if labels is not None:
            return Output(self._contrastive(embeddings, labels), None)
        if with_gradients:
            classes = torch.arange(len(self.prompts.names), device=images.device)
            texts = _unit(self.clip.encode_text(self._prompted(classes)))
        else:
            texts = self.class_embeddings()
        with torch.autocast(images.device.type, enabled=False):
            logits: Tensor = self.clip.logit_scale.exp() * embeddings @ texts.T
        return logits

    def class_embeddings(self) -> Tensor:
        """Return the normalised class embeddings `[classes, d]` in fp32, without gradient: means over all templates.

        They are computed again when the text tower has changed.
        """
        from open_clip import build_zero_shot_classifier

        state = self._text_state()
        if self._embeddings is None or self._embeddings[0] != state:
            with evaluating(self.clip):
                found = build_zero_shot_classifier(
                    self.clip,
                    self.tokenizer,
                    self.prompts.names,
                    self.prompts.templates,
                    num_classes_per_batch=_CLASSES_AT_ONCE,
                    device=self.clip.logit_scale.device,
                )
            self._embeddings = state, found.T.float()
        return self._embeddings[1]

    def before_training(self) -> None:
        """Compute what stays the same in training."""
        if not self.trains_text:
            self.class_embeddings()

    @torch.no_grad()
    def after_step(self) -> None:
        """Keep a trained `logit_scale` within the bounds of pretraining; called after each optimizer step."""
        if self.clip.logit_scale.requires_grad:
            self.clip.logit_scale.clamp_(0, LARGEST_LOGIT_SCALE)

    def drift_features(self, images: Tensor) -> Tensor:
        """Return normalised embeddings of `images`, and of the classes if the text tower is trained, `[m, d]`."""
        embeddings = _unit(self.clip.encode_image(images))
        return torch.cat([embeddings, self.class_embeddings()]) if self.trains_text else embeddings

    def _contrastive(self, images: Tensor, labels: Tensor) -> Tensor:
        from open_clip.loss import ClipLoss

        texts = _unit(self.clip.encode_text(self._prompted(labels)))
        world, rank = _processes(self.training)
        # Features of all processes, with gradients: the loss of one process with the images of all.
        loss = ClipLoss(local_loss=False, gather_with_grad=True, rank=rank, world_size=world)
        with torch.autocast(images.device.type, enabled=False):
            result: Tensor = loss(images, texts, self.clip.logit_scale.exp())
        return result

    def _prompted(self, labels: Tensor) -> Tensor:
        """The tokens of a prompt for each label: by random templates in training, else by one after the other."""
        assert self._tokens is not None
        n, count = len(labels), len(self.prompts.templates)
        if self.training:
            # Each process takes its part of one draw, so that together they draw what one process would.
            world, rank = _processes(self.takes_labels)
            numbers = torch.randint(count, (n * world,))[rank * n : (rank + 1) * n]
        else:
            numbers = torch.arange(n) % count
        if self._tokens.device != labels.device:
            self._tokens = self._tokens.to(labels.device)
        return self._tokens[labels, numbers.to(labels.device, non_blocking=True)]

    def _tokenized(self) -> Tensor:
        tokens = self.tokenizer(self.prompts.texts())
        return tokens.reshape(len(self.prompts.names), len(self.prompts.templates), -1)

    def _text_state(self) -> Hashable:
        """What the class embeddings depend on besides training: versions of the text tower's values, and its blocks."""
        device: torch.device = self.clip.logit_scale.device
        if not self.trains_text:
            return device
        layers = {name: layer for name, layer in adapted_layers(self.clip) if not name.startswith("visual.")}
        gates = {layer.gate for layer in layers.values()}
        versions = sum(
            parameter._version
            for name, parameter in self.clip.named_parameters()
            if not name.startswith("visual.") and name != "logit_scale" and parameter not in gates
        )
        blocks = tuple((layer.enabled, layer.merged, layer.activity().active) for layer in layers.values())
        return device, versions, blocks


def _unit(embeddings: Tensor) -> Tensor:
    """Embeddings of length 1, in fp32 under autocast, too."""
    return F.normalize(embeddings.float(), dim=-1)


def _processes(several: bool) -> tuple[int, int]:
    """`(number of processes, number of this one)` if a batch is divided among `several`, else `(1, 0)`."""
    if several and dist.is_available() and dist.is_initialized():
        return dist.get_world_size(), dist.get_rank()
    return 1, 0
