"""What a protocol needs and this machine lacks: pretrained weights and data."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from slora.errors import ConfigError, DataError
from slora.sources.captions import open_captions
from slora.sources.data import open_data
from slora.sources.eval_sets import open_eval_set
from slora.sources.models import check_name
from slora.sources.optional import imported
from slora.sources.registry import CLIPS, MODELS
from slora.sources.suite_names import class_folders, find_suite

# Files of weights in a repository of the hub, as timm and open_clip look for them.
_WEIGHTS = (
    "model.safetensors", "pytorch_model.bin", "open_clip_model.safetensors", "open_clip_pytorch_model.safetensors",
    "open_clip_pytorch_model.bin",
)  # fmt: skip


class Need(NamedTuple):
    """Something that is missing."""

    what: str
    where: str
    """Where it was looked for, and how to get it."""


def imagenet(root: Path) -> str:
    """Return the data set that ImageNet is on this machine, as `slora finetune --data` takes it.

    `imagefolder:FOLDER` where a folder of its usual names in `root` has `train/` and `val/` with wnid folders; else
    `imagenet`, which torchvision sorts out of the archives in `root`.
    """
    try:
        folder = find_suite("imagenet", root).parent
    except DataError:
        return "imagenet"
    return f"imagefolder:{folder}" if class_folders(folder / "train") else "imagenet"


def missing(
    model: str,
    pretrained: bool | str,
    data: str,
    root: Path,
    *,
    suites: dict[str, Path | None],
    eval_root: Path,
    zero_shot: Sequence[str],
    retrieval: Sequence[Path],
    source: str | None,
    download: bool,
) -> list[Need]:
    """Return what is not on this machine; empty if the protocol can be run.

    Args:
        download: whether weights and data sets of torchvision may be downloaded; then they are not missing.

    Raises:
        ConfigError: a name is unknown.
    """
    found = [] if download else list(_weights(model, pretrained))
    names = [data] if source in (None, data) else [data, source]
    opened: list[tuple[str, Callable[[], object]]] = []
    opened += [(f"data set {name}", partial(_opened, name, root, download)) for name in names if name]
    opened += [(f"test set {name}", partial(find_suite, name, eval_root, path)) for name, path in suites.items()]
    opened += [(f"zero-shot set {name}", partial(open_eval_set, name, root, download)) for name in zero_shot]
    opened += [(f"captions {path}", partial(open_captions, path)) for path in retrieval]
    for what, call in opened:
        try:
            call()
        except DataError as error:
            # The message begins with the name, as `what` ends, and torchvision's hint is for Python.
            why = str(error).removeprefix(f"{what.rpartition(' ')[2]}: ").replace("download=True", "--download")
            found.append(Need(what, why))
    return found


def _opened(name: str, root: Path, download: bool) -> object:
    try:
        return open_data(name, root, download)
    except DataError as error:
        if name != "imagenet":
            raise
        raise DataError(
            f"{root}/imagenet with train/ and val/, each with the 1000 wnid folders such as n01440764, does not exist, "
            f"nor do the archives of image-net.org in {root} ({error})"
        ) from error


def _weights(model: str, pretrained: bool | str) -> Iterator[Need]:
    """The pretrained weights of a model, if they are in none of the caches that its package reads."""
    source, architecture, tag = check_name(model, pretrained)
    if not pretrained and not tag:
        raise ConfigError(
            f"model={model!r} without pretrained weights knows nothing to forget; name them (--pretrained)"
        )
    if model in MODELS or model in CLIPS or Path(tag).is_file() or architecture.startswith(("hf-hub:", "local-dir:")):
        return
    if source == "timm":
        config = imported("timm").models.get_pretrained_cfg(f"{architecture}.{tag}" if tag else architecture)
        hub, url = (config.hf_hub_id, config.url) if config is not None else (None, None)
        cache = Path(imported("torch.hub").get_dir()) / "checkpoints"
    else:
        config = imported("open_clip").get_pretrained_cfg(architecture, tag)
        hub, url, cache = config.get("hf_hub"), config.get("url"), Path("~/.cache/clip").expanduser()
    if hub:
        yield from _in_hub(model, tag, str(hub))
    elif not url or not (cache / Path(str(url)).name).is_file():
        yield Need(f"weights of {model} {tag}".rstrip(), f"looked for {cache / Path(str(url)).name}; from {url}")


def _in_hub(model: str, tag: str, entry: str) -> Iterator[Need]:
    hub: Any = imported("huggingface_hub")
    repository, _, file = entry.partition("/")[2].partition("/")
    repository = f"{entry.partition('/')[0]}/{repository}"
    names = [file, *_WEIGHTS] if file else _WEIGHTS
    if not any(isinstance(hub.try_to_load_from_cache(repository, name), str) for name in names):
        folder = Path(hub.constants.HF_HUB_CACHE) / f"models--{repository.replace('/', '--')}"
        yield Need(
            f"weights of {model} {tag}".rstrip(),
            f"looked for {folder}; download them with: hf download {repository}, or run with --download, or on another "
            f"machine and copy that folder here",
        )
