"""`slora compress`: writes an adapter as a small file of signs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def compress(
    adapter: Annotated[Path, typer.Argument(help="Adapter directory, or run directory of slora finetune.")],
    out: Annotated[Path, typer.Option(help="File to write; must not exist.")],
    density: Annotated[
        float, typer.Option(help="Share of the values of each LoRA matrix whose signs are kept, above 0 up to 1.")
    ] = 0.2,
    scale: Annotated[
        str,
        typer.Option(
            help="Factor on the signs: norm keeps the size of each update, fit makes its error least, a number is "
            "ComPEFT's alpha."
        ),
    ] = "norm",
) -> None:
    """Write an adapter as signs with one scale for each matrix (ComPEFT, arXiv 2311.13171); the head stays exact.

    \b
    Examples:
        slora compress runs/letters_vit-digits-selective --out small.safetensors
        slora decompress small.safetensors --out adapter
    """
    from slora.runs.read_results import adapter_of

    folder = adapter_of(adapter)
    from slora.adapters.compress import compress_adapter

    result = compress_adapter(folder, out, density, scale)
    width = max([5, *map(len, result.errors)])
    print(f"{'layer':{width}}  |dW - dW'| / |dW|")
    for name, error in result.errors.items():
        print(f"{name:{width}}  {error:17.3f}")
    blocks = f"{result.blocks} block{'' if result.blocks == 1 else 's'}"
    print(
        f"{blocks}: {result.before:,} bytes before, {result.after:,} after (of which {result.exact:,} are tensors that "
        f"are not compressed), relative error of the update {result.error:.3f}"
    )
    print(f"{out} becomes an adapter again with: slora decompress {out} --out FOLDER")
