"""ImageNet-1k's classes: WordNet ids (wnids), names for prompts, the subsets of ImageNet-R and ImageNet-A.

A class is its number from 0 to 999, in the order of the wnids, which is that of every pretrained head. The lists are
those of timm and open_clip.
"""

from __future__ import annotations

import pkgutil
from collections.abc import Sequence
from functools import cache

from slora.errors import MissingDependencyError
from slora.sources.optional import imported


@cache
def wnids() -> tuple[str, ...]:
    """Return the 1000 wnids in order, such as `n01440764`."""
    return tuple(imported("timm.data").ImageNetInfo("imagenet-1k").label_names())


@cache
def class_names() -> tuple[str, ...]:
    """Return the 1000 names that CLIP's authors chose for prompts, such as `tench`."""
    return tuple(imported("open_clip").IMAGENET_CLASSNAMES)


@cache
def subset(name: str) -> tuple[int, ...]:
    """Return the 200 classes of `imagenet-r` or `imagenet-a`; all of them for other names.

    Raises:
        MissingDependencyError: this timm does not ship the list.
    """
    if name not in ("imagenet-r", "imagenet-a"):
        return tuple(range(1000))
    file = f"_info/{name.replace('-', '_')}_synsets.txt"
    imported("timm.data")
    try:
        content = pkgutil.get_data("timm.data", file)
    except OSError as error:
        raise MissingDependencyError(
            f"this timm has no {file}, the classes of {name}; pip install --upgrade timm"
        ) from error
    number = {wnid: i for i, wnid in enumerate(wnids())}
    return tuple(sorted(number[wnid] for wnid in (content or b"").decode().split()))


def outputs(data: str | None, classes: Sequence[str]) -> dict[int, int] | None:
    """Return `{ImageNet class: output}` of a head whose outputs are `classes`; None if they are not of ImageNet.

    Args:
        data: name of the data set; the classes of `imagenet` are ImageNet's, whatever they are called.
        classes: wnids, or the 1000 names in order.
    """
    if (data == "imagenet" and len(classes) == 1000) or tuple(classes) == class_names():
        return {i: i for i in range(1000)}
    number = {wnid: i for i, wnid in enumerate(wnids())}
    if not classes or any(name not in number for name in classes):
        return None
    return {number[name]: output for output, name in enumerate(classes)}


def prompt_names(data: str | None, classes: Sequence[str]) -> tuple[str, ...]:
    """Return the names of classes as they stand in a prompt: `class_names` for ImageNet's, else with spaces for `_`."""
    if data == "imagenet" and len(classes) == 1000:
        return class_names()
    number = {wnid: i for i, wnid in enumerate(wnids())}
    spaced = (" ".join(name.replace("_", " ").split()) for name in classes)
    return tuple(
        class_names()[number[name]] if name in number else plain for name, plain in zip(classes, spaced, strict=True)
    )
