"""Which architectures there are, and how timm's and torchvision's are built: random weights, small images.

Of a timm family the model with the fewest parameters is taken, of those with a linear layer to adapt if there are any,
and cut to two blocks where it takes a `depth`.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import nn

from benchmarks.compatibility import clip_models, transformers_models
from benchmarks.compatibility.subject import BATCH, Skip, Subject, linear_layers, parameter_count, require_small

# What the smallest model of a large family is not called.
LARGE = re.compile("base|large|huge|giant|gigantic|enormous|so[0-9]*m")
MANY = 10
SIZES = (64, 112, 128, 224, None)  # None: what the model is made for
TORCHVISION = ("vit_b_16", "swin_t", "swin_v2_t", "maxvit_t")


def architectures() -> dict[str, list[str]]:
    """The families of each library."""
    import timm

    return {
        "timm": timm.list_modules(),
        "open_clip": clip_models.families(),
        "torchvision": list(TORCHVISION),
        "transformers": list(transformers_models.FAMILIES),
    }


def build(library: str, family: str) -> Subject:
    """Build a small model of a family.

    Raises:
        Skip: it has more parameters than are tried.
    """
    builders: dict[str, Callable[[str], Subject]] = {
        "timm": _timm, "torchvision": _torchvision, "open_clip": clip_models.build,
        "transformers": transformers_models.build,
    }  # fmt: skip
    torch.manual_seed(0)
    # What a model leaves unwritten is NaN then, which the examination can tell.
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        subject = builders[library](family)
    finally:
        torch.use_deterministic_algorithms(False)
    require_small(subject.name, subject.model)
    return subject


def _timm(family: str) -> Subject:
    import timm

    names = timm.list_models(module=family)
    few = [name for name in names if not LARGE.search(name)] if len(names) > MANY else names
    found: dict[str, nn.Module] = {}
    for name in few or names:
        with torch.device("meta"), contextlib.suppress(Exception):
            found[name] = timm.create_model(name)
    name = min(found, key=lambda name: (not linear_layers(found[name]), parameter_count(found[name])))
    # Where there is nothing to adapt, nothing has to be computed.
    return _first_that_runs(name, list(_timm_ways(name))) if linear_layers(found[name]) else Subject(name, found[name])


def _timm_ways(name: str) -> Iterator[tuple[Callable[[], nn.Module], int]]:
    """Ways to build a model, the cheapest first, each with the side of its images."""
    import timm

    default = timm.get_pretrained_cfg(name)
    side = default.input_size[-1] if default else 224
    for size in SIZES:
        for depth in ({"depth": 2}, {}):
            for options in ({"img_size": size}, {}) if size else ({},):
                kwargs: dict[str, Any] = {**options, **depth}
                yield partial(timm.create_model, name, **kwargs), size or side


def _torchvision(name: str) -> Subject:
    import torchvision

    side = {"maxvit_t": 224}.get(name, 64)
    small = {"image_size": side} if name == "vit_b_16" else {}
    return Subject(name, getattr(torchvision.models, name)(**small), (torch.randn(BATCH, 3, side, side),))


def _first_that_runs(name: str, ways: list[tuple[Callable[[], nn.Module], int]]) -> Subject:
    """The first way whose model takes an image; the error of the last where none does."""
    error: Exception = Skip("there is no way to build it")
    for make, side in ways:
        try:
            with torch.device("meta"):
                require_small(name, make())
            torch.manual_seed(0)
            subject = Subject(name, make(), (torch.randn(BATCH, 3, side, side),))
            subject.outputs(subject.model.train())
            return subject
        except Exception as reason:
            error = reason
    raise error
