"""Captions of rendered letters: their grammar, which styles they name, and the tokenizer of the glyph CLIP.

A caption names a letter and up to two styles, and names only styles that the image was rendered with, so a caption
written for one image is also true of others. Half of the captions are open_clip's own 80 templates, so zero-shot
classifiers built from these work. No caption of a letter names a digit, but the vocabulary holds digits and their names
for fine-tuning.
"""

from __future__ import annotations

import difflib
import re
import string
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from slora.demo.letters import CLASSES, FONTS, Styled
from slora.errors import ConfigError

CONTEXT_LENGTH = 16

# The order fixes the rows of the shipped embedding: only append.
_WORDS = (
    "a an and art bad black blurry bold bright capital cartoon case clean close computer cool corrupted cropped dark "
    "digit dirty doodle drawing embroidered figure font game glyph good graffiti hand handwritten hard image in italic "
    "itap jpeg large left letter light low lower many monospaced my nice noisy number numeral of on one origami "
    "painting paper photo picture pixelated plastic plushie printed rendering rendition resolution right rotated sans "
    "scan sculpture see serif sharp sketch slanted small tattoo text the to toy typed up upper upright video weird "
    "white with writing written zero two three four five six seven eight nine"
).split()

# Of a single character the case counts: "A" is not "a". The article shares its token with the letter.
VOCABULARY = (
    "<pad>",
    "<start>",
    *_WORDS,
    *(letter for letter in string.ascii_letters if letter != "a"),
    *string.digits,
    # The last: open_clip's text tower pools at the largest token.
    "<end>",
)

_IDS = {word: i for i, word in enumerate(VOCABULARY)}
_PUNCTUATION = " \t\n.,:;!?'\"()-"
_PIECE = re.compile(r"[A-Za-z]+|[0-9]")

# The two names of each digit.
DIGITS = tuple(zip(string.digits, "zero one two three four five six seven eight nine".split(), strict=True))

# For zero-shot classifiers of letters and of digits.
TEMPLATES = ("a photo of a {}.", "a photo of the {}.", "an image of the {}.", "{}")


class GlyphTokenizer:
    """Converts captions to tokens, as open_clip's tokenizers do, with a vocabulary of words.

    Words of two letters or more are read without regard to case, numbers digit by digit, punctuation is ignored.
    """

    context_length = CONTEXT_LENGTH

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Return the tokens `[n, context_length]` int64: start, words, end, padding.

        Raises:
            ConfigError: a text has a character or word that the vocabulary lacks, or too many words; names it.
        """
        length = self.context_length if context_length is None else context_length
        texts = [texts] if isinstance(texts, str) else texts
        tokens = torch.full((len(texts), length), _IDS["<pad>"], dtype=torch.int64)
        for row, text in zip(tokens, texts, strict=True):
            found = [_IDS["<start>"], *_words(text), _IDS["<end>"]]
            if len(found) > length:
                raise ConfigError(
                    f"the caption {text!r} has {len(found) - 2} words, but the glyph CLIP reads {length - 2}; cut it"
                )
            row[: len(found)] = torch.tensor(found)
        return tokens


def _words(text: str) -> list[int]:
    for character in text:
        if character not in string.ascii_letters + string.digits + _PUNCTUATION:
            raise ConfigError(
                f"the character {character!r} of the caption {text!r} is not in the glyph CLIP's vocabulary; use "
                f"letters a to z, digits, spaces and punctuation"
            )
    found = []
    for piece in _PIECE.findall(text):
        word = piece if len(piece) == 1 else piece.lower()
        if word not in _IDS:
            near = ", ".join(difflib.get_close_matches(word, _WORDS)) or "see VOCABULARY in slora/demo/captions.py"
            raise ConfigError(
                f"the word {piece!r} of the caption {text!r} is not one of the glyph CLIP's {len(VOCABULARY)} tokens; "
                f"use another ({near})"
            )
        found.append(_IDS[word])
    return found


def _fonts(*parts: str) -> Callable[[Styled], Tensor]:
    named = torch.tensor([any(part in name for part in parts) for name in FONTS])
    return lambda styled: named[styled.fonts]


_MONOSPACED = _fonts("Mono", "cmtt")
_SANS = _fonts("DejaVuSans", "cmss")
_ITALIC = _fonts("Oblique", "Italic", "Ita", "cmti", "cmmi")


def _slant(styled: Styled) -> Tensor:
    # The italics lean by about 0.2 themselves.
    return 0.2 * _ITALIC(styled) + styled.draw["shear"]


# Each word or pair of words, and whether it is true of an image. The bounds leave out what the eye cannot tell.
STYLES: dict[str, Callable[[Styled], Tensor]] = {
    "bold": _fonts("Bold", "Bol", "cmb"),
    "italic": lambda s: _ITALIC(s) & (s.draw["shear"] > -0.05),
    "slanted": lambda s: _slant(s) > 0.15,
    "upright": lambda s: _slant(s).abs() < 0.05,
    "monospaced": _MONOSPACED,
    "sans serif": lambda s: _SANS(s) & ~_MONOSPACED(s),
    "serif": lambda s: ~_SANS(s) & ~_MONOSPACED(s),
    "rotated": lambda s: s.draw["rotation"].abs() > 0.1,
    "rotated left": lambda s: s.draw["rotation"] < -0.1,
    "rotated right": lambda s: s.draw["rotation"] > 0.1,
    "noisy": lambda s: s.draw["noise"] > 0.045,
    "dirty": lambda s: s.draw["noise"] > 0.045,
    "clean": lambda s: s.draw["noise"] < 0.02,
    "blurry": lambda s: s.draw["softness"] > 1.6,
    "sharp": lambda s: s.draw["softness"] < 1.0,
    "bright": lambda s: s.draw["brightness"] > 0.9,
    "dark": lambda s: s.draw["brightness"] < 0.7,
    "large": lambda s: s.draw["size"] > 15.2,
    "small": lambda s: s.draw["size"] < 13.3,
}
_STYLE_NAMES = tuple(STYLES)

_FRAMES = ("{}", "a photo of {}", "a picture of {}", "an image of {}", "a rendering of {}", "a drawing of {}")
_NOUNS = ("a{} letter {}", "the{} letter {}", "a{} {}", "the{} {}", "{} {}", "the{} glyph {}")
_UPPER = ("a{} upper case {}", "the{} upper case letter {}", "a{} capital {}", "the{} capital letter {}")
_LOWER = ("a{} lower case {}", "the{} lower case letter {}")
_BEGINNING = re.compile(r"(a|[a-z]{2,}) ")
_ARTICLE = re.compile(r"\ba (?=[aeiou][a-z])")
_CASED_SHARE, _OWN_LETTER_SHARE = 0.4, 0.5
MOST_STYLES = 2


class Captions(NamedTuple):
    """Captions, one for each image, and of which images each is true."""

    texts: list[str]
    true: Tensor
    """[n, n] bool: whether caption j is true of image i."""


def captions(styled: Styled, seed: int, templates: Sequence[Callable[[str], str]] = ()) -> Captions:
    """Write a caption for each image; half of them by one of `templates` whose styles it has, if there are any."""
    rng = np.random.default_rng((seed, 1))
    has = torch.stack([of(styled) for of in STYLES.values()], dim=1)
    stated = [(template, _named(template(""))) for template in templates]
    names: list[frozenset[int]] = []
    texts = []
    for label, row in zip(styled.labels.tolist(), has.tolist(), strict=True):
        styles = {i for i, on in enumerate(row) if on}
        fitting = [each for each in stated if each[1] <= styles] if rng.random() < 0.5 else []
        if fitting:
            template, named = fitting[rng.integers(len(fitting))]
            text = template(CLASSES[label])
        else:
            count = min(int(rng.integers(MOST_STYLES + 1)), len(styles))
            named = frozenset(rng.choice(sorted(styles), size=count, replace=False).tolist()) if count else frozenset()
            text = _sentence(CLASSES[label], [_STYLE_NAMES[i] for i in named], rng)
        # As a sentence begins, but never a letter that is named.
        texts.append(text[0].upper() + text[1:] if _BEGINNING.match(text) and rng.random() < 0.1 else text)
        names.append(named)
    required = torch.zeros_like(has)
    for each, named in zip(required, names, strict=True):
        each[list(named)] = True
    # Caption j is true of image i if none of the styles it requires is missing.
    missing = (~has).float() @ required.float().T
    return Captions(texts, (missing == 0) & (styled.labels[:, None] == styled.labels))


def _named(text: str) -> frozenset[int]:
    words = set(_PIECE.findall(text))
    return frozenset(i for i, name in enumerate(_STYLE_NAMES) if name in words)


def _sentence(letter: str, styles: list[str], rng: np.random.Generator) -> str:
    nouns: Sequence[str] = _NOUNS
    if rng.random() < _CASED_SHARE:
        nouns = _UPPER if letter.isupper() else _LOWER
        # The words say the case, so the letter need not: "an upper case a".
        letter = letter if rng.random() < _OWN_LETTER_SHARE else letter.lower()
    before = rng.random() < 0.5
    noun = nouns[int(rng.integers(len(nouns)))]
    phrase = noun.format("".join(f" {style}" for style in styles) if before else "", letter).strip()
    if styles and not before:
        phrase = f"{phrase}, {' and '.join(styles)}"
    return _FRAMES[int(rng.integers(len(_FRAMES)))].format(_ARTICLE.sub("an ", phrase))
