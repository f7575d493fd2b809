"""Packages of the training extra, imported at first use."""

from __future__ import annotations

import importlib
from typing import Any

from slora.errors import MissingDependencyError


def imported(module: str) -> Any:
    """Import a module of timm, open_clip or torchvision.

    Raises:
        MissingDependencyError: it is not installed, or broken; says how to install it.
    """
    try:
        return importlib.import_module(module)
    except (ImportError, RuntimeError) as error:
        package = module.partition(".")[0]
        raise MissingDependencyError(
            f'{package} cannot be imported ({first_line(error)}); pip install "slora[train]"'
        ) from error


def first_line(error: Exception) -> str:
    """Return the first line of an error's message, or its type."""
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
