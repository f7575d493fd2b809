"""Models by name: `timm/NAME`, `open_clip/ARCH[:PRETRAINED]`, `demo/letters_vit`."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slora.errors import CheckpointError, ConfigError, MissingDependencyError
from slora.training.data import InputSpec

SOURCES = ("timm", "open_clip", "demo")
DEMO = "letters_vit"


class Built(NamedTuple):
    """A model with a classifier head, and the images it takes."""

    model: nn.Module
    input: InputSpec


class ClipClassifier(nn.Module):
    """The image tower of an open_clip model and a linear head on its embedding.

    Has timm's `forward_features` and `forward_head`, so that k-NN finds the embedding.
    """

    def __init__(self, visual: nn.Module, features: int, classes: int) -> None:
        super().__init__()
        self.visual = visual
        self.head = nn.Linear(features, classes)

    def forward_features(self, images: Tensor) -> Tensor:
        """Return the image embedding, `[n, features]`."""
        embedding: Tensor = self.visual(images)
        return embedding

    def forward_head(self, embedding: Tensor, pre_logits: bool = False) -> Tensor:
        """Return the logits `[n, classes]`, or with `pre_logits` what the head sees."""
        if pre_logits:
            return embedding
        logits: Tensor = self.head(embedding)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `[n, classes]`."""
        return self.forward_head(self.forward_features(images))


def check_name(name: str | None, pretrained: bool = False) -> tuple[str, str, str]:
    """Return `(source, architecture, tag)` of a model's name; early, before anything is loaded.

    Raises:
        ConfigError: the source, the architecture or the tag is unknown; near names are listed.
        MissingDependencyError: the package it comes from is not installed.
    """
    if not name:
        raise ConfigError(f"no model was named; use --model timm/NAME, open_clip/ARCH:PRETRAINED or demo/{DEMO}")
    source, _, rest = name.partition("/")
    if source not in SOURCES or not rest:
        raise ConfigError(
            f"model={name!r} does not say where it comes from; write timm/NAME, open_clip/ARCH:PRETRAINED "
            f"or demo/{DEMO}"
        )
    if source == "demo":
        _known("model", rest, [DEMO], prefix="demo/")
        return source, rest, ""
    if source == "timm":
        timm = _imported("timm")
        architecture, _, tag = rest.partition(".")
        if architecture.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
            return source, rest, ""
        _known("model", architecture, timm.list_models(), prefix="timm/")
        if tag:
            tags = [full.partition(".")[2] for full in timm.list_pretrained(architecture + ".*")]
            _known(f"pretrained tag of timm/{architecture}", tag, tags)
        return source, architecture, tag
    open_clip = _imported("open_clip")
    architecture, _, tag = rest.partition(":")
    _known("model", architecture, open_clip.list_models(), prefix="open_clip/")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag:
        _known(f"pretrained tag of open_clip/{architecture}", tag, tags)
    elif pretrained:
        some = ", ".join(f"open_clip/{architecture}:{each}" for each in tags[:5]) or "none is known for it"
        raise ConfigError(f"pretrained open_clip weights have a name; write one of {some}")
    return source, architecture, tag


def new_head(name: str, pretrained: bool, classes: int) -> bool:
    """Whether `build` puts a fresh head on pretrained features."""
    source, architecture, tag = check_name(name, pretrained)
    if source == "open_clip":
        return bool(tag)
    if not pretrained:
        return False
    if source == "demo":
        from slora.demo.letters import CLASSES

        return classes != len(CLASSES)
    config = _imported("timm").models.get_pretrained_cfg(f"{architecture}.{tag}" if tag else architecture)
    return config is None or config.num_classes != classes


def build(name: str, classes: int, pretrained: bool = False) -> Built:
    """Build a model with a head of `classes` outputs, on the CPU in fp32.

    Weights that are not pretrained, the head's among them, come from torch's global generator. An open_clip name
    with a tag is always pretrained.

    Raises:
        ConfigError: the name is unknown; near names are listed.
        CheckpointError: the pretrained weights could not be fetched or read.
        MissingDependencyError: the package it comes from is not installed.
    """
    source, architecture, tag = check_name(name, pretrained)
    if source == "demo":
        return _demo(classes, pretrained)
    if source == "timm":
        return _timm(f"{architecture}.{tag}" if tag else architecture, classes, pretrained)
    return _open_clip(architecture, tag, classes)


def _demo(classes: int, pretrained: bool) -> Built:
    from slora.demo.letters import IMAGE_SIZE
    from slora.demo.model import build as build_demo
    from slora.demo.model import load_pretrained

    model = load_pretrained(classes) if pretrained else build_demo(classes)
    return Built(model, InputSpec(1, IMAGE_SIZE, (0.0,), (1.0,), "bilinear"))


def _timm(name: str, classes: int, pretrained: bool) -> Built:
    timm = _imported("timm")
    try:
        model = timm.create_model(name, pretrained=pretrained, num_classes=classes)
    except Exception as error:
        if not pretrained:
            raise
        raise _not_fetched(f"timm/{name}", error) from error
    config = timm.data.resolve_model_data_config(model)
    channels, height, width = config["input_size"]
    spec = InputSpec(
        channels, max(height, width), tuple(config["mean"]), tuple(config["std"]), config["interpolation"],
        config["crop_pct"],
    )  # fmt: skip
    return Built(model, spec)


def _open_clip(architecture: str, tag: str, classes: int) -> Built:
    open_clip = _imported("open_clip")
    try:
        clip = open_clip.create_model(architecture, pretrained=tag or None)
    except Exception as error:
        if not tag:
            raise
        raise _not_fetched(f"open_clip/{architecture}:{tag}", error) from error
    visual = clip.visual
    size = visual.image_size[0] if isinstance(visual.image_size, (tuple, list)) else visual.image_size
    mean, std = (
        getattr(visual, attribute, None) or getattr(open_clip, constant)
        for attribute, constant in (("image_mean", "OPENAI_DATASET_MEAN"), ("image_std", "OPENAI_DATASET_STD"))
    )
    spec = InputSpec(3, size, tuple(mean), tuple(std))
    return Built(ClipClassifier(visual, _width(visual, size), classes), spec)


@torch.no_grad()
def _width(visual: Any, size: int) -> int:
    """The size of the image embedding; towers from timm do not say it themselves."""
    width = getattr(visual, "output_dim", None)
    if isinstance(width, int):
        return width
    was_training = visual.training
    embedding = visual.eval()(torch.zeros(1, 3, size, size))
    visual.train(was_training)
    return int(embedding.shape[-1])


def _imported(package: str) -> Any:
    import importlib

    try:
        return importlib.import_module(package)
    except (ImportError, RuntimeError) as error:
        raise MissingDependencyError(
            f'{package} cannot be imported ({str(error).strip().splitlines()[0]}); pip install "slora[train]"'
        ) from error


def _known(what: str, name: str, names: Iterable[str], prefix: str = "") -> None:
    known = list(names)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.5) or known[:5]
        listed = ", ".join(prefix + each for each in near) or "none"
        raise ConfigError(f"{what} {prefix + name!r} is unknown; near names are {listed}")


def _not_fetched(name: str, error: Exception) -> CheckpointError:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return CheckpointError(
        f"the pretrained weights of {name} could not be fetched or read ({reason}); check the network, or put them "
        f"into the hub's cache, or train without pretrained weights"
    )
