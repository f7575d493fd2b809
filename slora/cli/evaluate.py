"""`slora evaluate`."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Annotated

import typer

from slora.cli.checkpoint_option import CHECKPOINT, check_early
from slora.errors import ConfigError

NEIGHBOURS = "10,20,100,200"


def evaluate(
    run: Annotated[Path, typer.Argument(help="Run directory of slora finetune.")],
    source: Annotated[
        str | None,
        typer.Option(help="Data set of the pretraining, for k-NN before and after. [default: none, accuracy only]"),
    ] = None,
    k: Annotated[
        str | None,
        typer.Option(help="With --source: numbers of neighbours, separated by commas. [default: 10,20,100,200]"),
    ] = None,
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
    suites: Annotated[
        str | None,
        typer.Option(
            "--eval",
            help="Test sets of ImageNet's classes: some of imagenet, imagenetv2, imagenet-r, imagenet-a, "
            "imagenet-sketch, objectnet, separated by commas; NAME=FOLDER says where one is.",
        ),
    ] = None,
    eval_root: Annotated[
        Path | None, typer.Option(help="Folder that holds the folders of these test sets. [default: --data-root]")
    ] = None,
    zero_shot: Annotated[
        str | None,
        typer.Option(help="For a CLIP: image folders or data sets, separated by commas, to classify by class prompts."),
    ] = None,
    retrieval: Annotated[
        str | None,
        typer.Option(help="For a CLIP: images with captions, separated by commas: captions.jsonl or folders."),
    ] = None,
    shots: Annotated[
        str | None,
        typer.Option(help="With --source: few-shot classification on the features, such as 1,2,4,8,16 per class."),
    ] = None,
) -> None:
    """Measure what a fine-tuned model can do, and what it has forgotten, as a table of before, after and change.

    Accuracy, NLL and calibration error (ECE, 15 bins) on the run's own data. With --source, weighted k-NN (temperature
    0.07) on the features of that data set. With --eval, ImageNet and its shifted test sets, for runs on ImageNet's
    classes or of a CLIP. For a CLIP, zero-shot accuracy on image folders and recall@1, 5, 10 of image-text retrieval.

    Forgetting is the mean change, in points, of zero-shot accuracy, retrieval recall and k-NN accuracy on data sets
    other than the run's: first over the rows of a data set, then over data sets. Below 0 is forgotten.

    Writes evaluation.json into the run directory, or evaluation-step-STEP.json for a checkpoint.

    \b
    Examples:
        slora evaluate runs/letters_vit-digits-selective --source letters
        slora evaluate runs/letters_vit-digits-selective --checkpoint best
        slora evaluate runs/clip --eval imagenet,imagenetv2,imagenet-r,imagenet-a,imagenet-sketch,objectnet \\
            --eval-root /data --zero-shot cifar100,/data/birds --retrieval /data/coco/captions_val2017.json
    """
    check_early(run, checkpoint, source)
    from slora.sources.suite_names import check_eval_set, check_suites

    neighbours = numbers("k", k or NEIGHBOURS, NEIGHBOURS)
    if k is not None and source is None:
        raise ConfigError(f"k={k!r} needs --source, the data set among whose images neighbours are found")
    wanted = check_suites(suites) if suites is not None else {}
    folders = listed(zero_shot)
    for folder in folders:
        check_eval_set(folder)
    from slora.runs.eval_table import as_lines
    from slora.training.evaluate_run import evaluate as measure

    overrides = {
        "data_root": data_root,
        "download": download,
        "eval_batch_size": eval_batch_size,
        "device": device,
    }
    overrides = {name: value for name, value in overrides.items() if value is not None}
    result = measure(
        run,
        source,
        neighbours,
        checkpoint,
        suites=wanted,
        eval_root=eval_root,
        zero_shot=folders,
        retrieval=listed(retrieval),
        shots=[] if shots is None else numbers("shots", shots, "1,2,4,8,16"),
        **overrides,
    )
    scores = result["accuracy"]
    whose = "" if result["checkpoint"] is None else f" of {result['checkpoint']}"
    print(f"accuracy{whose} on {scores['data']} ({scores['count']} images)")
    print(f"  top-1 {scores['top1']:.2%}   top-5 {scores['top5']:.2%}   mean over classes {scores['per_class']:.2%}")
    if result["knn"] is not None:
        print(f"k-NN on {result['knn']['source']} ({result['knn']['queries']} images, {result['knn']['bank']} vote)")
    print("\n".join(as_lines(result)))
    if checkpoint is None:
        print(f"add it to the report of the run with: {shlex.join(['slora', 'report', str(run)])}")


def listed(text: str | None) -> list[str]:
    """Return the entries of a list separated by commas."""
    return [entry.strip() for entry in (text or "").split(",") if entry.strip()]


def numbers(name: str, text: str, example: str) -> list[int]:
    """Return a list of whole numbers.

    Raises:
        ConfigError: it is none.
    """
    try:
        return [int(number) for number in text.split(",")]
    except ValueError as error:
        raise ConfigError(f"{name}={text!r} is not a list of numbers; write {example}") from error
