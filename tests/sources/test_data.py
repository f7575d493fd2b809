"""Data sets by name, and the way of an image into a model."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
import torchvision
from PIL import Image
from torch.utils.data import TensorDataset

import slora.demo  # noqa: F401 (registers its model and data sets)
from slora import ConfigError, DataError
from slora.sources.data import InputSpec, open_data
from slora.sources.data_names import TORCHVISION, check_name, names

pytestmark = pytest.mark.once

DEMO = InputSpec(1, 16, (0.0,), (1.0,), "bilinear")


@pytest.mark.parametrize(
    ("given", "name"),
    [("cifar100", "cifar100"), ("CIFAR-100", "cifar100"), ("Flowers102", "flowers102"), ("oxford_pets", "pets")],
)
def test_names_are_taken_as_people_write_them(given: str, name: str) -> None:
    assert check_name(given) == name


def test_the_data_sets_that_were_promised_are_there() -> None:
    promised = "cifar10 cifar100 flowers102 pets food101 dtd eurosat gtsrb svhn mnist stl10 imagenet digits letters"
    assert set(promised.split()) <= set(names())


def test_an_unknown_name_is_refused_with_near_names(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"data='cifar101' is unknown; near names are cifar10"):
        check_name("cifar101")
    with pytest.raises(ConfigError, match="no data set was named"):
        check_name(None)
    with pytest.raises(ConfigError, match=f"is a folder; write imagefolder:{tmp_path}"):
        check_name(str(tmp_path))


@pytest.mark.parametrize("name", sorted(TORCHVISION))
def test_torchvision_takes_what_the_registry_gives_it(name: str) -> None:
    entry = TORCHVISION[name]
    accepted = inspect.signature(getattr(torchvision.datasets, entry.kind).__init__).parameters
    for options in (*entry.training, *entry.evaluation):
        for option in options:
            assert option in accepted or "kwargs" in accepted
    assert ("download" in accepted) == entry.downloads


@pytest.mark.parametrize(
    ("name", "download", "remedy"),
    [("cifar10", False, "run again with --download"), ("imagenet", True, "it cannot be downloaded: put its archives")],
)
def test_a_data_set_that_is_not_there_is_named_with_the_remedy(
    tmp_path: Path, name: str, download: bool, remedy: str
) -> None:
    with pytest.raises(DataError, match=f"data set '{name}' could not be opened in .*{remedy}"):
        open_data(name, tmp_path, download)


def test_a_download_that_fails_is_named_with_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*args: Any, **kwargs: Any) -> Any:
        raise OSError("the network is unreachable")

    monkeypatch.setattr(torchvision.datasets, "MNIST", unreachable)
    with pytest.raises(DataError, match=r"'mnist' .*\(the network is unreachable\); check the network"):
        open_data("mnist", tmp_path)


class Fake:
    """Stands for a data set of torchvision; remembers how it was opened."""

    opened: list[dict[str, Any]]

    def __init__(self, root: str, **options: Any) -> None:
        Fake.opened.append(options)
        self.targets = [0, 1] * 20

    def __len__(self) -> int:
        return 40

    def __getitem__(self, index: int) -> tuple[Image.Image, int]:
        return Image.new("RGB", (20, 20), (index, 0, 0)), self.targets[index]


def test_splits_are_joined_and_opened_as_the_registry_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "DTD", Fake)
    Fake.opened = []
    source = open_data("dtd", tmp_path, download=False)
    assert Fake.opened == [{"split": name, "download": False} for name in ("train", "val", "test")]
    assert (len(source.training), len(source.evaluation), len(source.classes)) == (80, 40, 47)


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (["plain", "dotted"] * 5, ("plain", "dotted") * 5),
        ([("tench", "Tinca tinca")] * 10, ("tench, Tinca tinca",) * 10),
        (None, tuple("0123456789")),
        (["too few"], tuple("0123456789")),
    ],
    ids=["names", "several names", "no names", "another number"],
)
def test_classes_have_the_names_that_torchvision_gives_them(
    names: Any, expected: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Fake, "classes", names, raising=False)
    monkeypatch.setattr(torchvision.datasets, "MNIST", Fake)
    Fake.opened = []
    assert open_data("mnist", tmp_path).classes == expected


def test_a_data_set_without_splits_gets_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "EuroSAT", Fake)
    Fake.opened = []
    source = open_data("eurosat", tmp_path)
    assert (len(source.training), len(source.evaluation)) == (36, 4)


def test_images_arrive_in_the_size_and_scale_of_the_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torchvision.datasets, "CIFAR10", Fake)
    Fake.opened = []
    source = open_data("cifar10", tmp_path)
    spec = InputSpec(3, 10, (0.5, 0.0, 0.0), (0.5, 1.0, 1.0), "bilinear", crop=0.8)
    image, label = source.data(spec, training=False)[39]
    assert (tuple(image.shape), label) == ((3, 10, 10), 1)
    assert image[0].mean().item() == pytest.approx((39 / 255 - 0.5) / 0.5)
    assert image[1].abs().max() == 0


def test_only_data_that_may_be_mirrored_is_mirrored() -> None:
    assert {name for name, entry in TORCHVISION.items() if entry.augment != "crop-flip"} == {"gtsrb", "mnist", "svhn"}


def test_digits_and_letters_are_made_on_the_spot_and_stay_in_memory() -> None:
    digits = open_data("digits")
    assert (len(digits.training), len(digits.evaluation), len(digits.classes)) == (1257, 540, 10)
    assert isinstance(digits.data(DEMO, "auto", training=True), TensorDataset)
    letters = open_data("letters")
    assert (len(letters.training), len(letters.evaluation), len(letters.classes)) == (5200, 2600, 52)


def test_digits_reach_a_model_of_another_size_and_number_of_channels() -> None:
    spec = InputSpec(3, 32, (0.5,) * 3, (0.25,) * 3)
    image, label = open_data("digits").data(spec, training=False)[0]
    assert tuple(image.shape) == (3, 32, 32)
    assert torch.equal(image[0], image[2])
    # From 0 and 1; bicubic interpolation overshoots a little.
    assert -2.3 < float(image.min()) < -1.9
    assert 1.5 < float(image.max()) < 2.3
    assert label in range(10)
