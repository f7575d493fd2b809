"""`open_suite`: ImageNet and its shifted test sets from local folders, with the classes of each as ImageNet's."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from slora.errors import DataError
from slora.sources.eval_sets import EvalSet, image_files
from slora.sources.imagenet import class_names, subset, wnids
from slora.sources.suite_names import SUITES, class_folders, find_suite

# Its images have a red border (objectnet.dev); WiSE-FT cuts two pixels off.
OBJECTNET_BORDER = 2

_MAPPINGS = (
    "folder_to_objectnet_label.json", "objectnet_to_imagenet_1k.json", "pytorch_to_imagenet_2012_id.json",
    "imagenet_to_label_2012_v2",
)  # fmt: skip


def open_suite(name: str, root: Path, folder: Path | None = None) -> EvalSet:
    """Open a suite; its layout is in `slora.sources.suite_names.SUITES`.

    Args:
        root: where the folders of suites are.
        folder: that of this suite, if it is known.

    Raises:
        DataError: it is missing, its class folders are not those of the suite, or one has no image.
    """
    found = find_suite(name, root, folder)
    if name == "objectnet":
        return _objectnet(found)
    numbers = subset(name)
    names = [str(number) for number in numbers] if name == "imagenetv2" else [wnids()[number] for number in numbers]
    _check_folders(name, found, names)
    images = image_files(found, {folder: label for label, folder in enumerate(names)})
    return EvalSet(name, tuple(class_names()[n] for n in numbers), images, tuple((n,) for n in numbers))


def _check_folders(name: str, folder: Path, expected: Iterable[str]) -> None:
    expected, present = list(expected), class_folders(folder)
    unknown = sorted(set(present) - set(expected))
    missing = [each for each in expected if each not in set(present)]
    if unknown:
        raise DataError(
            f"{name}: {folder} has the folder {unknown[0]!r}, which is none of its classes; expected "
            f"{SUITES[name].classes}"
        )
    if missing:
        raise DataError(
            f"{name}: {folder} lacks {len(missing)} of {len(expected)} class folders, such as {missing[0]!r}; it was "
            f"not extracted completely"
        )


def _objectnet(folder: Path) -> EvalSet:
    """ObjectNet's images of the 113 classes that are also ImageNet's, by the mappings that it ships."""
    place = next((each for each in (folder.parent / "mappings", folder.parents[1] / "mappings") if each.is_dir()), None)
    if place is None:
        raise DataError(
            f"objectnet: {folder.parent / 'mappings'} does not exist; it holds {', '.join(_MAPPINGS)}, which come with "
            f"{SUITES['objectnet'].origin}"
        )
    groups = objectnet_groups(place)
    missing = sorted(set(groups) - set(class_folders(folder)))
    if missing:
        raise DataError(f"objectnet: {folder} lacks the class folder {missing[0]!r}; it was not extracted completely")
    names = sorted(groups)
    images = image_files(folder, {each: label for label, each in enumerate(names)}, OBJECTNET_BORDER)
    return EvalSet("objectnet", tuple(names), images, tuple(groups[each] for each in names))


def objectnet_groups(mappings: Path) -> dict[str, tuple[int, ...]]:
    """Return `{folder of ObjectNet: ImageNet classes}` of the classes that both have, by ObjectNet's own mappings.

    `objectnet_to_imagenet_1k.json` names the ImageNet classes of a label of ObjectNet, `folder_to_objectnet_label.json`
    its folder; line i of `imagenet_to_label_2012_v2` is the name of the class that `pytorch_to_imagenet_2012_id.json`
    gives the id i.

    Raises:
        DataError: a file is missing or damaged, or names a class that the others do not have.
    """
    try:
        folders, overlap, ids = (json.loads((mappings / name).read_text(encoding="utf-8")) for name in _MAPPINGS[:3])
        lines = (mappings / _MAPPINGS[3]).read_text(encoding="utf-8").splitlines()
        number = {int(line): int(i) for i, line in ids.items()}
        by_name = {text.strip(): number[i] for i, text in enumerate(lines) if i in number}
        by_label = {label: folder for folder, label in folders.items()}
        return {by_label[label]: _numbers(by_name, text) for label, text in overlap.items()}
    except OSError as error:
        raise DataError(
            f"objectnet: {error.filename} cannot be read ({error.strerror}); {mappings} holds {', '.join(_MAPPINGS)}, "
            f"which come with {SUITES['objectnet'].origin}"
        ) from error
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise DataError(f"objectnet: the files in {mappings} are damaged or do not fit together ({error!r})") from error


def _numbers(by_name: dict[str, Any], text: str) -> tuple[int, ...]:
    return tuple(by_name[name.strip()] for name in text.split(";"))
