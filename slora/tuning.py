"""Which form is the fastest for a shape: measured once, remembered on disk.

`choose` times the candidates with CUDA events the first time that a shape class is seen, and writes the result to
`forms.json` in the folder `SLORA_CACHE` (default: `slora` in `XDG_CACHE_HOME` or `~/.cache`). An entry holds for one
device name, one version of torch and of Triton and one text of the kernels. Delete the file to measure anew.

Rows are counted in powers of two, rounded up. A number of rows that was not measured takes the choice of the next
larger one that was, so that a ragged last batch measures nothing.

Nothing is measured, and the first candidate taken unless the file knows better, while a CUDA graph is captured; and the
first is always taken under `torch.use_deterministic_algorithms`, because a measurement may turn out otherwise in the
next run and another form rounds otherwise.
"""

from __future__ import annotations

import functools
import hashlib
import os
import statistics
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from slora import files
from slora.errors import CheckpointError

FORMAT = 1
Candidates = Mapping[str, Callable[[], Any]]
_Entries = dict[str, dict[str, Any]]

_lock = threading.Lock()
_known: dict[tuple[Path, str], _Entries] = {}


def choose(shape: str, M: int, device: torch.device, candidates: Candidates) -> str:
    """Return the name of the fastest of `candidates`.

    Args:
        shape: the shape class without its rows: operation, sizes, dtypes.
        M: rows.
        device: where they run.
        candidates: callables by name; the first is the default. They must be free of side effects, because they are
            called several times.
    """
    default = next(iter(candidates))
    if len(candidates) == 1 or torch.are_deterministic_algorithms_enabled():
        return default
    with _lock:
        entries = _entries(device)
        found = _lookup(entries, shape, M)
        if found is not None and found in candidates:
            return found
        if torch.cuda.is_available() and torch.cuda.is_current_stream_capturing():
            return default
        times = _times(candidates, device)
        fastest = min(times, key=times.__getitem__)
        entry = {"choice": fastest, "milliseconds": {name: round(t, 5) for name, t in times.items()}}
        _remember(device, _key(shape, _bucket(M)), entry)
        return fastest


def cache_file() -> Path:
    """Return the file in which choices are kept, whether or not it exists."""
    folder = os.environ.get("SLORA_CACHE")
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "slora")
    return Path(folder).expanduser() / "forms.json"


def describe_cache() -> str:
    """Return the cache file and how many choices it holds, for `slora doctor`."""
    path = cache_file()
    count = sum(len(entries) for entries in _read(path).values())
    return f"{path} ({count} choices)" if path.exists() else f"{path} (not written yet)"


def _bucket(M: int) -> int:
    return 1 << max(0, M - 1).bit_length()


def _key(shape: str, bucket: int) -> str:
    return f"{shape} M<={bucket}"


def _lookup(entries: _Entries, shape: str, M: int) -> str | None:
    bucket = _bucket(M)
    while bucket <= 1 << 40:
        entry = entries.get(_key(shape, bucket))
        if entry is not None:
            return str(entry["choice"])
        bucket *= 2
    return None


def _times(candidates: Candidates, device: torch.device) -> dict[str, float]:
    """Milliseconds of each candidate; those that the device has no room for are left out."""
    from triton.runtime.errors import OutOfResources

    times = {}
    failure: Exception | None = None
    for name, call in candidates.items():
        try:
            times[name] = _milliseconds(call, device)
        except (OutOfResources, torch.cuda.OutOfMemoryError) as error:
            failure = error
    if not times:
        assert failure is not None
        raise failure
    return times


def _milliseconds(call: Callable[[], Any], device: torch.device) -> float:
    """Median time of a call, by CUDA events, after two that compile and warm up."""
    with torch.cuda.device(device):
        for _ in range(2):
            call()
        times: list[float] = []
        for _ in range(7):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
            start.record()
            call()
            stop.record()
            stop.synchronize()
            times.append(start.elapsed_time(stop))
    return statistics.median(times)


def _entries(device: torch.device) -> _Entries:
    place = cache_file(), environment(device)
    if place not in _known:
        _known[place] = _read(place[0]).get(place[1], {})
    return _known[place]


def _remember(device: torch.device, key: str, entry: dict[str, Any]) -> None:
    _entries(device)[key] = entry
    path, ours = cache_file(), environment(device)
    # What other processes wrote meanwhile is kept. Two that write at the same instant lose one entry, to be measured
    # again; the file is always one or the other, whole.
    environments = _read(path)
    environments.setdefault(ours, {})[key] = entry
    try:
        files.write_json(path, {"format": FORMAT, "environments": environments})
    except CheckpointError as error:
        _warn(f"the measured choice of kernels is not remembered: {error} Set SLORA_CACHE to a folder to write to.")


def _read(path: Path) -> dict[str, _Entries]:
    """What the file says, by environment; nothing, with a warning, where it is damaged or something else."""
    if not path.exists():
        return {}
    try:
        content = files.read_json(path)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
        environments: dict[str, _Entries] = content["environments"]
        for entries in environments.values():
            for entry in entries.values():
                str(entry["choice"])
        return environments
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError) as error:
        _warn(f"{path} is ignored and will be written anew, because it is not a cache of slora ({error!r})")
        return {}


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


@functools.cache
def environment(device: torch.device) -> str:
    """Return what a choice depends on beside the shape: device, versions, the kernels' own text."""
    import importlib.metadata

    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    return f"{name}, torch {torch.__version__}, triton {importlib.metadata.version('triton')}, kernels {_kernels()}"


@functools.cache
def _kernels() -> str:
    digest = hashlib.sha256()
    for source in sorted((Path(__file__).parent / "kernels").glob("*.py")):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    return digest.hexdigest()[:12]
