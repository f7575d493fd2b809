"""Errors and warnings on the command line: one line on stderr each, with a traceback only on request."""

from __future__ import annotations

import contextlib
import importlib
import os
import warnings
from collections.abc import Iterator
from typing import Any

from slora.errors import (
    CheckpointError,
    ConfigError,
    MissingDependencyError,
    NonFiniteLossError,
    TargetError,
    WriteError,
)


def rank(variable: str = "RANK") -> int:
    """Return the number of this process among those started by torchrun or `accelerate launch`; 0 without them."""
    number = os.environ.get(variable, "")
    return int(number) if number.isdigit() else 0


def all_processes_fail(error: Exception) -> bool:
    """Whether the first process on this machine, which is another one, is sure to raise the same error."""
    types = (ConfigError, TargetError, CheckpointError, NonFiniteLossError, ImportError)
    return rank("LOCAL_RANK") > 0 and isinstance(error, types) and not isinstance(error, WriteError)


def show_tracebacks() -> bool:
    """Whether the user asked for tracebacks, by --traceback or SLORA_TRACEBACK."""
    return os.environ.get("SLORA_TRACEBACK", "").strip().lower() not in ("", "0", "false", "no")


def as_text(error: BaseException) -> str:
    """Return the message of an error on one line."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror is not None:
        return f"{error.filename}: {error.strerror}"
    return " ".join(str(error).split()) or type(error).__name__


def print_error(text: str) -> None:
    """Print an error in red on stderr, with the number of the process if there are several."""
    _print("error", text, "red")


@contextlib.contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print warnings in the block like errors, in yellow; with tracebacks, as Python does."""
    with warnings.catch_warnings():
        usual = warnings.showwarning

        def show(message: Warning | str, *where: Any, **to: Any) -> None:
            if show_tracebacks():
                usual(message, *where, **to)
            else:
                _print("warning", " ".join(str(message).split()), "yellow")

        warnings.showwarning = show
        yield


def _print(what: str, text: str, colour: str) -> None:
    from rich.console import Console

    where = f" in process {rank()}" if rank() else ""
    Console(stderr=True, soft_wrap=True).print(f"{what}{where}: {text}", style=colour, markup=False, highlight=False)


def imported(module: str, command: str) -> Any:
    """Import a module that needs the training extra.

    Raises:
        MissingDependencyError: it cannot be imported; names the `command` and how to install it.
    """
    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingDependencyError(
            f'slora {command} cannot be imported ({error}); install it with: pip install "slora[train]"'
        ) from error
