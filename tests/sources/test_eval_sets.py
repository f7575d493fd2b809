"""Image folders, webdatasets and captions to evaluate on."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pytest

import slora.demo  # noqa: F401 (registers its data sets)
from slora import ConfigError, DataError
from slora.models.input_spec import InputSpec
from slora.sources.captions import open_captions
from slora.sources.eval_sets import open_eval_set
from slora.sources.suite_names import check_eval_set
from tests.sources.suite_folders import class_folders, image

pytestmark = pytest.mark.once


def tar(path: Path, members: dict[str, bytes]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))


def test_classes_are_called_like_their_folders_or_as_the_file_says(tmp_path: Path) -> None:
    class_folders(tmp_path / "val", ["apple_pie", "n07753592"], count=2)
    class_folders(tmp_path / "train", ["other"])
    found = open_eval_set(str(tmp_path))
    assert (found.name, found.classes, len(found.images)) == (tmp_path.name, ("apple pie", "banana"), 4)
    assert [label for _, label in found.images] == [0, 0, 1, 1]
    (tmp_path / "classnames.txt").write_text("pie\nbanana\n")
    (tmp_path / "zeroshot_classification_templates.txt").write_text("a photo of {c}.\n\n")
    found = open_eval_set(f"imagefolder:{tmp_path}")
    assert (found.classes, found.templates, found.groups) == (("pie", "banana"), ("a photo of {}.",), None)


def test_folders_of_imagenet_are_called_as_in_prompts(tmp_path: Path) -> None:
    class_folders(tmp_path, ["n01440764", "n07753592"])
    assert open_eval_set(str(tmp_path)).classes == ("tench", "banana")


def test_a_data_set_is_named_instead_of_a_folder() -> None:
    found = open_eval_set("digits")
    assert found.classes == tuple("0123456789")
    assert len(found.data(InputSpec(1, 16, (0.0,), (1.0,)))) == len(found.images)  # type: ignore[arg-type]


def test_class_names_that_do_not_match_the_folders_are_refused(tmp_path: Path) -> None:
    class_folders(tmp_path, ["a", "b", "c"])
    (tmp_path / "classnames.txt").write_text("first\nsecond\n")
    with pytest.raises(DataError, match=r"names 2 classes, but .* has 3 class folders \(a, b, c"):
        open_eval_set(str(tmp_path))


def test_names_that_say_nothing_are_refused(tmp_path: Path) -> None:
    class_folders(tmp_path / "wnids", ["n00000001", "n01440764"])
    with pytest.raises(DataError, match=r"classes called n00000001, which say nothing about them; .*classnames.txt"):
        open_eval_set(str(tmp_path / "wnids"))
    class_folders(tmp_path / "numbers", map(str, range(11)))
    with pytest.raises(DataError, match="classes called 0, 1, 10"):
        open_eval_set(str(tmp_path / "numbers"))


def test_an_empty_or_missing_set_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="has no class folders; expected"):
        open_eval_set(str(tmp_path))
    (tmp_path / "set/empty").mkdir(parents=True)
    with pytest.raises(DataError, match="its class folder empty has no image"):
        open_eval_set(str(tmp_path / "set"))
    with pytest.raises(DataError, match="absent is not a folder"):
        open_eval_set(str(tmp_path / "absent"))
    with pytest.raises(ConfigError, match="data='digit' is unknown; near names are digits"):
        open_eval_set("digit")
    check_eval_set("digits")
    check_eval_set(str(tmp_path))
    with pytest.raises(ConfigError, match="near names are digits"):
        check_eval_set("digit")
    with pytest.raises(ConfigError, match="absent is not a folder"):
        check_eval_set(str(tmp_path / "absent"))


def test_shards_of_a_webdataset_are_read_in_order(tmp_path: Path) -> None:
    for shard in (2, 10):
        members = {f"s{shard}.cls": b"1" if shard == 2 else b"0", f"s{shard}.png": image(shard), "readme.txt": b"x"}
        tar(tmp_path / f"test/{shard}.tar", members)
    (tmp_path / "classnames.txt").write_text("cat\ndog\n")
    found = open_eval_set(str(tmp_path))
    assert found.classes == ("cat", "dog")
    assert [(x.getpixel((0, 0)), label) for x, label in found.images] == [((14, 62, 2), 1), ((70, 54, 10), 0)]


@pytest.mark.parametrize(
    ("members", "names", "message"),
    [
        ({"a.cls": b"2", "a.png": image(0)}, "cat\ndog\n", "names 2 classes, but .* has the label 2"),
        ({"a.cls": b"0", "a.png": image(0)}, "", "classnames.txt is missing"),
        ({"a.png": image(0)}, "cat\n", "a has neither a label"),
        ({"a.txt": b"a caption", "a.png": image(0)}, "cat\n", "has no label"),
        ({"a.cls": b"0"}, "cat\n", "hold no image"),
    ],
    ids=["label", "no names", "no label", "captions", "empty"],
)
def test_a_webdataset_that_is_no_classification_is_refused(
    tmp_path: Path, members: dict[str, bytes], names: str, message: str
) -> None:
    tar(tmp_path / "test/0.tar", members)
    (tmp_path / "classnames.txt").write_text(names)
    with pytest.raises(DataError, match=message):
        open_eval_set(str(tmp_path))


def test_a_cut_off_tar_is_named(tmp_path: Path) -> None:
    (tmp_path / "0.tar").write_bytes(b"no archive")
    with pytest.raises(DataError, match=r"0.tar cannot be read .*; get it again"):
        open_eval_set(str(tmp_path))


EXPECTED = ("first", "second", "third"), (0, 0, 1)


def written(folder: Path, form: str) -> Path:
    """Two images with the captions `EXPECTED` in one of the forms; returns what to open."""
    (folder / "images").mkdir(parents=True)
    for number, name in enumerate(("a.png", "b.png")):
        (folder / "images" / name).write_bytes(image(number))
    if form == "jsonl":
        lines = [{"image": "a.png", "captions": ["first", "second"]}, {"image": "images/b.png", "caption": "third"}]
        (folder / "captions.jsonl").write_text("\n".join(map(json.dumps, lines)) + "\n\n")
    if form == "coco":
        images = [{"id": 7, "file_name": "a.png"}, {"id": 3, "file_name": "b.png"}]
        notes = [{"image_id": 7, "caption": "first"}, {"image_id": 7, "caption": " second\n"}]
        notes += [{"image_id": 3, "caption": "third"}]
        (folder / "captions_val.json").write_text(json.dumps({"images": images, "annotations": notes}))
        return folder / "captions_val.json"
    if form == "csv":
        (folder / "captions.txt").write_text("image,caption\na.png,first\nb.png,third\na.png,second\n")
    if form == "beside":
        (folder / "images/a.txt").write_text("first\nsecond\n")
        (folder / "images/b.txt").write_text("third")
    if form == "webdataset":
        tar(
            folder / "test/0.tar",
            {"0.png": image(0), "0.txt": b"first\nsecond\n", "1.png": image(1), "1.txt": b"third"},
        )
    return folder


@pytest.mark.parametrize("form", ["jsonl", "coco", "csv", "beside", "webdataset"])
def test_captions_are_read_in_every_form(tmp_path: Path, form: str) -> None:
    found = open_captions(written(tmp_path / "set", form))
    assert (found.texts, found.image_of_text) == EXPECTED
    assert [(x.getpixel((0, 0)), number) for x, number in found.images] == [((0, 0, 0), 0), ((7, 31, 1), 1)]
    assert found.name == ("captions_val" if form == "coco" else "set")
    data = found.data(InputSpec(3, 16))
    assert (data[1][0].shape, data[1][1]) == ((3, 16, 16), 1)  # type: ignore[index]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "is empty: it holds no image with a caption"),
        ('{"image": "c.png", "caption": "x"}', r"names the image c.png, which is neither .*c.png nor .*images/c.png"),
        ('{"image": "a.png", "captions": [" "]}', "a.png has no caption"),
        ('{"picture": "a.png"}', "is not in a form known here"),
        ('{"image": "a.png", "captions": [1]}', "are not text"),
    ],
    ids=["empty", "absent", "blank", "keys", "numbers"],
)
def test_captions_without_images_or_texts_are_refused(tmp_path: Path, content: str, message: str) -> None:
    written(tmp_path / "set", "jsonl")
    (tmp_path / "set/captions.jsonl").write_text(content)
    with pytest.raises(DataError, match=message):
        open_captions(tmp_path / "set")


def test_images_that_lack_their_text_and_missing_folders_are_named(tmp_path: Path) -> None:
    written(tmp_path / "set", "beside")
    (tmp_path / "set/images/b.txt").unlink()
    with pytest.raises(DataError, match=r"b.png has no captions: b.txt does not exist beside it"):
        open_captions(tmp_path / "set")
    with pytest.raises(DataError, match="absent does not exist"):
        open_captions(tmp_path / "absent")
    tar(tmp_path / "wds/test/0.tar", {"0.png": image(0), "0.cls": b"0"})
    with pytest.raises(DataError, match="holds labels instead of captions"):
        open_captions(tmp_path / "wds")
