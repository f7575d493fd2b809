"""The tasks of the MiniLM example, built from small folders: what is a pair, and that no split knows another."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from examples.minilm import functions, words
from examples.minilm.functions import Pair, function_pairs, functions_in, split_of, summary
from examples.minilm.words import word_pairs, wordnet_folder
from slora.errors import MissingDependencyError

pytestmark = pytest.mark.once

SOURCE = '''
import os

class Tree:
    """A class is not a function."""

    @property
    def height(self) -> int:
        """Return the height of the tree.

        More about it.
        """
        # A comment.
        return max(child.height for child in self.children)

    def _hidden(self):
        """Return what nobody may see."""
        return 1

def join(first: str, *others: str, sep="/") -> str:
    """Join `first` and others by a separator. And a second sentence."""

    def one(text):
        """Return one of the texts."""
        return text

    return sep.join([first, *map(one, others)])

def short():
    """Too short."""
    return 0

def missing():
    """Raise an error in every case."""
    raise NotImplementedError
'''


def _library(folder: Path, modules: int) -> Path:
    """A library of modules with two functions each; one function is in all of them."""
    for number in range(modules):
        text = f'''
            def own_{number}(x):
                """Return the number {number} plus x."""
                return {number} + x

            def copied(x):
                """Return x without any change."""
                return x

            def renamed_{number}(x):
                """Return the result of this."""
                return {number} * x
        '''
        (folder / f"module_{number}.py").write_text(textwrap.dedent(text))
    return folder


def test_a_pair_is_the_first_sentence_and_the_source_without_it(tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(SOURCE)
    assert sorted(functions_in(tmp_path / "a.py")) == [
        Pair(
            "Join first and others by a separator.",
            "def join(first, *others, sep='/'):\n\n    def one(text):\n        return text\n"
            "    return sep.join([first, *map(one, others)])",
        ),
        Pair(
            "Return the height of the tree.",
            "def height(self):\n    return max((child.height for child in self.children))",
        ),
    ]


@pytest.mark.parametrize("text", ["def broken(:", "\x00", "x = '\\d'"])
def test_files_that_hold_no_function_give_none(text: str, tmp_path: Path) -> None:
    (tmp_path / "a.py").write_text(text)
    assert not list(functions_in(tmp_path / "a.py"))


@pytest.mark.parametrize(
    ("docstring", "expected"),
    [
        ("Return ``x``.\n\nMore.", "Return x."),
        ("One\n   line. Another.", "One line."),
        ("See :func:`f` for more", "See f for more"),
        ("", ""),
    ],
)
def test_a_summary_is_one_plain_sentence(docstring: str, expected: str) -> None:
    assert summary(docstring) == expected


def test_splits_share_no_module_no_query_and_no_document(tmp_path: Path) -> None:
    pairs = function_pairs({"lib": _library(tmp_path, 40)}, {"training": 99, "validation": 99, "test": 99})
    assert all(pairs.values())
    numbers = {
        split: {pair.document.split("own_")[1].split("(")[0] for pair in found if "own_" in pair.document}
        for split, found in pairs.items()
    }
    for split, found in numbers.items():
        assert {split_of(f"lib.module_{number}") for number in found} == {split}
    every = [text for found in pairs.values() for pair in found for text in pair]
    assert len(every) == len(set(every))
    # Of the copies one remains, and of the sentence with many answers as well.
    assert sum("copied" in text for text in every) == 1
    assert every.count("Return the result of this.") == 1


def test_the_same_files_give_the_same_pairs_up_to_the_counts(tmp_path: Path) -> None:
    library = {"lib": _library(tmp_path, 30)}
    first = function_pairs(library, {"training": 5, "test": 3})
    assert first == function_pairs(library, {"training": 5, "test": 3})
    assert {split: len(found) for split, found in first.items()} == {"training": 5, "test": 3}


def test_a_large_module_gives_few_functions_and_tests_none(tmp_path: Path) -> None:
    many = [f'def f_{i}(x):\n    """Return the number {i} times x."""\n    return {i} * x\n' for i in range(30)]
    for name in ("large.py", "tests/test_large.py"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text("\n".join(many))
    pairs = function_pairs({"lib": tmp_path}, {split_of("lib.large"): 100})
    assert [len(found) for found in pairs.values()] == [functions._PER_MODULE]


LINES = [
    "  1 This software and database is being provided to you",
    "00001740 03 n 01 entity 0 001 ~ 00001930 n 0000 | that which is known to exist  ",
    '00002 03 n 02 abstraction 0 abstract_entity 0 000 | a concept of examples; "he loved her only in the abstract"  ',
    "00003 03 n 01 entity 1 000 | another meaning of this word  ",
    "00004 03 n 01 short 0 000 | too short  ",
    "00005 03 n 0a a 0 b 0 c 0 d 0 e 0 f 0 g 0 h 0 i 0 j 1 000 | the first ten letters  ",
]


@pytest.fixture
def database(tmp_path: Path) -> Path:
    """A small database in WordNet's format."""
    (tmp_path / "data.noun").write_text("\n".join(LINES[:4]))
    (tmp_path / "data.verb").write_text("\n".join(LINES[4:]))
    return tmp_path


def test_a_gloss_without_examples_asks_for_all_words_of_its_meaning(database: Path) -> None:
    found = word_pairs(database, 10)
    assert Pair("a concept of examples", "abstraction, abstract entity") in found
    assert Pair("the first ten letters", "a, b, c, d, e, f, g, h, i, j") in found
    # Two meanings have the same word, of which one is asked for.
    assert sorted(pair.document for pair in found) == [
        "a, b, c, d, e, f, g, h, i, j",
        "abstraction, abstract entity",
        "entity",
    ]


def test_skipped_words_are_not_among_the_others(database: Path) -> None:
    assert word_pairs(database, 1) + word_pairs(database, 2, skip=1) == word_pairs(database, 3)


def test_a_missing_database_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(words.VARIABLE, str(tmp_path))
    with pytest.raises(MissingDependencyError, match=r"data.noun does not exist; install .* wordnet-base, or set WNSE"):
        wordnet_folder()


def test_a_missing_library_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(functions, "LIBRARIES", ("no_such_library",))
    with pytest.raises(MissingDependencyError, match="no_such_library is not installed"):
        functions.roots()
