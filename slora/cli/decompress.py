"""`slora decompress`: makes an adapter directory of a compressed file."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def decompress(
    file: Annotated[Path, typer.Argument(help="File of slora compress.")],
    out: Annotated[Path, typer.Option(help="Adapter directory to write; must not exist.")],
) -> None:
    """Write the adapter that a file of slora compress holds, for slora and PEFT.

    \b
    Example:
        slora decompress small.safetensors --out adapter
    """
    from slora.adapters.compress import decompress_adapter

    decompress_adapter(file, out)
    print(f"{out} holds the adapter")
