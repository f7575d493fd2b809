"""What a run tells: `metrics.jsonl`, TensorBoard events, the progress bar, and the history in memory."""

from __future__ import annotations

import json
import logging
import math
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slora.errors import CheckpointError, WriteError
from slora.io.atomic import cannot_write, write_text
from slora.io.bounded import parse_json, read_bytes

if TYPE_CHECKING:
    from rich.console import Console

METRICS = "metrics.jsonl"

# A record of a thousand gates has 20 kB.
LARGEST = 1 << 30

_log = logging.getLogger("slora")


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Return the records in a `metrics.jsonl`; a last line cut short by a kill is left out.

    Other lines that are no records are left out with a warning in the log.

    Raises:
        CheckpointError: the file cannot be read.
    """
    try:
        lines = read_bytes(path, LARGEST).splitlines(keepends=True)
    except CheckpointError as error:
        raise CheckpointError(f"{error}; give the folder of a run") from error
    records, broken = [], []
    for number, line in enumerate(lines, start=1):
        try:
            records.append(_checked(parse_json(line.decode("utf-8"))))
        except ValueError as error:
            if number < len(lines) or line.endswith(b"\n"):
                broken.append(f"line {number} ({error})")
    if broken:
        _log.warning("%s: left out %d of %d lines, which are no records: %s", path, len(broken), len(lines), broken[0])
    return records


def _checked(record: Any) -> dict[str, Any]:
    """A record whose values are of the types that `Recorder` writes.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(record, dict):
        raise ValueError("it is no JSON object")
    if not _is_count(record.get("step")):
        raise ValueError(f"its step is {str(record.get('step'))[:40]}")
    for name, value in record.items():
        holds = {"gates": _are_gates, "active_blocks": _are_blocks, "error": _is_text}.get(name, _is_number)
        if value is not None and not holds(value):
            raise ValueError(f"its {name[:40]!r} is no such value")
    if ("blocks" in record) != ("active" in record) or not all(
        _is_count(record.get(name, 0)) for name in ("blocks", "active")
    ):
        raise ValueError("its numbers of blocks are none")
    return record


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 1 << 53


def _is_number(value: object) -> bool:
    # Beyond it, the distance of two of them is infinite, which no axis is.
    return isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e100


def _is_text(value: object) -> bool:
    return isinstance(value, str)


def _are_gates(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(scores, list) and all(map(_is_number, scores)) for scores in value.values()
    )


def _are_blocks(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(blocks, list) and all(map(_is_count, blocks)) for blocks in value.values()
    )


class Recorder:
    """Takes each record of a run where it belongs.

    A record is `{"step": ..., ...}` of JSON values. A line of `metrics.jsonl` is appended and flushed at once
    rather than the whole file rewritten: a kill can cut the last line only, which every reader here leaves out.

    Args:
        run_dir: the run directory; None writes nothing to disk.
        steps: optimizer steps of the run.
        first: the step that a resumed run starts at; later lines of an earlier attempt are dropped.
        earlier: the run directory that its checkpoint is from, whose lines up to there become its own; None for
            `run_dir`.
        console: where the progress bar is drawn; None draws none.
        tensorboard: whether to write TensorBoard events.

    Raises:
        WriteError: the folder cannot be written.
    """

    def __init__(
        self,
        run_dir: Path | None,
        steps: int,
        first: int = 0,
        console: Console | None = None,
        tensorboard: bool = True,
        earlier: Path | None = None,
    ) -> None:
        self.history: list[dict[str, Any]] = []
        self.path = None if run_dir is None else run_dir / METRICS
        self._writer: Any = None
        self._bar = None if console is None else Bar(console, steps, first)
        if self.path is not None:
            source = self.path
            if earlier is not None and (earlier / METRICS).exists():
                source = earlier / METRICS
            if first and source.exists():
                self.history = [record for record in read_metrics(source) if record["step"] <= first]
            write_text(self.path, "".join(json.dumps(record) + "\n" for record in self.history))
        if run_dir is not None and tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            try:
                self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=first + 1 if first else None)
            except OSError as error:
                raise _not_recorded(run_dir / "tensorboard", error) from error
            if source.resolve() != (run_dir / METRICS).resolve():
                for record in self.history:
                    self._show_events(record)

    def add(self, record: dict[str, Any]) -> None:
        """Append `record` to the history, the file, TensorBoard and the progress bar."""
        # NaN is not JSON; a value that is not finite is written as null.
        record = {key: None if _is_nan(value) else value for key, value in record.items()}
        self.history.append(record)
        if self.path is not None:
            try:
                with open(self.path, "a", encoding="utf-8") as file:
                    file.write(json.dumps(record, allow_nan=False) + "\n")
            except OSError as error:
                raise _not_recorded(self.path, error) from error
        if self._writer is not None:
            self._show_events(record)
        if self._bar is not None:
            self._bar.show(record)

    def _show_events(self, record: Mapping[str, Any]) -> None:
        try:
            for key, value in record.items():
                if isinstance(value, (int, float)) and key != "step":
                    group = "evaluation" if key.startswith("eval_") else "training"
                    self._writer.add_scalar(f"{group}/{key}", value, record["step"])
        except OSError as error:
            raise _not_recorded(self.path.parent if self.path else "TensorBoard events", error) from error

    def close(self) -> None:
        """Flush and close everything; the history stays."""
        if self._bar is not None:
            self._bar.progress.stop()
        if self._writer is not None:
            self._writer.close()
            self._writer = None


class Bar:
    """The progress bar: step, loss, accuracy, active blocks, time left. Off a terminal: a line per evaluation."""

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
        """Draw the bar with the values of `record` and, for what it lacks, of earlier ones."""
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
    """Return loss, accuracies and active blocks of a record in words."""
    parts = [
        f"{name} {record[key]:{form}}"
        for key, name, form in (
            ("loss", "loss", ".3f"),
            ("accuracy", "accuracy", ".1%"),
            ("eval_accuracy", "evaluation", ".1%"),
        )
        if record.get(key) is not None
    ]
    if record.get("blocks"):
        parts.append(f"active {record['active']}/{record['blocks']} blocks")
    return "  ".join(parts)


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _not_recorded(path: str | Path, error: OSError) -> WriteError:
    then = ", then go on from the last checkpoint, or start again where there is none"
    return cannot_write(path, error, then, "The checkpoints are unchanged.")
