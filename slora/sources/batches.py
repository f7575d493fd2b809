"""The batches of an epoch.

The order of an epoch, and the augmentation of each image in it, depend only on (seed, epoch, image): not on the number
of DataLoader workers, nor on where a resumed run starts. Tensors stay in memory, on the training device if they fit,
and cost one `index_select` per batch; other data sets are read by a `DataLoader`.

A data set may raise `DamagedImage` for an image that cannot be read. In training the next readable image replaces it,
so every batch has its full size; an evaluation skips it.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, TensorDataset, default_collate

from slora.errors import ConfigError, DataError

Data = Dataset[Any] | tuple[Tensor, Tensor]

DAMAGED_SHARE = 0.01

_log = logging.getLogger("slora")

# Bytes. Tensors up to this size are copied to the training device once.
_RESIDENT_BYTES = 4 << 30


class Batches(Protocol):
    """A data set in batches of `(images [n, ...], labels [n] int64)` on the training device."""

    count: int
    """Images in the data set."""

    def __len__(self) -> int:
        """Batches of an epoch, for this process."""
        ...

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of `epoch` from number `start` on."""
        ...


class Order:
    """The order in which images are drawn.

    Args:
        count: images in the data set.
        batch_size: images per batch and process.
        seed: of the permutation; None keeps the order of the data set, and a smaller last batch.
        rank: number of this process, from 0.
        world: number of processes; each takes its share of every batch.
    """

    def __init__(self, count: int, batch_size: int, seed: int | None, rank: int = 0, world: int = 1) -> None:
        self.count, self.batch_size, self.seed, self.rank, self.world = count, batch_size, seed, rank, world

    def __len__(self) -> int:
        if self.seed is None:
            return -(-len(range(self.rank, self.count, self.world)) // self.batch_size)
        return self.count // (self.batch_size * self.world)

    def epoch(self, epoch: int) -> list[Tensor]:
        """Return the image numbers of every batch of this process."""
        if self.seed is None:
            return list(torch.split(torch.arange(self.rank, self.count, self.world), self.batch_size))
        generator = torch.Generator().manual_seed(_mixed(self.seed, epoch, 0))
        order = torch.randperm(self.count, generator=generator)
        return list(torch.split(order, self.batch_size)[self.rank :: self.world][: len(self)])


class TensorBatches:
    """Batches of tensors in memory."""

    def __init__(self, images: Tensor, labels: Tensor, order: Order, device: torch.device) -> None:
        self.count, self.order, self.device = order.count, order, device
        fits = images.nbytes + labels.nbytes <= _RESIDENT_BYTES
        self.images, self.labels = (images.to(device), labels.to(device)) if fits else (images, labels)

    def __len__(self) -> int:
        return len(self.order)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of `epoch` from number `start` on."""
        batches = self.order.epoch(epoch)[start:]
        for rows in (batch.to(self.images.device) for batch in batches):
            images, labels = self.images.index_select(0, rows), self.labels.index_select(0, rows)
            yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


class DamagedImage(Exception):
    """Raised by `__getitem__` of a data set for an image that cannot be read; holds its name and the reason."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name, reason)
        self.name, self.reason = name, reason


class Damage:
    """The images of a data set that could not be read: each is logged once, and too many are an error.

    Args:
        total: images in the data set; more than 1 % of them is an error.
    """

    def __init__(self, total: int) -> None:
        self.total = total
        self.found: dict[str, str] = {}

    def add(self, *images: DamagedImage) -> None:
        """Add images; each is logged as a warning the first time.

        Raises:
            DataError: more than 1 % of the images are damaged; names some of them.
        """
        new = {image.name: image.reason for image in images if image.name not in self.found}
        self.found |= new
        if new and len(self.found) > DAMAGED_SHARE * self.total:
            names = "; ".join(f"{name} ({reason})" for name, reason in list(self.found.items())[:5])
            raise DataError(
                f"at least {len(self.found)} of {self.total} images cannot be read, more than {DAMAGED_SHARE:.0%}: "
                f"{names}; repair or remove them"
            )
        for name, reason in new.items():
            _log.warning("skipped damaged image %s (%s); %d of %d so far", name, reason, len(self.found), self.total)


class _Samples(Dataset[Any]):
    """`dataset` indexed by `(epoch, index)`, with torch's generator seeded for each image."""

    def __init__(self, dataset: Dataset[Any], count: int, seed: int | None) -> None:
        self.dataset, self.count, self.seed = dataset, count, seed

    def __getitem__(self, key: tuple[int, int]) -> tuple[Any, list[DamagedImage]]:
        epoch, index = key
        damaged: list[DamagedImage] = []
        if self.seed is None:
            return self._read(index, damaged), damaged
        with torch.random.fork_rng(devices=[]):
            for i in range(self.count):
                torch.manual_seed(_mixed(self.seed, epoch, index + i + 1))
                sample = self._read((index + i) % self.count, damaged)
                # More damaged images than this are an error anyway.
                if sample is not None or i > DAMAGED_SHARE * self.count:
                    return sample, damaged
        return None, damaged

    def _read(self, index: int, damaged: list[DamagedImage]) -> Any:
        try:
            return self.dataset[index]
        except DamagedImage as image:
            damaged.append(image)
            return None


def _collate(samples: list[tuple[Any, list[DamagedImage]]]) -> tuple[Any, list[DamagedImage]]:
    good = [sample for sample, _ in samples if sample is not None]
    return default_collate(good) if good else None, [image for _, damaged in samples for image in damaged]


class LoadedBatches:
    """Batches read through a `torch.utils.data.DataLoader`."""

    def __init__(self, dataset: Dataset[Any], order: Order, device: torch.device, num_workers: int) -> None:
        self.count, self.order, self.device, self.num_workers = order.count, order, device, num_workers
        self.samples = _Samples(dataset, order.count, order.seed)
        # One count for training and evaluation data, if the data set has it.
        self.damage: Damage = getattr(dataset, "damage", None) or Damage(order.count)

    def __len__(self) -> int:
        return len(self.order)

    def epoch(self, epoch: int = 0, start: int = 0) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield the batches of `epoch` from number `start` on.

        Raises:
            DataError: more than 1 % of the images cannot be read.
        """
        keys = [[(epoch, index) for index in batch.tolist()] for batch in self.order.epoch(epoch)[start:]]
        loader = DataLoader(
            self.samples,
            batch_sampler=keys,
            num_workers=min(self.num_workers, len(keys)),
            collate_fn=_collate,
            pin_memory=self.device.type == "cuda",
            # Its own generator: the default would draw from torch's global one in each epoch.
            generator=torch.Generator(),
        )
        for batch, damaged in loader:
            self.damage.add(*damaged)
            if batch is not None:
                images, labels = batch
                yield images.to(self.device, non_blocking=True), labels.to(self.device, non_blocking=True)


def make_batches(
    data: Data,
    batch_size: int,
    device: torch.device,
    *,
    seed: int | None = None,
    num_workers: int = 0,
    rank: int = 0,
    world: int = 1,
) -> Batches:
    """Return `data` in batches: with a `seed` shuffled and without a smaller last batch, else in order and complete.

    Args:
        data: `(images, labels)`, a `TensorDataset` of the two, or a map-style data set of `(image, label)`.

    Raises:
        DataError: the data set is empty, or images and labels differ in number.
        ConfigError: there are fewer images than in one batch of all processes.
    """
    tensors = data if isinstance(data, tuple) else data.tensors if isinstance(data, TensorDataset) else None
    count = len(tensors[0]) if tensors is not None else len(data)  # type: ignore[arg-type]
    if count == 0:
        raise DataError("the data set is empty; give at least one image")
    if tensors is not None and (len(tensors) != 2 or len(tensors[1]) != count):
        raise DataError(f"data of lengths {[len(t) for t in tensors]}; expected (images, labels) of one length")
    if seed is not None:
        check_batch_size(batch_size, count, world)
    order = Order(count, batch_size, seed, rank, world)
    if tensors is not None:
        return TensorBatches(tensors[0], tensors[1], order, device)
    assert isinstance(data, Dataset)
    return LoadedBatches(data, order, device, num_workers)


def check_batch_size(batch_size: int, count: int, world: int = 1) -> None:
    """Check that `count` training images fill a batch of each of `world` processes.

    Raises:
        ConfigError: they do not.
    """
    if batch_size * world > count:
        processes = f" x {world} processes" if world > 1 else ""
        raise ConfigError(
            f"batch_size={batch_size}{processes} exceeds the {count} training images; use {count // world} or less"
        )


def _mixed(seed: int, epoch: int, index: int) -> int:
    """A seed that differs for different (seed, epoch, index)."""
    mixed = 0
    for value in (seed, epoch, index):
        mixed = (mixed ^ value) * 0x9E3779B97F4A7C15 + 0x632BE59BD9B4E019 & 0x7FFFFFFFFFFFFFFF
    return mixed
