"""Which images form which step."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from slora import ConfigError, DataError
from slora.sources.batches import Batches, Damage, DamagedImage, make_batches

CPU = torch.device("cpu")


class Noisy(Dataset[tuple[Tensor, int]]):
    """`count` numbers, each with a random number beside it, as an augmentation would draw it."""

    def __init__(self, count: int, broken: tuple[int, ...] = ()) -> None:
        self.count, self.broken = count, broken

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Tensor, int]:
        if index in self.broken:
            raise DamagedImage(f"file {index}", "cut short")
        return torch.cat([torch.tensor([float(index)]), torch.rand(1)]), index


def pair(count: int) -> tuple[Tensor, Tensor]:
    return torch.arange(count, dtype=torch.float32)[:, None], torch.arange(count)


def labels(batches: Batches, epoch: int = 0, start: int = 0) -> list[list[int]]:
    return [batch.tolist() for _, batch in batches.epoch(epoch, start)]


def flat(batches: list[list[int]]) -> list[int]:
    return list(itertools.chain.from_iterable(batches))


@pytest.mark.parametrize("data", [pair(23), TensorDataset(*pair(23)), Noisy(23)], ids=["tuple", "tensors", "dataset"])
def test_an_epoch_draws_whole_batches_of_different_images(data: Any) -> None:
    batches = make_batches(data, 5, CPU, seed=1)
    drawn = labels(batches)
    assert [len(batch) for batch in drawn] == [5] * 4 == [5] * len(batches)
    assert len(set(flat(drawn))) == 20


def test_tensors_and_data_sets_are_drawn_in_the_same_order() -> None:
    assert labels(make_batches(pair(23), 5, CPU, seed=1)) == labels(make_batches(Noisy(23), 5, CPU, seed=1))


def test_epochs_and_seeds_differ_and_repeat() -> None:
    first, second = make_batches(pair(40), 5, CPU, seed=1), make_batches(pair(40), 5, CPU, seed=2)
    assert labels(first, 0) != labels(first, 1)
    assert labels(first, 0) != labels(second, 0)
    assert labels(first, 1) == labels(make_batches(pair(40), 5, CPU, seed=1), 1)


@pytest.mark.parametrize("data", [pair(23), Noisy(23)], ids=["tensors", "dataset"])
def test_starting_in_the_middle_of_an_epoch_gives_its_rest(data: Any) -> None:
    batches = make_batches(data, 4, CPU, seed=1)
    whole = list(batches.epoch(2))
    rest = list(batches.epoch(2, start=3))
    assert len(rest) == 2
    for (images, targets), (images_again, targets_again) in zip(whole[3:], rest, strict=True):
        assert torch.equal(images, images_again)
        assert torch.equal(targets, targets_again)


def test_augmentation_is_the_same_whatever_the_number_of_reading_processes() -> None:
    here, there = (
        torch.cat([x for x, _ in make_batches(Noisy(12), 4, CPU, seed=1, num_workers=n).epoch()]) for n in (0, 2)
    )
    assert torch.equal(here, there)
    assert len(set(here[:, 1].tolist())) == 12


def test_augmentation_differs_between_epochs() -> None:
    batches = make_batches(Noisy(12), 12, CPU, seed=1)
    by_image = [dict(next(iter(batches.epoch(epoch)))[0].tolist()) for epoch in (0, 1)]
    assert all(by_image[0][image] != by_image[1][image] for image in by_image[0])


@pytest.mark.parametrize("num_workers", [0, 1])
def test_reading_draws_nothing_from_the_global_generator(num_workers: int) -> None:
    before = torch.get_rng_state()
    labels(make_batches(Noisy(12), 4, CPU, seed=1, num_workers=num_workers))
    assert torch.equal(before, torch.get_rng_state())


def test_an_evaluation_sees_every_image_once_in_order() -> None:
    assert labels(make_batches(Noisy(11), 4, CPU)) == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10]]


@pytest.mark.parametrize("seed", [None, 1])
def test_processes_share_the_images(seed: int | None) -> None:
    parts = [make_batches(pair(20), 3, CPU, seed=seed, rank=rank, world=2) for rank in (0, 1)]
    drawn = [flat(labels(part)) for part in parts]
    assert not set(drawn[0]) & set(drawn[1])
    assert len(drawn[0]) == len(drawn[1]) == (10 if seed is None else 9)


def test_an_empty_data_set_is_refused() -> None:
    with pytest.raises(DataError, match="the data set is empty"):
        make_batches(pair(0), 4, CPU)


def test_images_without_labels_are_refused() -> None:
    with pytest.raises(DataError, match=r"lengths \[4, 3\]"):
        make_batches((torch.zeros(4, 1), torch.zeros(3)), 2, CPU)


def test_a_batch_larger_than_the_data_set_is_refused_with_the_largest_that_fits() -> None:
    with pytest.raises(ConfigError, match="batch_size=64 exceeds the 20 training images; use 20 or less"):
        make_batches(pair(20), 64, CPU, seed=0)


@pytest.mark.parametrize("num_workers", [0, 1])
def test_a_damaged_training_image_is_replaced_so_that_steps_keep_their_size(num_workers: int) -> None:
    batches = make_batches(Noisy(200, broken=(7,)), 50, CPU, seed=1, num_workers=num_workers)
    drawn = labels(batches)
    assert [len(batch) for batch in drawn] == [50] * 4
    assert 7 not in flat(drawn)
    assert sorted(flat(drawn)).count(8) == 2


def test_a_damaged_image_is_named_once_and_left_out_of_an_evaluation(caplog: pytest.LogCaptureFixture) -> None:
    batches = make_batches(Noisy(200, broken=(7,)), 50, CPU)
    assert [len(batch) for batch in labels(batches)] == [49, 50, 50, 50]
    labels(batches)
    assert [record.getMessage() for record in caplog.records] == [
        "skipped damaged image file 7 (cut short); 1 of 200 so far"
    ]


@pytest.mark.parametrize("seed", [None, 1])
def test_more_than_one_percent_of_damaged_images_is_an_error_that_names_them(seed: int | None) -> None:
    batches = make_batches(Noisy(200, broken=(1, 2, 3)), 50, CPU, seed=seed)
    with pytest.raises(DataError, match=r"at least 3 of 200 images cannot be read, more than 1%: .*file [123] \(cut"):
        labels(batches)


def test_exactly_one_percent_of_damaged_images_is_accepted() -> None:
    damage = Damage(200)
    for number in (1, 2, 2, 1):
        damage.add(DamagedImage(f"file {number}", "cut short"))
    assert len(damage.found) == 2
    with pytest.raises(DataError):
        damage.add(DamagedImage("file 3", "cut short"))


def test_a_batch_of_nothing_but_damaged_images_is_passed_over() -> None:
    batches = make_batches(Noisy(300, broken=(0,)), 1, CPU)
    assert len(labels(batches)) == 299
