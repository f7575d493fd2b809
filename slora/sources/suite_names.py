"""Names of evaluation sets; the suites on ImageNet's classes and their usual layouts. Nothing here imports torch."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import NamedTuple

from slora.errors import ConfigError, DataError
from slora.sources.data_names import check_name


class Layout(NamedTuple):
    """Where the images of a suite are."""

    folders: tuple[str, ...]
    """Names of its folder below the root; case, hyphens, underscores and dots do not count."""
    inside: tuple[str, ...]
    """Where in that folder the class folders may be; the last for messages."""
    classes: str
    """What they are called, for messages."""
    origin: str
    """How to get it, for messages."""


_ALL = "1000 wnid folders such as n01440764"
SUITES = {
    "imagenet": Layout(
        ("imagenet", "imagenet1k", "ilsvrc2012", "ilsvrc"),
        (".", "ILSVRC/Data/CLS-LOC/val", "Data/CLS-LOC/val", "val_in_folder", "validation", "val"),
        _ALL,
        "ILSVRC2012_img_val.tar of image-net.org, sorted into folders by torchvision.datasets.ImageNet(FOLDER, 'val')",
    ),
    "imagenetv2": Layout(
        ("imagenetv2", "imagenetv2matchedfrequency", "imagenetv2matchedfrequencyformatval"),
        ("imagenetv2-matched-frequency-format-val", "imagenetv2-matched-frequency", "."),
        "1000 folders from 0 to 999",
        "imagenetv2-matched-frequency.tar.gz of github.com/modestyachts/ImageNetV2",
    ),
    "imagenet-r": Layout(
        ("imagenetr", "imagenetrendition"),
        ("imagenet-r", "."),
        "200 wnid folders such as n01443537",
        "imagenet-r.tar of github.com/hendrycks/imagenet-r",
    ),
    "imagenet-a": Layout(
        ("imageneta",),
        ("imagenet-a", "."),
        "200 wnid folders such as n01498041",
        "imagenet-a.tar of github.com/hendrycks/natural-adv-examples",
    ),
    "imagenet-sketch": Layout(
        ("imagenetsketch", "sketch"),
        ("sketch", "imagenet-sketch", "."),
        _ALL,
        "ImageNet-Sketch of github.com/HaohanWang/ImageNet-Sketch",
    ),
    "objectnet": Layout(
        ("objectnet", "objectnet10", "objectnet10beta"),
        ("objectnet-1.0/images", "images"),
        "313 named folders such as air_freshener, beside the folder mappings",
        "objectnet-1.0.zip of objectnet.dev",
    ),
}


def check_suites(text: str) -> dict[str, Path | None]:
    """Return `{suite: its folder, or None to look for it}` of a list such as "imagenet,imagenet-r=/data/r".

    Raises:
        ConfigError: a name is unknown (near names are listed) or stands there twice.
    """
    found: dict[str, Path | None] = {}
    known = {_plain(name): name for name in SUITES}
    for entry in filter(None, (part.strip() for part in text.split(","))):
        name, _, path = entry.partition("=")
        plain = _plain(name)
        if plain not in known:
            near = difflib.get_close_matches(plain, known, n=3) or list(known)
            raise ConfigError(
                f"test set {name!r} is unknown; near names are {', '.join(known[each] for each in near)}. Other image "
                f"folders are evaluated with --zero-shot FOLDER"
            )
        if known[plain] in found:
            raise ConfigError(f"test set {known[plain]!r} is listed twice; leave one out")
        found[known[plain]] = Path(path).expanduser() if path else None
    if not found:
        raise ConfigError(f"no test set was named; use some of {', '.join(SUITES)}")
    return found


def find_suite(name: str, root: Path, folder: Path | None = None) -> Path:
    """Return the folder of a suite that holds its class folders.

    Args:
        root: where the folders of suites are.
        folder: that of this suite, if it is known.

    Raises:
        DataError: it is missing; says what is expected where, and how to get it.
    """
    layout = SUITES[name]
    if folder is None:
        inside = [path for path in sorted(root.iterdir()) if path.is_dir()] if root.is_dir() else []
        candidates = [path for each in layout.folders for path in inside if _plain(path.name) == each]
    else:
        candidates = [folder]
    for candidate in candidates:
        for place in layout.inside:
            if class_folders(candidate / place) and (name != "imagenet" or _is_wnid(candidate / place)):
                return candidate / place
    # The archive of ObjectNet is the only one that has another name than its suite.
    where = candidates[0] if candidates else root / ("objectnet-1.0" if name == "objectnet" else name)
    state = "holds no class folders" if candidates and where.is_dir() else "does not exist"
    raise DataError(
        f"{name}: {where} {state}; expected {layout.classes}, each with images, in {where / layout.inside[-1]}. It "
        f"comes from {layout.origin}. If it is elsewhere: --eval {name}=FOLDER"
    )


def class_folders(folder: Path) -> list[str]:
    """Return the names of the folders in `folder`, sorted, without hidden ones; none if it does not exist."""
    if not folder.is_dir():
        return []
    return sorted(path.name for path in folder.iterdir() if path.is_dir() and not path.name.startswith("."))


def check_eval_set(name: str) -> None:
    """Check the name of an evaluation set as far as possible without torch.

    Raises:
        ConfigError: it is neither a folder nor the name of a data set.
    """
    if not Path(name).expanduser().is_dir() and "/" not in name:
        check_name(name)
    elif not Path(name).expanduser().is_dir():
        raise ConfigError(f"{name} is not a folder; expected {name}/CLASS/IMAGE.jpg")


def _is_wnid(folder: Path) -> bool:
    # train/ and val/ are no classes.
    return any(name[:1] == "n" and name[1:].isdecimal() for name in class_folders(folder))


def _plain(name: str) -> str:
    return "".join(letter for letter in name.lower() if letter.isalnum())
