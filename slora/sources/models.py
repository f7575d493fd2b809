"""Models by name, `timm/NAME`, `open_clip/ARCH[:PRETRAINED]` and registered ones: `build`, `build_clip`."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from slora.clip import Clip, ClipClassifier
from slora.errors import CheckpointError, ConfigError
from slora.models.input_spec import InputSpec
from slora.sources.model_names import SOURCES, check_known, is_clip, require_clip, source_of
from slora.sources.optional import first_line, imported
from slora.sources.registry import CLIPS, MODELS


class Built(NamedTuple):
    """A model with a classifier head, and its input format."""

    model: nn.Module
    input: InputSpec


def check_name(name: str | None, pretrained: bool | str = False) -> tuple[str, str, str]:
    """Return `(source, architecture, weights)` of a model's name: an early check, before anything is loaded.

    `weights` is the pretrained tag, or for a CLIP a file of weights; empty if the name and `pretrained` give none.

    Raises:
        ConfigError: the source, the architecture or the tag is unknown; lists near names.
        MissingDependencyError: the package it comes from is not installed.
    """
    source, rest = source_of(name)
    given = pretrained if isinstance(pretrained, str) else ""
    if given and source != "open_clip" and name not in CLIPS:
        raise ConfigError(
            f"pretrained={given!r} names weights, which only a CLIP takes; {name} comes with weights of its own: use "
            f"pretrained=True (on the command line --pretrained alone)"
        )
    if source not in SOURCES:
        if given and not Path(given).is_file():
            raise ConfigError(f"pretrained={given!r} is not a file; give the weights of a {name}, or pretrained=True")
        return source, rest, given
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
    if tag and given not in ("", tag):
        raise ConfigError(f"model={name!r} and pretrained={given!r} name different weights; leave one of them out")
    weights = tag or given
    check_known("model", architecture, open_clip.list_models(), prefix="open_clip/")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if weights and not Path(weights).is_file():
        if "/" in weights:
            raise ConfigError(
                f"pretrained={weights!r} is neither a file nor a pretrained tag of open_clip/{architecture}; its tags "
                f"are {', '.join(tags[:5]) or 'none'}"
            )
        check_known(f"pretrained tag of open_clip/{architecture}", weights, tags)
    elif pretrained and not weights:
        some = ", ".join(f"open_clip/{architecture}:{each}" for each in tags[:5]) or "none is known for it"
        raise ConfigError(f"pretrained open_clip weights need a tag; write one of {some}")
    return source, architecture, weights


def new_head(name: str, pretrained: bool | str, classes: int) -> bool:
    """Whether `build` puts a new head on pretrained features."""
    source, architecture, weights = check_name(name, pretrained)
    if source == "open_clip":
        return bool(weights)
    if not pretrained:
        return False
    if name in CLIPS:
        return True
    if name in MODELS:
        return classes != MODELS[name].classes()
    config = imported("timm").models.get_pretrained_cfg(f"{architecture}.{weights}" if weights else architecture)
    return config is None or config.num_classes != classes


def build(
    name: str,
    classes: int,
    pretrained: bool | str = False,
    img_size: int | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> Built:
    """Build a model with a head of `classes` outputs, on the CPU in fp32.

    Weights that are not pretrained, such as those of a new head, come from torch's global generator. An open_clip name
    with a tag is always pretrained; a CLIP is its image tower with a new head.

    Args:
        pretrained: whether to load pretrained weights; for a CLIP also their tag or a file.
        img_size: side of the images in pixels; None for the model's default.
        model_args: more keyword arguments of `timm.create_model` or `open_clip.create_model`.

    Raises:
        ConfigError: the name is unknown (near names are listed), or the model does not take `img_size` or an entry
            of `model_args`; names it.
        CheckpointError: the pretrained weights could not be fetched or read.
        MissingDependencyError: the package it comes from is not installed.
    """
    _, architecture, tag = check_name(name, pretrained)
    if is_clip(name):
        clip = build_clip(name, pretrained, img_size, model_args)
        return Built(ClipClassifier.of(clip, classes), clip.input)
    model_args = dict(model_args or {})
    if name in MODELS:
        return MODELS[name].build(classes, bool(pretrained), img_size, model_args)
    return _timm(f"{architecture}.{tag}" if tag else architecture, classes, bool(pretrained), img_size, model_args)


def build_clip(
    name: str,
    pretrained: bool | str = False,
    img_size: int | None = None,
    model_args: Mapping[str, Any] | None = None,
) -> Clip:
    """Build both towers of a CLIP, `open_clip/ARCH[:PRETRAINED]` or a registered one, on the CPU in fp32.

    Args:
        pretrained: a pretrained tag of open_clip, or a file that `open_clip.create_model` loads, such as one written by
            `slora merge`; the name may hold it instead. True for the weights of a registered CLIP.
        img_size, model_args: see `build`.

    Raises:
        ConfigError: the name is unknown or not that of a CLIP, or see `build`.
        CheckpointError: the weights could not be fetched or read, or are of another architecture.
        MissingDependencyError: open_clip is not installed.
    """
    _, architecture, weights = check_name(name, pretrained)
    model_args = dict(model_args or {})
    require_clip(name)
    if name in CLIPS:
        return _registered_clip(name, pretrained, img_size, model_args)
    return _open_clip(architecture, weights, img_size, model_args)


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


def _open_clip(architecture: str, weights: str, img_size: int | None, model_args: Mapping[str, Any]) -> Clip:
    open_clip = imported("open_clip")
    name = f"open_clip/{architecture}:{weights}" if weights else f"open_clip/{architecture}"
    with _explaining(name, weights or False, img_size, model_args):
        clip = open_clip.create_model(architecture, pretrained=weights or None, force_image_size=img_size, **model_args)
        tokenizer = open_clip.get_tokenizer(architecture, context_length=getattr(clip, "context_length", None))
    visual = clip.visual
    size = visual.image_size[0] if isinstance(visual.image_size, (tuple, list)) else visual.image_size
    mean, std = (
        getattr(visual, attribute, None) or getattr(open_clip, constant)
        for attribute, constant in (("image_mean", "OPENAI_DATASET_MEAN"), ("image_std", "OPENAI_DATASET_STD"))
    )
    return Clip(clip, tokenizer, InputSpec(3, size, tuple(mean), tuple(std)))


def _registered_clip(name: str, pretrained: bool | str, img_size: int | None, model_args: Mapping[str, Any]) -> Clip:
    clip = CLIPS[name].build(pretrained is True, img_size, model_args)
    if isinstance(pretrained, str):
        with _explaining(name, pretrained, img_size, model_args):
            imported("open_clip").load_checkpoint(clip.model, pretrained)
    return clip


@contextlib.contextmanager
def _explaining(
    name: str, pretrained: bool | str, img_size: int | None, model_args: Mapping[str, Any]
) -> Iterator[None]:
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
        if isinstance(pretrained, str) and Path(pretrained).is_file():
            reason = " ".join(str(error).split())[:300] or reason
            raise CheckpointError(
                f"{pretrained} does not hold weights of {name.partition(':')[0]}"
                f"{f' with {arguments}' if arguments else ''} ({reason}); name the model that it was saved from"
            ) from error
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
