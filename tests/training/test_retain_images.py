"""`retain_data`: a folder, a data set by name, or generic samples, as input of the model."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch

import slora.demo  # noqa: F401 (registers its data sets)
from slora import ConfigError, DataError
from slora.sources.data import InputSpec, open_data
from slora.sources.data_names import check_retained
from slora.training import TrainSettings
from slora.training.retain_images import retained_images

SPEC = InputSpec(1, 16, (0.0,), (1.0,), "bilinear")


@pytest.mark.parametrize("name", ["letters", "generic", "mixed", "target"])
def test_samples_come_as_the_model_takes_them(name: str) -> None:
    settings = TrainSettings(retain_data=name, retain_samples=10)
    images = retained_images(settings, SPEC, open_data("digits"))
    assert images is not None
    assert images.shape == (10, 1, 16, 16)
    assert torch.equal(images, retained_images(settings, SPEC, open_data("digits")))  # type: ignore[arg-type]


def test_a_folder_of_images_needs_no_labels(image_tree: Callable[..., Path]) -> None:
    folder = image_tree(12)
    settings = TrainSettings(retain_data=str(folder), retain_samples=5)
    images = retained_images(settings, InputSpec(3, 8, (0.0,) * 3, (1.0,) * 3), open_data("digits"))
    assert images is not None
    assert images.shape == (5, 3, 8, 8)
    assert len({float(image[0].mean()) for image in images}) == 5


def test_a_folder_with_the_name_of_a_data_set_is_not_taken_for_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "letters").mkdir()
    images = retained_images(TrainSettings(retain_data="letters", retain_samples=3), SPEC, open_data("digits"))
    assert images is not None
    assert len(images) == 3


def test_terms_other_than_distillation_have_them_too() -> None:
    for user in ("drift_penalty", "ewc_penalty"):
        settings = TrainSettings(retain_data="target", retain_samples=4, retain_weight=0, **{user: 1.0})
        images = retained_images(settings, SPEC, open_data("digits"))
        assert images is not None
        assert len(images) == 4


def test_without_data_or_weight_there_is_nothing() -> None:
    for settings in (TrainSettings(), TrainSettings(retain_data="letters", retain_weight=0)):
        assert retained_images(settings, SPEC, open_data("digits")) is None


def test_what_is_no_data_is_refused(tmp_path: Path, image_tree: Callable[..., Path]) -> None:
    with pytest.raises(
        ConfigError, match="retain_data='lettters' is neither 'generic', 'mixed', 'target', nor a folder"
    ):
        check_retained("lettters")
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="has 0 readable images; give 2 or more"):
        retained_images(TrainSettings(retain_data=str(tmp_path / "empty")), SPEC, open_data("digits"))
    with pytest.raises(DataError, match=r"0000.png cannot be read \(not an image\)"):
        retained_images(TrainSettings(retain_data=str(image_tree(3, broken=1))), SPEC, open_data("digits"))
