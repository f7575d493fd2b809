"""`slora evaluate`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from slora.cli.checkpoint_option import CHECKPOINT, check_early
from slora.errors import ConfigError


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run directory of slora finetune.")],
    source: Annotated[
        str | None,
        typer.Option(help="Data set of the pretraining, for k-NN before and after. [default: none, accuracy only]"),
    ] = None,
    k: Annotated[str, typer.Option(help="Numbers of neighbours, separated by commas.")] = "10,20,100,200",
    data_root: Annotated[str | None, typer.Option(help="Folder of data sets. [default: the run's]")] = None,
    download: Annotated[
        bool | None,
        typer.Option("--download/--no-download", help="Download missing data sets. [default: as the run]"),
    ] = None,
    eval_batch_size: Annotated[
        int | None,
        typer.Option(help="Images per forward pass. [default: the run's]"),
    ] = None,
    device: Annotated[str | None, typer.Option(help="auto or cpu. [default: the run's]")] = None,
    checkpoint: Annotated[str | None, typer.Option(help=CHECKPOINT)] = None,
) -> None:
    """Measure the accuracy of a fine-tuned model, and how much it forgot of another data set.

    Accuracy is on the run's own data. With --source, weighted k-NN (temperature 0.07) on the features of that data set,
    with the model before and after fine-tuning. Writes evaluation.json into the run directory, or
    evaluation-step-STEP.json for a checkpoint.

    \b
    Examples:
        slora evaluate runs/letters_vit-digits-selective --source letters
        slora evaluate runs/letters_vit-digits-selective --checkpoint best
    """
    check_early(run, checkpoint, source)
    from slora.training.evaluate_run import evaluate as measure

    try:
        neighbours = [int(number) for number in k.split(",")]
    except ValueError as error:
        raise ConfigError(f"k={k!r} is not a list of numbers; write 10,20,100,200") from error
    overrides = {
        "data_root": data_root,
        "download": download,
        "eval_batch_size": eval_batch_size,
        "device": device,
    }
    overrides = {name: value for name, value in overrides.items() if value is not None}
    result = measure(run, source, neighbours, checkpoint, **overrides)
    scores = result["accuracy"]
    whose = "" if result["checkpoint"] is None else f" of {result['checkpoint']}"
    print(f"accuracy{whose} on {scores['data']} ({scores['count']} images)")
    print(f"  top-1 {scores['top1']:.2%}   top-5 {scores['top5']:.2%}   mean over classes {scores['per_class']:.2%}")
    if result["knn"] is not None:
        knn = result["knn"]
        print(f"k-NN on {knn['source']} ({knn['queries']} images, {knn['bank']} vote)")
        print(f"  {'k':>4} {'before':>8} {'after':>8} {'points':>8}")
        for number, before in knn["before"].items():
            after = knn["after"][number]
            print(f"  {number:>4} {before:8.2%} {after:8.2%} {100 * (after - before):+8.2f}")
    if checkpoint is None:
        print(f"add it to the report of the run with: {shlex.join(['slora', 'report', str(run)])}")
