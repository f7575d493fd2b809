"""Folders in the layouts of ImageNet and its shifted test sets, with tiny images."""

from __future__ import annotations

import io
import json
from collections.abc import Iterable
from pathlib import Path

from PIL import Image

from slora.sources.imagenet import subset, wnids


def image(number: int, size: int = 8) -> bytes:
    """A PNG file of one colour that depends on `number`."""
    content = io.BytesIO()
    Image.new("RGB", (size, size), (number * 7 % 256, number * 31 % 256, number % 251)).save(content, "PNG")
    return content.getvalue()


def class_folders(root: Path, names: Iterable[str], count: int = 1, size: int = 8) -> None:
    """Write `count` images into each of the folders `names` of `root`."""
    for number, name in enumerate(names):
        (root / name).mkdir(parents=True)
        for each in range(count):
            (root / name / f"{each}.png").write_bytes(image(number + 5 * each, size))


# What ObjectNet's own files say of three labels, of which two are ImageNet's.
OBJECTNET = {"alarm_clock": (409, 530), "banana": (954,)}


def objectnet(root: Path) -> None:
    """Write ObjectNet with three of its folders and its mappings, of the classes 409, 530 and 954 of ImageNet."""
    class_folders(root / "images", ["air_freshener", "alarm_clock", "banana"], size=12)
    (root / "mappings").mkdir()
    labels = {"air_freshener": "Air freshener", "alarm_clock": "Alarm clock", "banana": "Banana"}
    overlap = {"Alarm clock": "analog clock; digital clock", "Banana": "banana"}
    # The ids of 2012 are in another order than the wnids.
    lines, ids = ["banana", "digital clock", "analog clock"], {"954": 0, "530": 1, "409": 2}
    (root / "mappings/folder_to_objectnet_label.json").write_text(json.dumps(labels))
    (root / "mappings/objectnet_to_imagenet_1k.json").write_text(json.dumps(overlap))
    (root / "mappings/pytorch_to_imagenet_2012_id.json").write_text(json.dumps(ids))
    (root / "mappings/imagenet_to_label_2012_v2").write_text("\n".join(lines) + "\n")


def all_suites(root: Path) -> Path:
    """Write all suites with an image per class, in their usual folders below `root`, and return it."""
    class_folders(root / "imagenet/val", wnids())
    class_folders(root / "imagenetv2-matched-frequency-format-val", map(str, range(1000)))
    for name in ("imagenet-r", "imagenet-a"):
        class_folders(root / name, [wnids()[number] for number in subset(name)])
    class_folders(root / "ImageNet-Sketch/sketch", wnids())
    objectnet(root / "objectnet-1.0")
    return root
