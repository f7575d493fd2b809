"""`Recorder`: writes the records of a run to `metrics.jsonl`, TensorBoard, the progress bar and memory."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slora.errors import WriteError
from slora.io.atomic import cannot_write, write_text
from slora.runs.metrics import METRICS, read_metrics
from slora.runs.progress_bar import ProgressBar
from slora.runs.rundir import TENSORBOARD

if TYPE_CHECKING:
    from rich.console import Console


class Recorder:
    """Writes each record of a run to all of its outputs.

    A record is `{"step": ..., ...}` of JSON values. A line is appended to `metrics.jsonl` and flushed at once: a kill
    can cut only the last line, which `read_metrics` skips.

    Args:
        run_dir: the run directory; None writes nothing to disk.
        steps: optimizer steps of the run.
        first: the step that a resumed run starts at; later lines of an earlier attempt are dropped.
        earlier: the run directory of the checkpoint, whose lines up to `first` are copied; None for `run_dir`.
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
        self._bar = None if console is None else ProgressBar(console, steps, first)
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
                self._writer = SummaryWriter(str(run_dir / TENSORBOARD), purge_step=first + 1 if first else None)
            except OSError as error:
                raise _not_recorded(run_dir / TENSORBOARD, error) from error
            if source.resolve() != (run_dir / METRICS).resolve():
                for record in self.history:
                    self._show_events(record)

    def add(self, record: dict[str, Any]) -> None:
        """Append `record` to the history, the file, TensorBoard and the progress bar."""
        # JSON has no NaN: a value that is not finite is written as null.
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
        """Flush and close everything but the history."""
        if self._bar is not None:
            self._bar.progress.stop()
        if self._writer is not None:
            self._writer.close()
            self._writer = None


def _is_nan(value: object) -> bool:
    return isinstance(value, float) and not math.isfinite(value)


def _not_recorded(path: str | Path, error: OSError) -> WriteError:
    then = ", then resume from the last checkpoint, or start again if there is none"
    return cannot_write(path, error, then, "The checkpoints are unchanged.")
