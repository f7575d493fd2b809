"""`slora merge`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slora.cli.checkpoint_option import CHECKPOINT, check_early, note_undecided
from slora.cli.evaluate import listed
from slora.errors import ConfigError


def merge(
    adapter: Annotated[Path, typer.Argument(help="Adapter directory, or run directory of slora finetune.")],
    out: Annotated[
        Path | None, typer.Option(help="safetensors file to write; must not exist. Needed without --sweep.")
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(help="Model the adapter belongs to, as in finetune. [default: the run's]"),
    ] = None,
    pretrained: Annotated[
        str | None,
        typer.Option(
            help="Merge into the model's pretrained weights, as in finetune. [default: as the run]", metavar="[VALUE]"
        ),
    ] = None,
    classes: Annotated[
        int | None,
        typer.Option(
            min=1, max=10_000_000, help="Outputs of the classifier head. [default: those of the head in the adapter]"
        ),
    ] = None,
    scale: Annotated[float, typer.Option(help="Factor on the update; values between 0 and 1 interpolate.")] = 1.0,
    checkpoint: Annotated[str | None, typer.Option(help=CHECKPOINT)] = None,
    sweep: Annotated[
        str | None,
        typer.Option(help="Measure a run at these scales, such as 0,0.25,0.5,0.75,1, and write no weights."),
    ] = None,
    source: Annotated[
        str | None, typer.Option(help="With --sweep: data set of the pretraining, for k-NN. [default: none]")
    ] = None,
    zero_shot: Annotated[
        str | None, typer.Option(help="With --sweep, for a CLIP: zero-shot sets, as in evaluate. [default: none]")
    ] = None,
) -> None:
    """Merge the active blocks of an adapter into its model and write plain weights.

    --sweep shows first which --scale keeps how much: accuracy on the run's data against k-NN on --source, or zero-shot
    accuracy on --zero-shot, printed, drawn in sweep.png and written to sweep.json in the run directory.

    A run with a zero-shot head gives both towers: open_clip.create_model(ARCH, pretrained="merged.safetensors").

    \b
    Examples:
        slora merge runs/letters_vit-digits-selective --out merged.safetensors
        slora merge runs/letters_vit-digits-selective --checkpoint best --out best.safetensors
        slora merge runs/letters_vit-digits-selective --sweep 0,0.25,0.5,0.75,1 --source letters
        slora merge runs/clip --sweep 0,0.5,1 --zero-shot cifar100,/data/birds
        slora merge my-adapter --model timm/vit_base_patch16_224 --pretrained --out merged.safetensors
    """
    check_early(adapter, checkpoint, source)
    if sweep is not None:
        given = {"out": out, "model": model, "pretrained": pretrained, "classes": classes}
        named = next((f"--{name}" for name, value in given.items() if value is not None), "")
        named = "--scale" if scale != 1.0 else named
        if named:
            raise ConfigError(f"{named} has no effect on --sweep, which measures a run and writes no weights")
        _sweep(adapter, sweep, source, checkpoint, listed(zero_shot))
        return
    if zero_shot is not None:
        raise ConfigError(f"zero_shot={zero_shot!r} needs --sweep, such as --sweep 0,0.5,1")
    if source is not None:
        raise ConfigError(f"source={source!r} needs --sweep, such as --sweep 0,0.5,1")
    if out is None:
        raise ConfigError("no file to write was named; add --out merged.safetensors, or measure with --sweep 0,0.5,1")
    from slora.training.merge_run import merge_adapter

    count = merge_adapter(adapter, out, model, pretrained, classes, scale, checkpoint)
    print(f"{count} block{'' if count == 1 else 's'} merged; {out} holds the plain model")
    if checkpoint is not None:
        note_undecided(adapter, checkpoint)


def _sweep(run: Path, scales: str, source: str | None, checkpoint: str | None, zero_shot: list[str]) -> None:
    try:
        numbers = [float(number) for number in scales.split(",")]
    except ValueError as error:
        raise ConfigError(f"sweep={scales!r} is not a list of numbers; write 0,0.25,0.5,0.75,1") from error
    from slora.sources.suite_names import check_eval_set

    for folder in zero_shot:
        check_eval_set(folder)
    from slora.runs.rundir import SWEEP
    from slora.training.sweep_run import check_scales, sweep

    check_scales(numbers)
    result = sweep(run, numbers, source, checkpoint, zero_shot=zero_shot)
    name = SWEEP if result["checkpoint"] is None else f"sweep-{result['checkpoint']}.json"
    from slora.report.style import save_png
    from slora.report.sweep import sweep_figure, sweep_lines

    picture = (run / name).with_suffix(".png")
    save_png(sweep_figure(result), picture)
    print("\n".join(sweep_lines(result)))
    print(f"{picture} shows it; {run / name} holds the numbers")
    if checkpoint is not None:
        note_undecided(run, checkpoint)
