"""Which algorithm is the fastest for a shape: measured once, cached on disk.

`choose` times the candidates with CUDA events the first time that a shape class is seen, and writes the result to
`forms.json` in the folder `SLORA_CACHE` (default: `slora` in `XDG_CACHE_HOME` or `~/.cache`). An entry holds for one
device name, one version of torch and of Triton and one source of the kernels. Delete the file to measure again.

The number of rows is rounded up to a power of two, and each power is measured by itself. Several calls are queued
behind a delay, so that the device does not wait for Python. In eager mode, where it may, a call counts as the device's
time and the longer of that and `HOST` times the host's: of a small layer the fewest launches win, and among them the
fastest tiles, of a large one the fastest kernels.

During capture of a CUDA graph: the cached choice, else the default. Warm up inside `slora.gates_on_device()`, which
measures what the graph will run. Under `torch.use_deterministic_algorithms` it is always the default, because the next
run may measure otherwise, and another algorithm rounds otherwise.
"""

from __future__ import annotations

import functools
import hashlib
import os
import statistics
import threading
import time
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

from slora.errors import CheckpointError
from slora.io import atomic
from slora.io.bounded import read_json

FORMAT = 6
# Calls between two events, how often they are timed, and the cycles of the delay before them: about 2 ms, for launches
# of some 50 us each.
CALLS, SAMPLES, DELAY = 5, 5, 4_000_000
# Of what the host does for a layer in a training step, these calls are a third at most (LOG.md of the benchmarks).
HOST = 3
Candidates = Mapping[str, Callable[[], Any]]

_lock = threading.Lock()


def choose(shape: str, M: int, device: torch.device, candidates: Candidates, eager: bool = False) -> str | None:
    """Return the name of the fastest of `candidates`; None during capture if it is not cached: use the first then.

    Args:
        shape: the shape class without its rows: operation, sizes, dtypes.
        M: rows.
        device: where they run.
        candidates: callables by name; the first is the default. They must be free of side effects, because they are
            called several times.
        eager: whether Python will launch them each time; a graph will otherwise.
    """
    default = next(iter(candidates))
    if len(candidates) == 1 or torch.are_deterministic_algorithms_enabled():
        return default
    with _lock:
        key = f"{shape} M<={bucket(M)}"
        entry = _read(cache_file()).get(environment(device), {}).get(key)
        if entry is not None and entry["choice"] in candidates:
            return str(entry["choice"])
        if _capturing(device):
            return None
        times = _times(candidates, device, eager)
        fastest = min(times, key=times.__getitem__)
        _remember(device, key, {"choice": fastest, "milliseconds": times})
        return fastest


def bucket(M: int) -> int:
    """Return the number of rows that stands for `M`: the next power of two."""
    return 1 << max(0, M - 1).bit_length()


def _capturing(device: torch.device) -> bool:
    if device.type != "cuda":
        return False
    with torch.cuda.device(device):
        return torch.cuda.is_current_stream_capturing()


def cache_file() -> Path:
    """Return the file of cached choices, whether or not it exists."""
    folder = os.environ.get("SLORA_CACHE")
    if not folder:
        folder = os.path.join(os.environ.get("XDG_CACHE_HOME") or os.path.join("~", ".cache"), "slora")
    return Path(folder).expanduser() / "forms.json"


def describe_cache() -> str:
    """Return the cache file and how many choices it holds, for `slora doctor`."""
    path = cache_file()
    count = sum(len(entries) for entries in _read(path).values())
    return f"{path} ({count} choices)" if path.exists() else f"{path} (not written yet)"


def _times(candidates: Candidates, device: torch.device, eager: bool) -> dict[str, float]:
    """Milliseconds of each candidate; those that the device cannot run are left out.

    Tiles that are too large for the device are skipped silently; any other failure gives a warning, unless all fail.
    """
    from triton.runtime.errors import OutOfResources

    times: dict[str, float] = {}
    failures: dict[str, Exception] = {}
    for name, call in candidates.items():
        try:
            times[name] = round(_milliseconds(call, device, eager), 5)
        except Exception as error:
            failures[name] = error
    if not times:
        raise next(iter(failures.values()))
    for name, failure in failures.items():
        if not isinstance(failure, (OutOfResources, torch.cuda.OutOfMemoryError)):
            _warn(f"{name} is left out on {device}, because it fails ({type(failure).__name__}: {failure})")
    return times


def _milliseconds(call: Callable[[], Any], device: torch.device, eager: bool) -> float:
    """Median time of a call on the device, after two that compile and warm up; if `eager`, with the host's, see
    above.

    A delay is queued first, for as long as Python takes to queue the calls behind it.
    """
    with torch.cuda.device(device):
        for _ in range(2):
            call()
        torch.cuda.synchronize()
        on_device: list[float] = []
        on_host: list[float] = []
        for _ in range(SAMPLES):
            start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            torch.cuda._sleep(DELAY)
            start.record()
            began = time.perf_counter()
            for _ in range(CALLS):
                call()
            on_host.append((time.perf_counter() - began) * 1000 / CALLS)
            stop.record()
            stop.synchronize()
            on_device.append(start.elapsed_time(stop) / CALLS)
    milliseconds = statistics.median(on_device)
    return milliseconds + max(milliseconds, HOST * min(on_host)) if eager else milliseconds


def _remember(device: torch.device, key: str, entry: dict[str, Any]) -> None:
    # Reads the file again, to keep what other processes wrote meanwhile. If two write at the same instant, one entry is
    # lost and measured again later; the file is complete either way.
    path = cache_file()
    environments = _read(path)
    environments.setdefault(environment(device), {})[key] = entry
    try:
        atomic.write_json(path, {"format": FORMAT, "environments": environments})
    except CheckpointError as error:
        _warn(f"the measured choice of kernels is not cached: {error} Set SLORA_CACHE to a folder to write to.")


def _read(path: Path) -> dict[str, dict[str, dict[str, Any]]]:
    """The content of the file, by environment; empty, with a warning, if it is damaged or no such cache."""
    if not path.exists():
        return {}
    try:
        content = read_json(path)
        if content["format"] != FORMAT:
            raise ValueError(f"format {content['format']!r}, expected {FORMAT}")
        environments: dict[str, dict[str, dict[str, Any]]] = content["environments"]
        [entry["choice"] for entries in environments.values() for entry in entries.values()]
        return environments
    except (CheckpointError, KeyError, TypeError, ValueError, AttributeError) as error:
        _warn(f"{path} is ignored and will be written again, because it is not a cache of slora ({error!r})")
        return {}


@functools.cache
def _warn(message: str) -> None:
    warnings.warn(message, stacklevel=2)


@functools.cache
def environment(device: torch.device) -> str:
    """Return what a choice is valid for: the device, the versions, and a hash of the kernels and the algorithms."""
    import importlib.metadata

    here = Path(__file__).parent
    sources = [here / name for name in ("algorithms.py", "triton.py", "eager.py")]
    digest = hashlib.sha256()
    for source in (*sorted((here.parents[1] / "kernels").glob("*.py")), *sources):
        digest.update(source.name.encode() + b"\0" + source.read_bytes() + b"\0")
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    triton, kernels = importlib.metadata.version("triton"), digest.hexdigest()[:12]
    return f"{name}, torch {torch.__version__}, triton {triton}, kernels {kernels}"
