"""`slora reproduce`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from slora.cli.evaluate import listed, numbers
from slora.errors import ConfigError

INTERRUPTED, INCOMPLETE = 130, 3


def reproduce(
    protocol: Annotated[str, typer.Argument(help="forgetting-clip or forgetting-dino.")],
    out: Annotated[Path | None, typer.Option(help="Folder of the runs. [default: runs/PROTOCOL]")] = None,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Print the plan and what is missing, and stop.")] = False,
    data_root: Annotated[Path, typer.Option(help="Folder that holds the data sets.")] = Path("data"),
    eval_root: Annotated[
        Path | None, typer.Option(help="Folder of imagenet, imagenetv2, ... [default: --data-root]")
    ] = None,
    download: Annotated[
        bool, typer.Option("--download/--no-download", help="Download missing weights and data sets of torchvision.")
    ] = False,
    runs: Annotated[str | None, typer.Option(help="Runs of the protocol, separated by commas. [default: all]")] = None,
    model: Annotated[str | None, typer.Option(help="Another model, as in finetune.")] = None,
    pretrained: Annotated[
        str | None, typer.Option(help="Its weights: a tag, or a file; of a timm model: true.")
    ] = None,
    data: Annotated[str | None, typer.Option(help="Another data set to fine-tune on, as in finetune.")] = None,
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps of each run.")] = None,
    batch_size: Annotated[int | None, typer.Option(min=1, help="Images per step.")] = None,
    device: Annotated[str | None, typer.Option(help="auto or cpu.")] = None,
    seed: Annotated[int | None, typer.Option(help="Seed of every run.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="Another setting of finetune, NAME=VALUE; may be repeated.")
    ] = None,
    suites: Annotated[
        str | None, typer.Option("--eval", help="Test sets of ImageNet's classes; as in evaluate.")
    ] = None,
    zero_shot: Annotated[str | None, typer.Option(help="Zero-shot sets; as in evaluate.")] = None,
    retrieval: Annotated[str | None, typer.Option(help="Images with captions; as in evaluate.")] = None,
    source: Annotated[str | None, typer.Option(help="Data set for k-NN; as in evaluate.")] = None,
    k: Annotated[str | None, typer.Option(help="Numbers of neighbours; as in evaluate.")] = None,
) -> None:
    """Run a published protocol from local data, and put our figures beside the published ones.

    forgetting-clip: CLIP on ImageNet-1k, rank 128, 6.25 % of the blocks (arXiv 2501.15377). forgetting-dino: DINO
    ViT-B/16 on CIFAR-100, 10 000 steps, k-NN on ImageNet (arXiv 2404.17245).

    First prints the plan: what is known of the protocol, what we chose, and the state of each run. If weights or data
    are not on this machine, it lists each with where it was looked for and how to get it, and exits with code 3. A
    stopped reproduction goes on where it was when the same command is run again. An empty list ("") leaves out a kind
    of evaluation; whatever is changed is named beside the figures.

    \b
    Examples:
        slora reproduce forgetting-dino --dry-run
        slora reproduce forgetting-clip --data-root /data --runs lora,selective --retrieval ""
        slora reproduce forgetting-dino --steps 100 --batch-size 32 --device cpu
    """
    from slora.io.yaml_files import parse_yaml

    changes: dict[str, Any] = {
        "model": model, "pretrained": parse_yaml(pretrained) if pretrained is not None else None, "data": data,
        "max_steps": steps, "batch_size": batch_size, "device": device, "seed": seed,
    }  # fmt: skip
    changes = {name: value for name, value in changes.items() if value is not None}
    for entry in settings or ():
        name, equals, value = entry.partition("=")
        if not equals:
            raise ConfigError(f"--set {entry!r} is not of the form NAME=VALUE")
        changes[name.strip().replace("-", "_")] = parse_yaml(value)
    from slora.reproduce.run import PAGE, Reproduction, Request, as_markdown

    request = Request(
        protocol,
        Path("runs") / protocol if out is None else out,
        data_root,
        eval_root,
        download,
        changes,
        None if runs is None else listed(runs),
        suites,
        None if zero_shot is None else listed(zero_shot),
        None if retrieval is None else listed(retrieval),
        source,
        None if k is None else numbers("k", k, "10,20,100,200"),
    )
    planned = Reproduction(request)
    print("\n".join(planned.plan()))
    needs = planned.missing()
    if needs:
        print("missing on this machine:")
        for need in needs:
            print(f"  {need.what}: {need.where}")
        raise typer.Exit(INCOMPLETE)
    if dry_run:
        return
    from rich.console import Console

    from slora.training.result import Interrupted

    try:
        result = planned.run(Console(stderr=True))
    except Interrupted as stop:
        print(f"stopped; the checkpoint {stop.checkpoint} is complete. Run the same command again to go on.")
        raise typer.Exit(INTERRUPTED) from None
    print("\n".join(as_markdown(result)))
    print(f"written to {request.out / PAGE}")
