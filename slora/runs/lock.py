"""One writer per run directory: a file lock, released when the process that holds it ends. Imports no torch."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from slora.errors import ConfigError
from slora.io.atomic import cannot_write
from slora.runs.rundir import ADAPTER, CHECKPOINTS, CONFIG, MODEL, TENSORBOARD

# Folders that this thread has locked, as (process, device, inode): neither another thread nor a child has both.
_ours: ContextVar[frozenset[tuple[int, int, int]]] = ContextVar("locked", default=frozenset())
# The descriptors that hold the locks of this process.
_open: set[int] = set()


@contextlib.contextmanager
def locked(out: Path) -> Iterator[None]:
    """Keep other runs, in this process or in others, from writing into `out` inside the context.

    The lock is reentrant. Check the content of the folder inside: before, another run may still change it.

    Raises:
        ConfigError: another run is writing into it, or a folder in it is a symbolic link.
        WriteError: the folder cannot be made.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(out, os.O_RDONLY)
    except OSError as error:
        raise cannot_write(out / CONFIG, error) from error
    status = os.fstat(descriptor)
    key = os.getpid(), status.st_dev, status.st_ino
    if key in _ours.get():
        os.close(descriptor)
        yield
        return
    _open.add(descriptor)
    token = _ours.set(_ours.get() | {key})
    try:
        _lock(descriptor, out)
        _refuse_links(out)
        yield
    finally:
        _ours.reset(token)
        if descriptor in _open:
            _open.discard(descriptor)
            os.close(descriptor)


def refuse_locked(out: Path) -> None:
    """Refuse a folder that another run is writing into: an early check that takes no lock.

    Raises:
        ConfigError: another run is writing into it.
    """
    try:
        descriptor = os.open(out, os.O_RDONLY)
    except OSError:
        return
    try:
        # Shared: processes of one run that check at the same time do not exclude each other.
        _lock(descriptor, out, shared=True)
    finally:
        os.close(descriptor)


def _lock(descriptor: int, out: Path, shared: bool = False) -> None:
    try:
        import fcntl
    except ImportError:
        return
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError as error:
        raise ConfigError(
            f"another run is writing into {out}; wait until it ends, or choose another run directory"
        ) from error
    except OSError:
        # A file system without locks.
        return


def _refuse_links(out: Path) -> None:
    """Refuse symbolic links, through which a run would write, or remove old checkpoints, elsewhere."""
    for path in (out / name for name in (CHECKPOINTS, TENSORBOARD, ADAPTER, MODEL)):
        if path.is_symlink():
            raise ConfigError(
                f"{path} is a link to {os.readlink(path)}, and a run writes only into its own folder; remove the "
                f"link, or make the whole run directory a link"
            )


def _close_in_child() -> None:
    # A lock lasts until every copy of its descriptor is closed: a DataLoader worker would hold it after a kill of the
    # run.
    while _open:
        os.close(_open.pop())


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_in_child)
