"""Image folders: how they are split, and what becomes of damaged images."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from PIL import Image

from slora import DataError
from slora.sources.batches import make_batches
from slora.sources.data import InputSpec, open_data
from slora.sources.folders import image_folder, split

pytestmark = pytest.mark.once

Tree = Callable[..., Path]
SPEC = InputSpec(3, 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5), "bilinear")


def test_a_folder_of_class_folders_is_split_90_to_10_by_class(image_tree: Tree) -> None:
    root = image_tree(60)
    training, evaluation, classes, _ = image_folder(root)
    assert classes == ("dark", "light")
    assert (len(training), len(evaluation)) == (54, 6)  # type: ignore[arg-type]
    assert sorted(label for _, label in evaluation) == [0, 0, 0, 1, 1, 1]  # type: ignore[attr-defined]


def test_the_split_is_the_same_every_time(image_tree: Tree) -> None:
    root = image_tree(60)
    torch.manual_seed(1)
    first = image_folder(root)[1].indices  # type: ignore[attr-defined]
    torch.manual_seed(2)
    assert image_folder(root)[1].indices == first  # type: ignore[attr-defined]


def test_every_class_with_two_images_has_one_to_evaluate_on() -> None:
    training, evaluation = split([0, 0, 1, 2, 2, 2])
    assert sorted(training + evaluation) == list(range(6))
    assert len(evaluation) == 2
    assert 2 in training


def test_train_and_val_subfolders_are_the_split(image_tree: Tree) -> None:
    image_tree(20, where="set/train")
    root = image_tree(8, where="set/val").parent
    training, evaluation, classes, _ = image_folder(root)
    assert (len(training), len(evaluation), classes) == (20, 8, ("dark", "light"))  # type: ignore[arg-type]


def test_a_class_keeps_its_number_where_val_lacks_one_before_it(image_tree: Tree) -> None:
    image_tree(20, where="set/train")
    root = image_tree(8, where="set/val").parent
    shutil.rmtree(root / "val/dark")
    assert {label for _, label in image_folder(root)[1]} == {1}  # type: ignore[attr-defined]


def test_without_val_the_train_subfolder_is_split(image_tree: Tree) -> None:
    root = image_tree(40, where="set/train").parent
    training, evaluation, _, _ = image_folder(root)
    assert (len(training), len(evaluation)) == (36, 4)  # type: ignore[arg-type]


def test_a_folder_that_is_missing_empty_or_of_one_class_is_refused(tmp_path: Path, image_tree: Tree) -> None:
    with pytest.raises(DataError, match=r"absent is not a folder; give one with a subfolder per class"):
        image_folder(tmp_path / "absent")
    (tmp_path / "flat").mkdir()
    with pytest.raises(DataError, match="flat has no class folders"):
        image_folder(tmp_path / "flat")
    root = image_tree(4)
    (root / "empty").mkdir()
    with pytest.raises(DataError, match="empty has no image with a known extension"):
        image_folder(root)
    shutil.rmtree(root / "empty")
    shutil.rmtree(root / "light")
    with pytest.raises(DataError, match=r"\['dark'\]; at least two are needed"):
        image_folder(root)


def test_a_class_only_val_has_is_refused(image_tree: Tree) -> None:
    image_tree(20, where="set/train")
    root = image_tree(8, where="set/val").parent
    (root / "val/light").rename(root / "val/grey")
    with pytest.raises(DataError, match=r"has the class 'grey', which .*train lacks"):
        image_folder(root)


def test_half_a_percent_of_damaged_files_is_named_counted_and_skipped(
    image_tree: Tree, caplog: pytest.LogCaptureFixture
) -> None:
    root = image_tree(200, broken=1)
    source = open_data(f"imagefolder:{root}")
    assert len(source.training) + len(source.evaluation) == 199
    assert list(source.damage.found) == [str(root / "light/0000.png")]
    (record,) = [record for record in caplog.records if record.levelno == logging.WARNING]
    assert record.getMessage() == (f"skipped damaged image {root / 'light/0000.png'} (not an image); 1 of 200 so far")


def test_five_percent_of_damaged_files_is_an_error_before_anything_is_trained(image_tree: Tree) -> None:
    root = image_tree(100, broken=5)
    with pytest.raises(DataError, match=r"at least 5 of 100 images cannot be read, more than 1%: .*light/0000.png"):
        open_data(f"imagefolder:{root}")


@pytest.mark.parametrize("num_workers", [0, 2])
def test_an_image_cut_short_shows_when_it_is_read_and_is_skipped(
    image_tree: Tree, caplog: pytest.LogCaptureFixture, num_workers: int
) -> None:
    root = image_tree(200, truncated=1)
    source = open_data(f"imagefolder:{root}")
    assert source.damage.found == {}
    cpu = torch.device("cpu")
    for _ in range(2):
        for part in (True, False):
            batches = make_batches(source.data(SPEC, training=part), 20, cpu, seed=0 if part else None)
            assert sum(len(labels) for _, labels in batches.epoch()) in (180, 20, 19)
    assert list(source.damage.found) == [str(root / "light/0000.png")]
    assert len([record for record in caplog.records if "0000.png" in record.getMessage()]) == 1


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "CMYK", "1"])
@pytest.mark.parametrize("channels", [1, 3])
def test_images_of_every_mode_reach_the_model(tmp_path: Path, mode: str, channels: int) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        for number in range(2):
            kind = "jpg" if mode == "CMYK" else "png"
            Image.new(mode, (12, 9), 1).save(tmp_path / name / f"{number}.{kind}")
    source = open_data(f"imagefolder:{tmp_path}")
    spec = InputSpec(channels, 8, (0.0,) * channels, (1.0,) * channels)
    for augment in ("none", "auto"):
        image, _ = source.data(spec, augment, training=True)[0]
        assert tuple(image.shape) == (channels, 8, 8)
        assert image.dtype == torch.float32
