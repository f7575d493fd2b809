"""ImageNet and its shifted test sets from folders: classes as ImageNet's numbers, and layouts that are not complete."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from slora import ConfigError, DataError
from slora.models.input_spec import InputSpec
from slora.sources import imagenet
from slora.sources.eval_sets import EvalSet
from slora.sources.suite_names import SUITES, check_suites, find_suite
from slora.sources.suites import open_suite
from tests.sources.suite_folders import OBJECTNET, all_suites, class_folders, objectnet

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return all_suites(tmp_path_factory.mktemp("suites"))


def test_the_classes_are_those_that_the_field_knows() -> None:
    assert (imagenet.wnids()[0], imagenet.wnids()[999], len(set(imagenet.wnids()))) == ("n01440764", "n15075141", 1000)
    assert list(imagenet.wnids()) == sorted(imagenet.wnids())
    assert (imagenet.class_names()[0], imagenet.class_names()[954], len(imagenet.class_names())) == (
        "tench",
        "banana",
        1000,
    )
    # Goldfish is the first class of ImageNet-R, stingray that of ImageNet-A.
    assert (imagenet.subset("imagenet-r")[0], imagenet.subset("imagenet-a")[0]) == (1, 6)
    assert [len(imagenet.subset(name)) for name in SUITES] == [1000, 1000, 200, 200, 1000, 1000]


def folder_of(images: EvalSet, index: int) -> str:
    return Path(images.images.samples[index][0]).parent.name


@pytest.mark.parametrize("name", [name for name in SUITES if name != "objectnet"])
def test_each_folder_is_the_class_of_imagenet_that_its_name_says(root: Path, name: str) -> None:
    found = open_suite(name, root)
    assert len(found.images) == len(found.classes) == len(found.groups or ()) == len(imagenet.subset(name))
    for index in (0, 57, 199):
        folder, label = folder_of(found, index), found.images.samples[index][1]
        number = int(folder) if name == "imagenetv2" else imagenet.wnids().index(folder)
        assert found.groups is not None
        assert found.groups[label] == (number,)
        assert found.classes[label] == imagenet.class_names()[number]


def test_objectnet_keeps_the_classes_that_are_also_of_imagenet_and_loses_its_border(root: Path) -> None:
    found = open_suite("objectnet", root)
    assert dict(zip(found.classes, found.groups or (), strict=True)) == OBJECTNET
    assert [folder_of(found, index) for index in range(len(found.images))] == ["alarm_clock", "banana"]
    assert found.images[0][0].size == (8, 8)


def test_images_are_transformed_to_the_input_of_the_model(root: Path) -> None:
    data = open_suite("imagenet-r", root).data(InputSpec(3, 16, (0.5,) * 3, (0.5,) * 3))
    assert data[3][0].shape == (3, 16, 16)  # type: ignore[index]
    assert data[3][1] == 3  # type: ignore[index]


def test_a_suite_may_be_elsewhere(root: Path, tmp_path: Path) -> None:
    assert find_suite("imagenet", tmp_path, root / "imagenet") == root / "imagenet/val"
    assert find_suite("imagenet", tmp_path, root / "imagenet/val") == root / "imagenet/val"


def test_a_missing_folder_is_named_with_the_layout_and_the_origin(tmp_path: Path) -> None:
    with pytest.raises(
        DataError, match=r"imagenet-r: .*imagenet-r does not exist; expected 200 wnid folders such as n01443537"
    ):
        open_suite("imagenet-r", tmp_path)
    # A folder of unsorted images, and one with train/ alone.
    (tmp_path / "imagenet/val").mkdir(parents=True)
    with pytest.raises(
        DataError, match=r"imagenet: .*imagenet holds no class folders; .*torchvision.datasets.ImageNet"
    ):
        open_suite("imagenet", tmp_path)
    class_folders(tmp_path / "imagenet/train", imagenet.wnids()[:2])
    # ImageNet as it is, but nothing to evaluate on.
    with pytest.raises(DataError, match="holds no class folders"):
        open_suite("imagenet", tmp_path)


def test_folders_that_are_not_those_of_the_suite_are_named(tmp_path: Path) -> None:
    names = [imagenet.wnids()[number] for number in imagenet.subset("imagenet-a")]
    class_folders(tmp_path / "imagenet-a", names)
    shutil.rmtree(tmp_path / "imagenet-a" / names[3])
    with pytest.raises(DataError, match=f"lacks 1 of 200 class folders, such as '{names[3]}'"):
        open_suite("imagenet-a", tmp_path)
    (tmp_path / "imagenet-a" / names[3]).mkdir()
    with pytest.raises(DataError, match=f"its class folder {names[3]} has no image"):
        open_suite("imagenet-a", tmp_path)
    class_folders(tmp_path / "imagenet-a", ["n01440764"])
    with pytest.raises(DataError, match="has the folder 'n01440764', which is none of its classes"):
        open_suite("imagenet-a", tmp_path)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda root: shutil.rmtree(root / "mappings"), r"mappings does not exist; it holds folder_to_objectnet_label"),
        (
            lambda root: (root / "mappings/imagenet_to_label_2012_v2").unlink(),
            "imagenet_to_label_2012_v2 cannot be read",
        ),
        (lambda root: (root / "mappings/imagenet_to_label_2012_v2").write_text("pear\n"), "do not fit together"),
        (lambda root: shutil.rmtree(root / "images/banana"), "lacks the class folder 'banana'"),
    ],
    ids=["no mappings", "a file missing", "other names", "a class missing"],
)
def test_an_incomplete_objectnet_is_named(tmp_path: Path, break_it: object, message: str) -> None:
    objectnet(tmp_path / "objectnet")
    break_it(tmp_path / "objectnet")  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        open_suite("objectnet", tmp_path)


def test_suites_are_listed_by_name_with_or_without_a_folder() -> None:
    found = check_suites("imagenet, ImageNet_R=/data/r,objectnet")
    assert found == {"imagenet": None, "imagenet-r": Path("/data/r"), "objectnet": None}
    with pytest.raises(ConfigError, match="test set 'imagenet-s' is unknown; near names are imagenet"):
        check_suites("imagenet-s")
    with pytest.raises(ConfigError, match="'imagenet-r' is listed twice"):
        check_suites("imagenet-r,imagenetr")
    with pytest.raises(ConfigError, match="no test set was named"):
        check_suites(" ")


def test_a_head_is_read_by_the_classes_that_it_was_trained_for() -> None:
    wnids = imagenet.wnids()
    assert imagenet.outputs(None, [wnids[7], wnids[3]]) == {7: 0, 3: 1}
    assert imagenet.outputs("imagenet", ["tench, Tinca tinca"] * 1000) == {i: i for i in range(1000)}
    assert imagenet.outputs(None, imagenet.class_names()) == {i: i for i in range(1000)}
    assert imagenet.outputs("cifar10", ["cat", wnids[0]]) is None
    assert imagenet.prompt_names(None, [wnids[954], wnids[0]]) == ("banana", "tench")
    assert imagenet.prompt_names("pets", ["Great_Pyrenees"]) == ("Great Pyrenees",)
