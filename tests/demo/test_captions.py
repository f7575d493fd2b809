"""Captions of letters name only what their images show, and the tokenizer names what it cannot read."""

from __future__ import annotations

import re

import pytest
import torch
from open_clip import OPENAI_IMAGENET_TEMPLATES, SIMPLE_IMAGENET_TEMPLATES

from slora.demo.captions import STYLES, TEMPLATES, VOCABULARY, GlyphTokenizer, captions
from slora.demo.letters import CLASSES, FONTS, letters, styled_letters
from slora.errors import ConfigError

pytestmark = pytest.mark.once

TOKENIZE = GlyphTokenizer()


def test_styled_letters_are_the_letters_and_say_how_each_was_drawn() -> None:
    images, labels = letters(2, seed=3)
    styled = styled_letters(2, seed=3)
    assert torch.equal(styled.images, images)
    assert torch.equal(styled.labels, labels)
    assert {len(values) for values in (styled.fonts, *styled.draw.values())} == {104}


def test_letters_keep_to_the_fonts_asked_for() -> None:
    styled = styled_letters(3, seed=0, fonts=("cmr10", "DejaVuSans"))
    assert {FONTS[i] for i in styled.fonts.tolist()} == {"cmr10", "DejaVuSans"}


@pytest.mark.parametrize("fonts", [(), ("cmr10", "Comic")], ids=["none", "unknown"])
def test_fonts_that_are_not_there_are_named(fonts: tuple[str, ...]) -> None:
    with pytest.raises(ConfigError, match=re.escape(f"fonts={list(fonts)}")):
        styled_letters(1, seed=0, fonts=fonts)


def test_a_caption_is_true_of_the_images_of_its_letter_that_have_all_styles_in_its_words() -> None:
    styled = styled_letters(8, seed=5)
    written = captions(styled, 5, OPENAI_IMAGENET_TEMPLATES)
    assert any(name in text for text in written.texts for name in STYLES)
    expected = styled.labels[:, None] == styled.labels
    for j, text in enumerate(written.texts):
        rest = text.lower()
        # The longest first: "serif" is not said of a "sans serif" letter.
        for name in sorted(STYLES, key=len, reverse=True):
            if re.search(rf"\b{name}\b", rest):
                expected[:, j] &= STYLES[name](styled)
                rest = rest.replace(name, "")
    assert torch.equal(written.true, expected)
    assert written.true.diagonal().all()


def test_a_caption_names_its_letter_and_no_digit() -> None:
    styled = styled_letters(4, seed=6)
    for text, label in zip(captions(styled, 6).texts, styled.labels.tolist(), strict=True):
        words = re.findall("[A-Za-z]+", text)
        letter = CLASSES[label]
        assert letter in words or (letter.lower() in words and re.search("upper case|capital", text)), text
        assert not re.search("[0-9]", text)


def test_captions_repeat_for_a_seed_and_differ_between_seeds() -> None:
    styled = styled_letters(1, seed=0)
    assert captions(styled, 1).texts == captions(styled, 1).texts != captions(styled, 2).texts


def test_styles_show_in_the_pixels() -> None:
    styled = styled_letters(40, seed=8)
    images = styled.images.flatten(1)
    ink = images.mean(1)

    def mean(values: torch.Tensor, style: str) -> float:
        return values[STYLES[style](styled)].mean().item()

    assert mean(ink, "bold") > 1.1 * ink.mean()
    assert mean(images.amax(1), "dark") < mean(images.amax(1), "bright") - 0.1
    # The corners hold no ink, so they show the noise.
    corners = styled.images[:, 0, :2, :2].flatten(1).amax(1)
    assert mean(corners, "noisy") > mean(corners, "clean") + 0.02


def test_every_template_of_open_clip_and_every_digit_can_be_read() -> None:
    names = [*CLASSES, *"0123456789", "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    for template in (*OPENAI_IMAGENET_TEMPLATES, *SIMPLE_IMAGENET_TEMPLATES, *(t.format for t in TEMPLATES)):
        tokens = TOKENIZE([template(name) for name in names])
        assert tokens.shape == (len(names), 16)
        assert len(tokens.unique(dim=0)) == len(names)


def test_tokens_are_start_words_end_and_padding() -> None:
    (row,) = TOKENIZE("A photo of the letter a, bold.").tolist()
    words = [VOCABULARY[token] for token in row]
    assert words == ["<start>", "A", *"photo of the letter a bold".split(), "<end>"] + ["<pad>"] * 7
    assert max(row) == len(VOCABULARY) - 1 == VOCABULARY.index("<end>")
    assert len(set(VOCABULARY)) == len(VOCABULARY)


def test_the_case_of_letters_counts_and_that_of_words_does_not() -> None:
    same = TOKENIZE(["the Letter B", "THE letter B", "the letter b"])
    assert torch.equal(same[0], same[1])
    assert not torch.equal(same[0], same[2])


def test_numbers_are_read_digit_by_digit() -> None:
    assert torch.equal(*TOKENIZE(["digit 42", "digit 4 2"]))


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("a photo of an é", "the character 'é' of the caption 'a photo of an é'"),
        ("the letter 字", "the character '字'"),
        ("a photo of a leter a", "the word 'leter' .* use another (letter"),
        ("a " * 15, "has 15 words, but the glyph CLIP reads 14"),
    ],
    ids=["accent", "script", "word", "length"],
)
def test_what_cannot_be_read_is_named(text: str, named: str) -> None:
    with pytest.raises(ConfigError, match=named.replace("(", r"\(")):
        TOKENIZE([text])
