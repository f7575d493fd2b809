"""The methods that the demo compares on the glyph CLIP, and one training run of each.

The image tower learns handwritten digits with the text tower on prompts of the digits as its head; retention is the
zero-shot accuracy on letters, in fonts that pretraining never saw.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import slora
from slora.clip import Clip, PromptedClip
from slora.clip.prompts import Prompts
from slora.demo import digits
from slora.demo.glyph_clip import HELD_OUT_FONTS, TRAINING_FONTS
from slora.demo.letters import CLASSES, styled_letters
from slora.demo.methods import BUDGET, COMMON, SMOOTHING, active_parameters, updates_scaled
from slora.demo.registration import CLIP
from slora.demo.shifts import Pair, task
from slora.layers import adapted_layers
from slora.sources.models import build_clip
from slora.training import TrainSettings, prepare, train

# Settings of all methods. A zero-shot head is not new, so no method trains it first.
CLIP_COMMON: dict[str, Any] = COMMON | {"head": "zero-shot", "tower": "image", "max_steps": 100, "head_first": 0}
CLIP_QUICK: dict[str, Any] = {"max_steps": 6, "log_every": 2}


@dataclass(frozen=True)
class ClipMethod:
    """A compared method.

    Attributes:
        own: settings beside `CLIP_COMMON`.
        retain: whether embeddings of 64 unlabelled letters are distilled.
    """

    label: str
    own: dict[str, Any]
    retain: bool = False


# Learning rates were chosen on training images that no run trains on, with other letters and one seed that the demo
# does not use: 5e-3 or 1e-2 for all blocks, 1e-2 or 2e-2 for four. Ranks and schedules are those of `METHODS`.
_ALL = {"method": "lora", "lr": 5e-3, "r": 8, "lora_alpha": 8}
_FOUR = {"r": 16, "lora_alpha": 16, "lr": 1e-2, "lr_hold": 0.4, "budget": BUDGET}

CLIP_METHODS: dict[str, ClipMethod] = {
    "lora": ClipMethod("LoRA on all", _ALL),
    "distilled": ClipMethod("LoRA on all + distillation", {**_ALL, "lr": 1e-2}, retain=True),
    "last": ClipMethod("last 4", {**_FOUR, "strategy": "last"}),
    "selective": ClipMethod("selective 4", _FOUR),
    "selective-distilled": ClipMethod("selective 4 + distillation", {**_FOUR, "lr": 2e-2}, retain=True),
}

# The update of this one is also evaluated scaled (WiSE-FT, arXiv 2109.01903): the frontier that others should beat.
CLIP_SCALED = "lora"

# (images per class, seed) of letters that are classified, and of those for distillation.
QUERIES, VALIDATION_QUERIES, QUICK_QUERIES, RETAINED = (20, 107), (20, 108), (2, 107), (2, 109)
RETAINED_COUNT = 64


@dataclass(frozen=True)
class ClipSource:
    """The letters with their classifier, and the zero-shot accuracy of the pretrained CLIP.

    Attributes:
        weights: [52, 64], the class embeddings.
        retained: [64, 3, 16, 16], unlabelled letters in the fonts of the pretraining.
        letters: accuracy on letters, 0 to 1.
    """

    queries: Pair
    weights: Tensor
    retained: Tensor
    letters: float


def pretrained() -> Clip:
    """Return the pretrained glyph CLIP."""
    return build_clip(CLIP, pretrained=True)


def clip_source(quick: bool = False, validation: bool = False) -> ClipSource:
    """Render the letters and classify them by zero-shot with the pretrained CLIP.

    Args:
        validation: other renderings, for choosing settings.
    """
    clip = pretrained()
    count, seed = QUICK_QUERIES if quick else VALIDATION_QUERIES if validation else QUERIES
    styled = styled_letters(count, seed, HELD_OUT_FONTS)
    queries = styled.images.expand(-1, 3, -1, -1), styled.labels
    retained = styled_letters(*RETAINED, TRAINING_FONTS).images[:RETAINED_COUNT].expand(-1, 3, -1, -1)
    weights = PromptedClip(clip, Prompts(CLASSES, clip.templates), False, False).class_embeddings()
    found = ClipSource(queries, weights, retained, 0.0)
    return ClipSource(queries, weights, retained, letter_accuracy(clip.model, found))


def letter_accuracy(model: nn.Module, source: ClipSource) -> float:
    """Return the zero-shot accuracy of a CLIP's image tower on the letters, 0 to 1."""
    images, labels = source.queries
    return (_embeddings(model, images) @ source.weights.T).argmax(1).eq(labels).double().mean().item()


@torch.no_grad()
def _embeddings(model: Any, images: Tensor) -> Tensor:
    model.eval()
    return torch.cat([model.encode_image(part, normalize=True) for part in images.split(512)])


def digit_model() -> PromptedClip:
    """Return the pretrained CLIP with prompts of the ten digits."""
    clip = pretrained()
    return PromptedClip(clip, Prompts(digits.CLASSES, clip.templates), trains_text=False, contrastive=False)


def digits_before(shift: str = "digits") -> float:
    """Return the zero-shot accuracy of the pretrained CLIP on the test images of a shift, 0 to 1."""
    return _on_target(digit_model(), task(shift, 0)[1])["accuracy"]


def clip_settings(own: dict[str, Any], seed: int = 0, quick: bool = False) -> TrainSettings:
    """Return the settings of one run: `own` beside `CLIP_COMMON`."""
    fixed = {"seed": seed, "count_flops": seed == 0}
    return TrainSettings.from_dict(CLIP_COMMON | own | (CLIP_QUICK if quick else {}) | fixed)


def run_clip_method(
    method: str,
    seed: int,
    source: ClipSource,
    quick: bool = False,
    scales: Sequence[float] = (),
    validation: bool = False,
) -> dict[str, Any]:
    """Train once by one of `CLIP_METHODS` and return the run's entry of `demo.json`; see `glyph_clip_run`."""
    chosen = CLIP_METHODS[method]
    settings = clip_settings(chosen.own, seed, quick)
    retain = source.retained if chosen.retain else None
    entry = glyph_clip_run(settings, source, retain=retain, scales=scales, validation=validation)
    return {"method": method, "seed": seed, **entry}


def glyph_clip_run(
    settings: TrainSettings,
    source: ClipSource,
    shift: str = "digits",
    *,
    retain: Tensor | None = None,
    scales: Sequence[float] = (),
    validation: bool = False,
) -> dict[str, Any]:
    """Train the image tower of the glyph CLIP once on digits and return what `slora.demo.methods.train_once` does.

    `accuracy` (0 to 1) and `nll` (nats, labels smoothed as in training) are on the target's test images with the
    zero-shot head; `zero_shot` is the points of accuracy lost on letters; `drift` the relative squared change of the
    embeddings of the letters. `kept`, `flops`, `seconds`, `block_map`, `scaled` as there.

    Args:
        settings: from `clip_settings`; its seed also orders the training images.
        shift: one of `slora.demo.shifts.SHIFTS`.
        retain: images [n, 3, 16, 16] whose embeddings are distilled, such as `source.retained`.
        scales: factors of the update at which it is evaluated again.
        validation: evaluate on training images that the run does not use, for choosing settings.
    """
    training, test = task(shift, settings.seed, validation)
    torch.manual_seed(settings.seed)
    model = digit_model()
    before = _embeddings(model.clip, source.queries[0])
    prepare(model, settings=settings)
    images = training[0].expand(-1, 3, -1, -1)
    start = time.process_time()
    outcome = train(model, TensorDataset(images, training[1]), None, settings, retain=retain)
    cpu_seconds = time.process_time() - start
    live = {name: on.tolist() for name, on in slora.active_blocks(model).items()}
    entry: dict[str, Any] = {
        "shift": shift,
        **_judged(model, test, source, before),
        "active": sum(map(sum, live.values())),
        "blocks": sum(map(len, live.values())),
        "ranks": sum(sum(layer.block_ranks()) for _, layer in adapted_layers(model)),
        # With logit_scale.
        "kept": 1 + active_parameters(model),
        "flops": outcome.flops or None,
        "seconds": outcome.seconds,
        "cpu_seconds": cpu_seconds,
        "block_map": live,
    }
    entry["scaled"] = [{"scale": scale, **_judged(model, test, source, before, scale)} for scale in scales]
    return entry


def _judged(
    model: PromptedClip, test: Pair, source: ClipSource, before: Tensor, scale: float = 1.0
) -> dict[str, float]:
    with updates_scaled(model, scale):
        after = _embeddings(model.clip, source.queries[0])
        found = (after @ source.weights.T).argmax(1).eq(source.queries[1]).double().mean().item()
        return {
            **_on_target(model, test),
            "zero_shot": 100 * (source.letters - found),
            "drift": (
                (after - before).square().sum(1).mean() / (before - before.mean(0)).square().sum(1).mean()
            ).item(),
        }


@torch.no_grad()
def _on_target(model: PromptedClip, test: Pair) -> dict[str, float]:
    model.eval()
    logits = cast(Tensor, model(test[0].expand(-1, 3, -1, -1)))
    return {
        "accuracy": (logits.argmax(1) == test[1]).double().mean().item(),
        "nll": F.cross_entropy(logits, test[1], label_smoothing=SMOOTHING).item(),
    }
