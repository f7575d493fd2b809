"""`build`: models by name, `timm/NAME`, `open_clip/ARCH[:PRETRAINED]` and registered ones."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from slora.errors import CheckpointError, ConfigError
from slora.sources.data import InputSpec
from slora.sources.model_names import SOURCES, check_known, source_of
from slora.sources.optional import first_line, imported
from slora.sources.registry import MODELS


class Built(NamedTuple):
    """A model with a classifier head, and its input format."""

    model: nn.Module
    input: InputSpec


class ClipClassifier(nn.Module):
    """The image tower of an open_clip model and a linear head on its embedding.

    Has timm's `forward_features` and `forward_head`, from which k-NN gets the embedding.
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
        """Return the logits `[n, classes]`, or with `pre_logits` the input of the head."""
        if pre_logits:
            return embedding
        logits: Tensor = self.head(embedding)
        return logits

    def forward(self, images: Tensor) -> Tensor:
        """Return the logits `[n, classes]`."""
        return self.forward_head(self.forward_features(images))


def check_name(name: str | None, pretrained: bool = False) -> tuple[str, str, str]:
    """Return `(source, architecture, tag)` of a model's name: an early check, before anything is loaded.

    Raises:
        ConfigError: the source, the architecture or the tag is unknown; lists near names.
        MissingDependencyError: the package it comes from is not installed.
    """
    source, rest = source_of(name)
    if source not in SOURCES:
        return source, rest, ""
    if source == "timm":
        timm = imported("timm")
        architecture, _, tag = rest.partition(".")
        if architecture.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
            return source, rest, ""
        check_known("model", architecture, timm.list_models(), prefix="timm/")
        if tag:
            tags = [full.partition(".")[2] for full in timm.list_pretrained(architecture + ".*")]
            check_known(f"pretrained tag of timm/{architecture}", tag, tags)
        return source, architecture, tag
    open_clip = imported("open_clip")
    architecture, _, tag = rest.partition(":")
    check_known("model", architecture, open_clip.list_models(), prefix="open_clip/")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if tag:
        check_known(f"pretrained tag of open_clip/{architecture}", tag, tags)
    elif pretrained:
        some = ", ".join(f"open_clip/{architecture}:{each}" for each in tags[:5]) or "none is known for it"
        raise ConfigError(f"pretrained open_clip weights need a tag; write one of {some}")
    return source, architecture, tag


def new_head(name: str, pretrained: bool, classes: int) -> bool:
    """Whether `build` puts a new head on pretrained features."""
    source, architecture, tag = check_name(name, pretrained)
    if source == "open_clip":
        return bool(tag)
    if not pretrained:
        return False
    if name in MODELS:
        return classes != MODELS[name].classes()
    config = imported("timm").models.get_pretrained_cfg(f"{architecture}.{tag}" if tag else architecture)
    return config is None or config.num_classes != classes


def build(
    name: str,
    classes: int,
    pretrained: bool = False,
    img_size: int | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> Built:
    """Build a model with a head of `classes` outputs, on the CPU in fp32.

    Weights that are not pretrained, such as those of a new head, come from torch's global generator. An open_clip name
    with a tag is always pretrained.

    Args:
        img_size: side of the images in pixels; None for the model's default.
        model_args: more keyword arguments of `timm.create_model` or `open_clip.create_model`.

    Raises:
        ConfigError: the name is unknown (near names are listed), or the model does not take `img_size` or an entry
            of `model_args`; names it.
        CheckpointError: the pretrained weights could not be fetched or read.
        MissingDependencyError: the package it comes from is not installed.
    """
    source, architecture, tag = check_name(name, pretrained)
    model_args = dict(model_args or {})
    if name in MODELS:
        return MODELS[name].build(classes, pretrained, img_size, model_args)
    if source == "timm":
        return _timm(f"{architecture}.{tag}" if tag else architecture, classes, pretrained, img_size, model_args)
    return _open_clip(architecture, tag, classes, img_size, model_args)


def _timm(name: str, classes: int, pretrained: bool, img_size: int | None, model_args: dict[str, Any]) -> Built:
    timm = imported("timm")
    channels = model_args.get("in_chans")
    if channels not in (None, 1, 3):
        raise ConfigError(f"model_args holds in_chans={channels!r}, but images have 1 or 3 channels; use one of these")

    def create(**size: int) -> Any:
        return timm.create_model(name, pretrained=pretrained, num_classes=classes, **size, **model_args)

    with _explaining(f"timm/{name}", pretrained, img_size, model_args):
        try:
            model = create() if img_size is None else create(img_size=img_size)
        except TypeError as error:
            if img_size is None or _unexpected(error) != "img_size":
                raise
            # Models for any image size, such as ResNets, do not have the argument.
            model = create()
    config = timm.data.resolve_model_data_config(model)
    default, height, width = config["input_size"]
    channels = channels or default
    mean, std = (_per_channel(config[key], channels) for key in ("mean", "std"))
    size = img_size or max(height, width)
    return Built(model, InputSpec(channels, size, mean, std, config["interpolation"], config["crop_pct"]))


def _per_channel(values: Sequence[float], channels: int) -> tuple[float, ...]:
    return tuple(values) if len(values) == channels else (sum(values) / len(values),) * channels


def _open_clip(architecture: str, tag: str, classes: int, img_size: int | None, model_args: Mapping[str, Any]) -> Built:
    open_clip = imported("open_clip")
    name = f"open_clip/{architecture}:{tag}" if tag else f"open_clip/{architecture}"
    with _explaining(name, bool(tag), img_size, model_args):
        clip = open_clip.create_model(architecture, pretrained=tag or None, force_image_size=img_size, **model_args)
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
    """The size of the image embedding, by a forward pass if the tower does not state it, as those from timm."""
    width = getattr(visual, "output_dim", None)
    if isinstance(width, int):
        return width
    was_training = visual.training
    embedding = visual.eval()(torch.zeros(1, 3, size, size))
    visual.train(was_training)
    return int(embedding.shape[-1])


@contextlib.contextmanager
def _explaining(name: str, pretrained: bool, img_size: int | None, model_args: Mapping[str, Any]) -> Iterator[None]:
    """Turn errors inside into ones that name `img_size`, `model_args` or the pretrained weights as the cause."""
    try:
        yield
    except Exception as error:
        arguments = arguments_text(img_size, model_args)
        key = _unexpected(error)
        if key in model_args:
            raise ConfigError(
                f"model_args holds {key!r}, which {name} does not take; use arguments of that model, or remove it"
            ) from error
        reason = first_line(error)
        if arguments and not pretrained:
            raise ConfigError(f"{name} cannot be built with {arguments} ({reason}); use other values") from error
        if arguments and "state_dict" in reason:
            raise ConfigError(
                f"the pretrained weights of {name} do not fit it with {arguments}; remove these, or train without "
                f"pretrained weights"
            ) from error
        if not pretrained:
            raise
        raise _not_fetched(name, reason) from error


def arguments_text(img_size: int | None, model_args: Mapping[str, Any]) -> str:
    """Return the arguments of a model as text, such as "img_size=32, depth=3"; empty if there are none."""
    size = {} if img_size is None else {"img_size": img_size}
    return ", ".join(f"{key}={value!r}" for key, value in {**size, **model_args}.items())


def _unexpected(error: Exception) -> str | None:
    """The unexpected keyword argument that a `TypeError` names."""
    found = re.search(r"unexpected keyword argument '(\w+)'", str(error)) if isinstance(error, TypeError) else None
    return found[1] if found else None


def _not_fetched(name: str, reason: str) -> CheckpointError:
    return CheckpointError(
        f"the pretrained weights of {name} could not be fetched or read ({reason}); check the network, or put them "
        f"into the cache of the hub, or train without pretrained weights"
    )
