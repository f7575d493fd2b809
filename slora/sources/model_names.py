"""Names of models: `timm/NAME`, `open_clip/ARCH[:PRETRAINED]` and registered ones. Nothing here imports torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from slora.errors import ConfigError
from slora.sources.registry import CLIPS, MODELS

SOURCES = ("timm", "open_clip")


def source_of(name: str | None) -> tuple[str, str]:
    """Return `(source, the rest of the name)`; only the names of registered models are checked completely.

    Raises:
        ConfigError: the source is unknown, or has no such registered model; lists near names.
    """
    forms = ["timm/NAME", "open_clip/ARCH:PRETRAINED", *MODELS]
    if not name:
        raise ConfigError(f"no model was named; use --model {_either(forms)}")
    source, _, rest = name.partition("/")
    registered = [each.partition("/")[2] for each in (*MODELS, *CLIPS) if each.startswith(source + "/")]
    if (source not in SOURCES and not registered) or not rest:
        raise ConfigError(f"model={name!r} does not say where it comes from; write {_either(forms)}")
    if registered:
        check_known("model", rest, registered, prefix=source + "/")
    return source, rest


def is_clip(name: str | None) -> bool:
    """Whether the model of this name has a text tower."""
    return name is not None and (name.startswith("open_clip/") or name in CLIPS)


def require_clip(name: str | None) -> None:
    """Refuse a model without a text tower.

    Raises:
        ConfigError: names it.
    """
    if not is_clip(name):
        known = " or ".join(["open_clip/ARCH:PRETRAINED", *CLIPS])
        raise ConfigError(f"model={name!r} has no text tower; use a CLIP, {known}, or head='linear'")


def _either(forms: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(forms[:-1]), forms[-1]]))


def check_known(what: str, name: str, names: Iterable[str], prefix: str = "") -> None:
    """Refuse a name that is not among `names`.

    Raises:
        ConfigError: the name is unknown; lists near names.
    """
    known = list(names)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.5) or known[:5]
        listed = ", ".join(prefix + each for each in near) or "none"
        raise ConfigError(f"{what} {prefix + name!r} is unknown; near names are {listed}")
