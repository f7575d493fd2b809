"""`metrics.jsonl`, TensorBoard events and the progress bar."""

from __future__ import annotations

import errno
import io
import json
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from slora import CheckpointError
from slora.runs.metrics import read_metrics
from slora.runs.progress_bar import described
from slora.runs.recorder import Recorder


def test_a_line_cut_short_by_a_kill_is_left_out(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1, "loss": 2.0}\n{"step": 2, "lo')
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}]


@pytest.mark.parametrize(
    "line",
    [
        "[" * 5000,
        "5",
        "[1]",
        '{"loss": 1.0}',
        '{"step": -4}',
        '{"step": 1.5}',
        '{"step": true}',
        '{"step": 9, "loss": "low"}',
        '{"step": 9, "loss": NaN}',
        '{"step": 9, "gates": [1]}',
        '{"step": 9, "gates": {"first": [null]}}',
        '{"step": 9, "active": 1}',
        '{"step": 9, "active": 0.5, "blocks": 1}',
        '{"step": 9, "error": 5}',
        "\udcff",
    ],
)
def test_a_line_that_is_no_record_is_left_out_and_said(
    line: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(f'{{"step": 1, "loss": 2.0}}\n{line}\n{{"step": 3}}\n'.encode("utf-8", "surrogateescape"))
    assert read_metrics(path) == [{"step": 1, "loss": 2.0}, {"step": 3}]
    assert "skipped 1 of 3 lines, which are not valid records: line 2" in caplog.text


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"absent\.jsonl does not exist; give the folder of a run"):
        read_metrics(tmp_path / "absent.jsonl")


def test_every_record_is_on_disk_at_once(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 10, tensorboard=False)
    recorder.add({"step": 1, "loss": 0.5})
    assert read_metrics(tmp_path / "metrics.jsonl") == recorder.history == [{"step": 1, "loss": 0.5}]


def test_a_resumed_run_drops_what_came_after_its_checkpoint(tmp_path: Path) -> None:
    lines = [json.dumps({"step": step}) + "\n" for step in (2, 4, 6)]
    (tmp_path / "metrics.jsonl").write_text("".join(lines) + '{"st')
    recorder = Recorder(tmp_path, 10, first=4, tensorboard=False)
    recorder.add({"step": 5})
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [2, 4, 5]


def test_a_run_branched_off_another_takes_over_its_records_up_to_there(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    first, branch = tmp_path / "first", tmp_path / "branch"
    first.mkdir()
    branch.mkdir()
    lines = "".join(json.dumps({"step": step, "loss": step / 8}) + "\n" for step in (2, 4, 6))
    (first / "metrics.jsonl").write_text(lines)
    (branch / "metrics.jsonl").write_text('{"step": 1, "loss": 9.0}\n')
    recorder = Recorder(branch, 10, first=4, earlier=first)
    recorder.add({"step": 5, "loss": 0.0})
    recorder.close()
    assert [record["step"] for record in read_metrics(branch / "metrics.jsonl")] == [2, 4, 5]
    assert (first / "metrics.jsonl").read_text() == lines
    events = EventAccumulator(str(branch / "tensorboard"))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("training/loss")] == [(2, 0.25), (4, 0.5), (5, 0.0)]


def test_what_is_not_a_number_is_written_as_null(tmp_path: Path) -> None:
    recorder = Recorder(tmp_path, 10, tensorboard=False)
    recorder.add({"step": 1, "loss": float("nan")})
    assert (tmp_path / "metrics.jsonl").read_text() == '{"step": 1, "loss": null}\n'


def test_a_full_disk_names_the_file_and_the_remedy(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = Recorder(tmp_path, 10, tensorboard=False)
    recorder.add({"step": 1})

    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl could not be written \(No space left.*free space"):
        recorder.add({"step": 2})
    monkeypatch.undo()
    assert read_metrics(tmp_path / "metrics.jsonl") == [{"step": 1}]


def test_tensorboard_gets_every_number(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    recorder = Recorder(tmp_path, 10)
    recorder.add({"step": 3, "loss": 0.5, "active_blocks": {"layer": [0]}, "grad_norm": None})
    recorder.add({"step": 3, "eval_accuracy": 0.75})
    recorder.close()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["evaluation/eval_accuracy", "training/loss"]
    (loss,) = events.Scalars("training/loss")
    assert (loss.step, loss.value) == (3, 0.5)


def test_the_progress_bar_shows_loss_accuracy_active_blocks_and_the_time_left() -> None:
    screen = io.StringIO()
    recorder = Recorder(None, 10, console=Console(file=screen, force_terminal=True, width=200))
    recorder.add({"step": 4, "loss": 1.25, "accuracy": 0.5, "active": 3, "blocks": 12})
    recorder.close()
    for text in ("4/10", "loss 1.250", "accuracy 50.0%", "active 3/12 blocks", "left"):
        assert text in screen.getvalue()


def test_off_a_terminal_there_is_a_line_per_evaluation() -> None:
    screen = io.StringIO()
    recorder = Recorder(None, 10, console=Console(file=screen, width=200))
    recorder.add({"step": 4, "loss": 1.25, "accuracy": 0.5, "active": 3, "blocks": 12})
    recorder.add({"step": 5, "eval_accuracy": 0.25})
    recorder.close()
    (line,) = screen.getvalue().splitlines()
    assert "step 5 of 10" in line
    assert "loss 1.250" in line
    assert "evaluation 25.0%" in line
    assert "active 3/12 blocks" in line


def test_a_record_without_blocks_is_described_without_them() -> None:
    assert described({"loss": 1.0, "accuracy": None}) == "loss 1.000"
