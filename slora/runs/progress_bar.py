"""The progress bar of a run; without a terminal, a line per evaluation instead."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rich.console import Console


class ProgressBar:
    """Shows step, loss, accuracy, active blocks and the time left."""

    def __init__(self, console: Console, steps: int, first: int) -> None:
        from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

        self.progress = Progress(
            TextColumn("training"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("{task.fields[text]}"),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
            # Redrawn with each record rather than by a thread that competes with the training.
            auto_refresh=False,
            speed_estimate_period=60,
            disable=not console.is_terminal,
        )
        self.task = self.progress.add_task("training", total=steps, completed=first, text="")
        self.steps, self.first = steps, first
        self.last: dict[str, Any] = {}
        self.started = time.monotonic()
        self.progress.start()

    def show(self, record: dict[str, Any]) -> None:
        """Draw the bar with the values of `record`; what it lacks comes from earlier records."""
        self.last.update(record)
        self.progress.update(self.task, completed=self.last["step"], text=described(self.last))
        if self.progress.console.is_terminal:
            self.progress.refresh()
        elif "eval_accuracy" in record:
            step = record["step"]
            left = (time.monotonic() - self.started) * (self.steps - step) / max(1, step - self.first)
            text = f"step {step} of {self.steps}  {described(self.last)}  left {left:.0f} s"
            self.progress.console.print(text, markup=False, highlight=False, soft_wrap=True)


def described(record: dict[str, Any]) -> str:
    """Return loss, accuracies and active blocks of a record as text."""
    texts = [
        f"{name} {record[key]:{form}}"
        for key, name, form in (
            ("loss", "loss", ".3f"),
            ("accuracy", "accuracy", ".1%"),
            ("eval_accuracy", "evaluation", ".1%"),
        )
        if record.get(key) is not None
    ]
    if record.get("blocks"):
        ranks = f"{record['ranks']}/{record['all_ranks']} ranks in " if record.get("all_ranks") else ""
        texts.append(f"active {ranks}{record['active']}/{record['blocks']} blocks")
    return "  ".join(texts)
