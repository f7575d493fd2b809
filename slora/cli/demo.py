"""`slora demo`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slora.cli.errors import imported


def demo(
    out: Annotated[Path, typer.Option(help="Folder for the results.")] = Path("slora-demo"),
    seeds: Annotated[
        int | None,
        typer.Option(min=1, help="Runs of each method, with different random seeds. [default: 3; with --full: 5]"),
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Fewer and shorter runs, to check that everything works.")
    ] = False,
    open_report: Annotated[bool, typer.Option("--open", help="Open the report in a browser at the end.")] = False,
    full: Annotated[
        bool,
        typer.Option("--full", help="Four target data sets instead of one, and scaled updates: about half an hour."),
    ] = False,
    jobs: Annotated[
        int | None, typer.Option(min=1, help="Parallel trainings, one thread each. [default: one per core, at most 4]")
    ] = None,
) -> None:
    """Adapt a small vision transformer to handwritten digits, on a CPU, offline, and write an HTML report.

    Compares what each method learns and forgets: a linear probe; LoRA on all blocks, with and without training the head
    first, scaled, with distillation; LoRA on the last 4 blocks and on 4 at random; and selective adaptation with 4.

    \b
    Examples:
        slora demo --seeds 1 --out results
        slora demo --full
    """
    imported("slora.demo.run", "demo").main(out, seeds, quick, open_report, full, jobs)
