"""Names of classes and templates, from open_clip or from files."""

from __future__ import annotations

from pathlib import Path

import pytest

from slora import ConfigError
from slora.clip.prompts import Prompts, names_of_file, refuse_ids, templates

pytestmark = pytest.mark.once


def test_templates_of_open_clip_are_texts_with_one_place_for_the_name() -> None:
    import open_clip

    found = templates(None)
    assert [each.format("cat") for each in found] == [each("cat") for each in open_clip.OPENAI_IMAGENET_TEMPLATES]
    assert len(templates("simple")) == 7
    assert templates(None, own=("an ink drawing of {}",)) == ("an ink drawing of {}",)
    assert len(templates("openai", own=("an ink drawing of {}",))) == 80


def test_prompts_go_through_the_templates_of_one_class_first() -> None:
    assert Prompts(("cat", "dog"), ("a {}", "the {}")).texts() == ["a cat", "the cat", "a dog", "the dog"]


def test_templates_are_read_from_a_file_line_by_line(tmp_path: Path) -> None:
    path = tmp_path / "templates.txt"
    path.write_text("a photo of a {}.\n\n  art of the {}.\n")
    assert templates(str(path)) == ("a photo of a {}.", "art of the {}.")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a photo\n", "line 1 of .* is 'a photo'; a template has one {}"),
        ("a {}\n{} and {}\n", "line 2 of .* is '{} and {}'; a template has one {}"),
        ("a {name}\n", "line 1 of .* is 'a {name}'"),
        ("a {\n", "line 1 of .* is 'a {'"),
        ("\n", "holds no template"),
    ],
)
def test_a_file_that_holds_something_else_is_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "templates.txt"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        templates(str(path))


def test_unknown_templates_are_refused() -> None:
    with pytest.raises(ConfigError, match="templates='opneai' is neither openai nor simple nor a file"):
        templates("opneai")


def test_wordnet_ids_need_names() -> None:
    with pytest.raises(ConfigError, match="2 classes of birds are WordNet ids such as 'n01440764', which are no words"):
        refuse_ids(["n01440764", "n01443537"], "birds")
    refuse_ids(["n01440764", "goldfish"], "birds")


@pytest.mark.parametrize("text", ["a cat\na dog\n", "dog\ta dog\ncat\ta cat\n"])
def test_names_come_from_a_file_in_the_order_of_the_classes_or_by_class(text: str, tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text(text)
    assert names_of_file(path, ["cat", "dog"], "pets") == ("a cat", "a dog")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a cat\n", "names.txt has 1 names, but pets has 2 classes, from 'cat' to 'dog'; write one name on each line"),
        ("cat\ta cat\n", "has no name for the class 'dog' of pets; name each of its 2 classes once"),
        ("cat\ta cat\ndog\ta dog\nfox\ta fox\n", "has a name for 'fox', which is no class of pets"),
        ("cat\ta cat\ncat\ta dog\n", "names the class 'cat' twice"),
        ("cat\ta cat\na dog\n", "has the line 'a dog', not CLASS<TAB>NAME"),
    ],
)
def test_names_that_do_not_fit_the_classes_are_refused(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text(text)
    with pytest.raises(ConfigError, match=message):
        names_of_file(path, ["cat", "dog"], "pets")


def test_a_missing_file_of_names_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"class_names='none.txt' is not a file"):
        names_of_file(Path("none.txt"), ["cat", "dog"], "pets")
