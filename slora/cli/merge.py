"""`slora merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slora.cli.checkpoint_option import CHECKPOINT, check_early, note_undecided


def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter directory, or run directory of slora finetune.")],
    out: Annotated[Path, typer.Option(help="safetensors file to write; must not exist.")],
    model: Annotated[
        str | None,
        typer.Option(help="Model the adapter belongs to, as in finetune. [default: the run's]"),
    ] = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Merge into the model's pretrained weights. [default: as the run]")
    ] = False,
    classes: Annotated[
        int | None,
        typer.Option(
            min=1, max=10_000_000, help="Outputs of the classifier head. [default: those of the head in the adapter]"
        ),
    ] = None,
    scale: Annotated[float, typer.Option(help="Factor on the update; values between 0 and 1 interpolate.")] = 1.0,
    checkpoint: Annotated[str | None, typer.Option(help=CHECKPOINT)] = None,
) -> None:
    """Merge the active blocks of an adapter into its model and write plain weights.

    \b
    Examples:
        slora merge runs/letters_vit-digits-selective --out merged.safetensors
        slora merge runs/letters_vit-digits-selective --checkpoint best --out best.safetensors
        slora merge my-adapter --model timm/vit_base_patch16_224 --pretrained --out merged.safetensors
    """
    check_early(adapter, checkpoint)
    from slora.training.merge_run import merge_adapter

    count = merge_adapter(adapter, out, model, pretrained, classes, scale, checkpoint)
    print(f"{count} block{'' if count == 1 else 's'} merged; {out} holds the plain model")
    if checkpoint is not None:
        note_undecided(adapter, checkpoint)
