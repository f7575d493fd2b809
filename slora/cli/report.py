"""`slora report`."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from slora.cli.errors import imported
from slora.errors import (
    ConfigError,
)


def report(
    run: Annotated[Path, typer.Argument(help="Run directory of slora finetune.")],
    out: Annotated[Path | None, typer.Option(help="HTML file. [default: report.html in RUN]")] = None,
) -> None:
    """Write the HTML report of a run: curves, active blocks, and the results of slora evaluate.

    \b
    Example:
        slora report runs/letters_vit-digits-selective
    """
    if not run.exists():
        raise ConfigError(f"{run} does not exist; give the folder of a run made by slora finetune")
    if out is not None and out.is_dir():
        raise ConfigError(f"--out {out} is a folder; name a file, such as {out / 'report.html'}")
    if not (run / "metrics.jsonl").exists():
        raise ConfigError(f"{run} holds no metrics.jsonl; give the folder of a run made by slora finetune")
    print(imported("slora.report", "report").write_report(run, out))
