"""The demo's source side: the data are what the docstrings say, and the shipped weights do what they record."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from slora.demo import digits as digits_module
from slora.demo import letters as letters_module
from slora.demo.digits import digits
from slora.demo.letters import letters
from slora.demo.model import CHECKPOINT, build, load_pretrained
from slora.demo.pretrain import evaluate, main, write
from slora.errors import CheckpointError, ConfigError

RECORDED_MARGIN = 0.03


def test_letters_have_the_promised_shape_type_range_and_classes() -> None:
    images, labels = letters(3, seed=0)
    assert "".join(letters_module.CLASSES) == "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"
    assert images.shape == (156, 1, 16, 16)
    assert images.dtype == torch.float32
    assert labels.shape == (156,)
    assert labels.dtype == torch.int64
    assert images.min() >= 0.0
    assert images.max() <= 1.0
    assert torch.equal(labels.bincount(), torch.full((52,), 3))


def test_no_letter_is_blank_and_the_background_is_black() -> None:
    images, _ = letters(20, seed=5)
    assert images.amax(dim=(1, 2, 3)).min() > 0.4
    assert images.flatten(1).median(dim=1).values.max() < 0.4


def test_every_font_draws_every_letter_differently() -> None:
    fields = letters_module._distance_fields().reshape(len(letters_module.FONTS), 52, -1)
    assert (fields > 0).any(dim=2).all(), "a font lacks a letter"
    for name, glyphs in zip(letters_module.FONTS, fields, strict=True):
        assert len(glyphs.unique(dim=0)) == 52, f"{name} draws two letters with one glyph"


def test_no_glyph_touches_the_border_of_its_canvas() -> None:
    ink = letters_module._distance_fields() > 0
    assert not ink[:, [0, -1], :].any()
    assert not ink[:, :, [0, -1]].any()


def test_capitals_stay_larger_than_the_small_letters_of_the_same_shape() -> None:
    images, labels = letters(100, seed=6)
    height = (images.amax(dim=3) > 0.3).sum(dim=2).float().squeeze(1)
    for letter in "COSVWXZ":
        capital = height[labels == letters_module.CLASSES.index(letter)].mean()
        small = height[labels == letters_module.CLASSES.index(letter.lower())].mean()
        assert capital > small + 1.5, letter


def test_letters_repeat_for_a_seed_and_differ_between_seeds() -> None:
    first, again, other = letters(4, seed=7), letters(4, seed=7), letters(4, seed=8)
    assert torch.equal(first[0], again[0])
    assert torch.equal(first[1], again[1])
    assert not torch.equal(first[1], other[1])
    assert not torch.equal(first[0].sort(dim=0).values, other[0].sort(dim=0).values)


def test_letters_leave_the_global_random_state_alone() -> None:
    state = torch.get_rng_state()
    letters(1, seed=0)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(("n_per_class", "seed", "named"), [(0, 0, "n_per_class=0"), (1, -1, "seed=-1")])
def test_letters_name_the_bad_argument(n_per_class: int, seed: int, named: str) -> None:
    with pytest.raises(ConfigError, match=named):
        letters(n_per_class, seed)


def test_digits_have_the_promised_shape_type_range_and_split() -> None:
    (train_x, train_y), (test_x, test_y) = digits(seed=0)
    assert train_x.shape == (1257, 1, 16, 16)
    assert test_x.shape == (540, 1, 16, 16)
    assert train_y.shape == (1257,)
    assert test_y.shape == (540,)
    assert "".join(digits_module.CLASSES) == "0123456789"
    for images, labels in ((train_x, train_y), (test_x, test_y)):
        assert images.dtype == torch.float32
        assert labels.dtype == torch.int64
        assert images.min() == 0.0
        assert 0.9 < images.max() <= 1.0
        share = labels.bincount(minlength=10) / len(labels)
        assert (share - 0.1).abs().max() < 0.01


def test_the_seed_of_digits_reorders_the_training_images_and_nothing_else() -> None:
    (train_x, train_y), (test_x, test_y) = digits(seed=0)
    (same_x, same_y), _ = digits(seed=0)
    (other_x, other_y), (other_test_x, other_test_y) = digits(seed=1)
    assert torch.equal(train_x, same_x)
    assert torch.equal(train_y, same_y)
    assert torch.equal(test_x, other_test_x)
    assert torch.equal(test_y, other_test_y)
    assert not torch.equal(train_y, other_y)
    assert torch.equal(train_y.bincount(), other_y.bincount())
    rows = {row.numpy().tobytes() for row in train_x}
    assert rows == {row.numpy().tobytes() for row in other_x}
    assert rows.isdisjoint(row.numpy().tobytes() for row in test_x)


def test_digits_name_the_bad_seed() -> None:
    with pytest.raises(ConfigError, match="seed=-3"):
        digits(seed=-3)


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, framework="pt") as file:
        return dict(file.metadata())


def test_the_checkpoint_is_small() -> None:
    assert CHECKPOINT.stat().st_size <= 1_500_000


def test_the_checkpoint_reads_new_letters_as_well_as_it_records() -> None:
    recorded = metadata(CHECKPOINT)
    accuracy, knn_accuracy = evaluate(load_pretrained(), bank=letters(40, seed=11), queries=letters(20, seed=12))
    assert accuracy >= float(recorded["accuracy"]) - RECORDED_MARGIN
    assert knn_accuracy >= float(recorded["knn_accuracy"]) - RECORDED_MARGIN


def test_the_pretrained_model_is_float32_in_evaluation_mode() -> None:
    model = load_pretrained()
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert model(torch.zeros(2, 1, 16, 16)).shape == (2, 52)


def test_another_number_of_classes_gets_a_head_of_zeros_and_keeps_the_rest() -> None:
    pretrained, fresh = load_pretrained(52), load_pretrained(10)
    images, _ = letters(1, seed=0)
    assert fresh.num_classes == 10
    assert torch.equal(fresh(images), torch.zeros(52, 10))
    assert torch.equal(fresh.forward_features(images), pretrained.forward_features(images))


def test_no_classes_give_the_features() -> None:
    assert load_pretrained(0)(torch.zeros(2, 1, 16, 16)).shape == (2, 96)


def test_what_is_written_is_read_back_rounded_to_float16(tmp_path: Path) -> None:
    path = tmp_path / "weights.safetensors"
    model = build(52)
    write(model, {"seed": "4"}, path)
    loaded = load_pretrained(path=path)
    for name, tensor in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], tensor.half().float()), name
    assert metadata(path) == {"seed": "4"}
    assert list(tmp_path.iterdir()) == [path], "a temporary file was left behind"


def test_a_failed_write_keeps_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights.safetensors"
    path.write_bytes(b"old")

    def full_disk(descriptor: int) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("slora.io.atomic.os.fsync", full_disk)
    with pytest.raises(CheckpointError, match="no space"):
        write(build(52), {}, path)
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_missing_checkpoint_is_named_with_its_remedy(tmp_path: Path) -> None:
    path = tmp_path / "absent.safetensors"
    with pytest.raises(CheckpointError, match=r"absent\.safetensors does not exist.*python -m slora\.demo\.pretrain"):
        load_pretrained(path=path)


def test_a_truncated_checkpoint_is_named(tmp_path: Path) -> None:
    path = tmp_path / "half.safetensors"
    path.write_bytes(CHECKPOINT.read_bytes()[:100_000])
    with pytest.raises(
        CheckpointError, match=r"half\.safetensors cannot be loaded .*is not a readable safetensors file"
    ):
        load_pretrained(path=path)


def test_a_checkpoint_of_another_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "other.safetensors"
    write(build(10), {}, path)
    with pytest.raises(
        CheckpointError,
        match=r"(?s)other\.safetensors cannot be loaded .*size mismatch.*python -m slora\.demo\.pretrain",
    ):
        load_pretrained(path=path)


@pytest.mark.parametrize(("flag", "value"), [("epochs", "0"), ("seed", "-1")])
def test_pretraining_names_the_bad_argument(flag: str, value: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([f"--{flag}", value])
    assert f"{flag}={value}" in capsys.readouterr().err


def test_pretraining_refuses_a_missing_folder_before_it_trains(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        main(["--out", str(tmp_path / "nowhere" / "weights.safetensors")])
    assert "missing or cannot be written" in capsys.readouterr().err
