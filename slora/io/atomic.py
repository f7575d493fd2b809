"""Writing files: after a kill or a full disk, a file is the old one or the new one, never half of one."""

from __future__ import annotations

import contextlib
import errno
import functools
import glob
import json
import os
import re
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from slora.errors import WriteError

_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_NOT_ALLOWED = {errno.EACCES, errno.EPERM, errno.EROFS}

# Seconds in which the writer of a temporary file may not have locked it yet.
_YOUNG = 60


def write_atomically(path: str | os.PathLike[str], write: Callable[[Path], None]) -> None:
    """Call `write(temporary)` and rename the result to `path`, flushed to disk first.

    A kill at any time leaves the previous file. The temporary file is removed if `write` fails.

    Raises:
        WriteError: the disk is full or the folder cannot be written; names the file, the cause and the remedy.
    """
    write_together({path: write})


def write_together(writes: Mapping[str | os.PathLike[str], Callable[[Path], None]]) -> None:
    """Write several files that belong together: none is renamed before all of them are on disk.

    The last file makes the others valid. Until it is renamed, the previous versions of the others exist as
    `earlier(path)`, so a kill between two renames loses nothing: a reader that finds another file inconsistent with the
    last one uses the earlier version. An existing `earlier(path)` is not overwritten.

    Raises:
        WriteError: the disk is full or the folder cannot be written; all files are unchanged.
    """
    staged: list[tuple[Path, Path]] = []
    target = Path()
    locks = contextlib.ExitStack()
    try:
        for path, write in writes.items():
            target = Path(path)
            target.parent.mkdir(parents=True, exist_ok=True)
            staged.append((_staged(target, write, locks), target))
        _rename(staged)
        _remove_left(staged)
    except OSError as error:
        raise cannot_write(error.filename2 or target, error) from error
    except Exception as error:
        # safetensors reports a full disk with its own exception.
        if type(error).__module__.startswith("safetensors"):
            raise cannot_write(target, error) from error
        raise
    finally:
        for temporary, _ in staged:
            temporary.unlink(missing_ok=True)
        locks.close()


def _rename(staged: Sequence[tuple[Path, Path]]) -> None:
    """Rename staged files to their targets, the last one at the end; on an error, none of them."""
    others = staged[:-1]
    undo: list[Callable[[], None]] = []
    try:
        for _, target in others:
            before = earlier(target)
            if before.exists():
                continue
            if target.is_symlink() or target.is_file():
                os.replace(target, before)
                undo.append(functools.partial(os.replace, before, target))
            elif not target.exists():
                undo.append(functools.partial(target.unlink, missing_ok=True))
        for temporary, target in others:
            os.replace(temporary, target)
        if others:
            _sync_folders(staged)
        os.replace(*staged[-1])
    except BaseException:
        for action in undo:
            with contextlib.suppress(OSError):
                action()
        raise
    _sync_folders(staged)
    # In reverse: as long as any earlier version exists, that of the first file does.
    for _, target in reversed(others):
        earlier(target).unlink(missing_ok=True)


def _remove_left(staged: Sequence[tuple[Path, Path]]) -> None:
    """Remove temporary files of the same targets that killed processes have left: old and not locked."""
    for _, target in staged:
        for left in target.parent.glob(f".{glob.escape(target.name)}.*.tmp"):
            with contextlib.suppress(OSError):
                descriptor = os.open(left, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
                try:
                    if time.time() - os.fstat(descriptor).st_mtime > _YOUNG and _locked(descriptor):
                        left.unlink()
                finally:
                    os.close(descriptor)


def _locked(descriptor: int) -> bool:
    """Lock a file while it is open, and return whether that was possible."""
    try:
        import fcntl

        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (ImportError, OSError):
        return False
    return True


def earlier(path: Path) -> Path:
    """Return the path of the earlier version of a file during `write_together`."""
    return path.with_name(f".{path.name}.earlier")


def _staged(target: Path, write: Callable[[Path], None], locks: contextlib.ExitStack) -> Path:
    """The new content of `target` on disk, under a temporary name beside it, locked until `locks` is closed."""
    descriptor, name = tempfile.mkstemp(dir=target.parent, prefix=f".{target.name}.", suffix=".tmp")
    if _locked(descriptor):
        locks.callback(os.close, descriptor)
    else:
        os.close(descriptor)
    temporary = Path(name)
    try:
        write(temporary)
        with open(temporary, "rb+") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o666 & ~umask())
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    return temporary


def write_json(path: str | os.PathLike[str], value: Any) -> None:
    """Write `value` as indented JSON, atomically."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Return `value` as indented JSON with sorted keys."""
    return json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n"


def write_text(path: str | os.PathLike[str], text: str) -> None:
    """Write `text` in UTF-8, atomically."""
    write_atomically(path, text_writer(text))


def text_writer(text: str) -> Callable[[Path], None]:
    """Return a function for `write_atomically` that writes `text` in UTF-8."""

    def write(path: Path) -> None:
        path.write_text(text, encoding="utf-8")

    return write


def cannot_write(
    path: str | os.PathLike[str],
    error: Exception,
    then: str = "",
    note: str = "The file is unchanged.",
) -> WriteError:
    """Return the error for a `path` that could not be written: cause, remedy, `then`, `note`.

    Args:
        error: of the system, or of safetensors.
        then: what to do after the remedy, such as ", then resume the run".
        note: a sentence about the existing files.
    """
    reason = getattr(error, "strerror", None) or error
    number = _errno(error)
    remedy = "choose another folder"
    if number in _FULL:
        remedy = "free space or choose another folder"
    elif number in _NOT_ALLOWED:
        remedy = "choose a folder that you may write to"
    elif number in (errno.ENOTDIR, errno.EEXIST):
        reason = next((f"{parent} is not a folder" for parent in _parents(path) if not parent.is_dir()), reason)
    return WriteError(f"{path} could not be written ({reason}); {remedy}{then}. {note}")


def _errno(error: Exception) -> int | None:
    if isinstance(error, OSError):
        return error.errno
    # safetensors has the number only in its message.
    found = re.search(r"\(os error (\d+)\)", str(error))
    return int(found[1]) if found else None


def _parents(path: str | os.PathLike[str]) -> list[Path]:
    """The existing parents of `path`, the outermost first."""
    return [parent for parent in reversed(Path(path).parents) if parent.exists()]


def umask() -> int:
    """Return the umask of this process."""
    # It can only be read by setting it.
    mask = os.umask(0)
    os.umask(mask)
    return mask


def _sync_folders(staged: Sequence[tuple[Path, Path]]) -> None:
    for folder in {target.parent for _, target in staged}:
        _sync_folder(folder)


def _sync_folder(folder: Path) -> None:
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(folder, os.O_DIRECTORY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
