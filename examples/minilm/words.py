"""The old task: find a word by its meaning, with the glosses of WordNet 3.0."""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

from examples.minilm.functions import Pair
from slora.errors import MissingDependencyError

# As WordNet's own programs do.
VARIABLE, DEFAULT = "WNSEARCHDIR", "/usr/share/wordnet"
FILES = ("data.noun", "data.verb")


def wordnet_folder() -> Path:
    """Return the folder of WordNet's database.

    Raises:
        MissingDependencyError: it is not there.
    """
    folder = Path(os.environ.get(VARIABLE, DEFAULT))
    missing = [name for name in FILES if not (folder / name).is_file()]
    if missing:
        raise MissingDependencyError(
            f"WordNet's file {folder / missing[0]} does not exist; install Debian's package wordnet-base, or set "
            f"{VARIABLE} to the folder of the database"
        )
    return folder


def word_pairs(folder: Path, count: int, skip: int = 0) -> list[Pair]:
    """Return `count` pairs of a gloss, without its examples, and the words with that meaning, separated by commas.

    Their order is that of a hash; the first `skip` are left out. No gloss and no list of words occurs twice.

    Args:
        folder: with the files `data.noun` and `data.verb` (format: wndb(5WN)).
    """
    lines = [line for name in FILES for line in (folder / name).read_text(encoding="utf-8").splitlines()]
    # The licence at the top is indented.
    synsets = [line for line in lines if not line.startswith(" ")]
    pairs: list[Pair] = []
    seen: set[str] = set()
    for line in sorted(synsets, key=lambda line: hashlib.sha256(line.encode()).digest()):
        fields, gloss = line.split(" | ", 1)
        _, _, _, number, *rest = fields.split(" ")
        # Word and sense number alternate; the count is hexadecimal.
        words = ", ".join(rest[2 * i].replace("_", " ") for i in range(int(number, 16)))
        meaning = gloss.split('; "', 1)[0].strip()
        if len(meaning.split()) < 3 or {meaning, words} & seen:
            continue
        seen |= {meaning, words}
        pairs.append(Pair(meaning, words))
        if len(pairs) == skip + count:
            break
    return pairs[skip:]
