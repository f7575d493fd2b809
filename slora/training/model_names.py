"""Names of models: `timm/NAME`, `open_clip/ARCH[:PRETRAINED]`, `demo/letters_vit`. Nothing here imports torch."""

from __future__ import annotations

import difflib
from collections.abc import Iterable

from slora.errors import ConfigError

SOURCES = ("timm", "open_clip", "demo")
DEMO = "letters_vit"


def source_of(name: str | None) -> tuple[str, str]:
    """Return `(source, the rest of the name)`, as far as the form of the name tells.

    Raises:
        ConfigError: the name has no known source, or the demo no such model; near names are listed.
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
        check_known("model", rest, [DEMO], prefix="demo/")
    return source, rest


def check_known(what: str, name: str, names: Iterable[str], prefix: str = "") -> None:
    """Refuse a name that is not among `names`.

    Raises:
        ConfigError: near names are listed.
    """
    known = list(names)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=5, cutoff=0.5) or known[:5]
        listed = ", ".join(prefix + each for each in near) or "none"
        raise ConfigError(f"{what} {prefix + name!r} is unknown; near names are {listed}")
