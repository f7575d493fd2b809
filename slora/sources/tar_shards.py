"""Images in tar files, in CLIP-benchmark's webdataset layout: `test/0.tar`, `test/1.tar`, ...

A sample is the members of one key: `KEY.jpg` (or `.png`, `.webp`) with `KEY.cls`, its label, or with `KEY.txt`, its
captions, one a line.
"""

from __future__ import annotations

import io
import tarfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from PIL import Image
from torch.utils.data import Dataset

from slora.errors import DataError

_IMAGES = ("jpg", "jpeg", "png", "webp")


class _Member(NamedTuple):
    file: str
    offset: int
    size: int

    def read(self) -> bytes:
        with open(self.file, "rb") as stream:
            stream.seek(self.offset)
            return stream.read(self.size)


def shards(folder: Path) -> list[Path]:
    """Return the tar files of a data set, in order: those in `test/`, else in the folder itself."""
    for place in (folder / "test", folder):
        found = sorted(place.glob("*.tar"), key=lambda path: (len(path.stem), path.stem))
        if found:
            return found
    return []


class TarImages(Dataset[Any]):
    """The images of tar files with their label, or with their number if they have captions.

    Raises:
        DataError: a tar file is damaged, an image has neither a label nor captions, or there is none.
    """

    def __init__(self, files: Sequence[Path]) -> None:
        self.samples: list[tuple[str, _Member]] = []
        self._texts: list[_Member] = []
        self.captioned = False
        for file in files:
            self._add(file)
        if not self.samples:
            raise DataError(f"the evaluation set {files[0].parent} is empty: its tar files hold no image")

    def _add(self, file: Path) -> None:
        members: dict[str, dict[str, _Member]] = {}
        try:
            with tarfile.open(file, "r:") as archive:
                for entry in archive:
                    if entry.isfile():
                        key, _, kind = entry.name.rpartition(".")
                        members.setdefault(key, {})[kind.lower()] = _Member(str(file), entry.offset_data, entry.size)
        except (tarfile.TarError, OSError) as error:
            raise DataError(f"{file} cannot be read ({error}); get it again") from error
        for key, parts in members.items():
            image = next((parts[kind] for kind in _IMAGES if kind in parts), None)
            if image is None:
                continue
            text = parts.get("cls") or parts.get("txt")
            if text is None:
                raise DataError(f"{file}: {key} has neither a label ({key}.cls) nor captions ({key}.txt)")
            self.captioned = "cls" not in parts
            self.samples.append((f"{file}:{key}", image))
            self._texts.append(text)

    def labels(self) -> list[int]:
        """Return the label of each image.

        Raises:
            DataError: an image has captions instead, or its label is not a number from 0 up.
        """
        found = []
        for (name, _), text in zip(self.samples, self._texts, strict=True):
            content = text.read().decode(errors="replace").strip()
            if self.captioned or not content.isdecimal():
                raise DataError(f"{name} has no label; a webdataset for classification has a file {name}.cls with it")
            found.append(int(content))
        return found

    def captions(self) -> list[list[str]]:
        """Return the captions of each image."""
        return [
            [line.strip() for line in text.read().decode(errors="replace").splitlines() if line.strip()]
            for text in self._texts
        ]

    def __len__(self) -> int:
        return len(self.samples)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image = Image.open(io.BytesIO(self.samples[index][1].read())).convert("RGB")
        return image, index if self.captioned else int(self._texts[index].read())
