"""One run directory has one run at a time, and a run writes nowhere else."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from slora import ConfigError
from slora.runs import rundir
from slora.runs.lock import locked
from slora.training import TrainSettings, prepare, train

pytestmark = pytest.mark.once

Factory = Callable[[], nn.Module]
Pair = tuple[Tensor, Tensor]


@contextmanager
def elsewhere(code: str) -> Iterator[subprocess.Popen[str]]:
    """A process that has run `code` and is inside it still."""
    code = f"import os, time\nfrom pathlib import Path\nfrom slora.runs.lock import locked\n{code}"
    process = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        assert process.stdout.readline() == "held\n"
        yield process
    finally:
        process.kill()
        process.communicate()


HOLD = "with locked(Path({!r})):\n    print('held', flush=True)\n    input()"


def test_a_folder_that_another_process_trains_in_is_refused_and_left_as_it_is(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path
) -> None:
    model = prepare(make_model(), settings=settings)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with elsewhere(HOLD.format(str(tmp_path))) as other:
        with pytest.raises(ConfigError, match="another run is writing into"):
            train(model, data, None, settings, tmp_path)
        assert list(tmp_path.iterdir()) == []
        assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
        other.kill()
        other.wait()
        train(model, data, None, settings, tmp_path)


def test_a_folder_that_another_thread_trains_in_is_refused(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path
) -> None:
    refused: list[BaseException] = []

    def other() -> None:
        try:
            train(prepare(make_model(), settings=settings), data, None, settings, tmp_path)
        except BaseException as error:
            refused.append(error)

    with locked(tmp_path), locked(tmp_path):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
    assert [type(error) for error in refused] == [ConfigError]
    with locked(tmp_path):
        pass


def test_a_killed_run_holds_its_folder_no_longer_although_its_reading_processes_live(tmp_path: Path) -> None:
    fork = """
with locked(Path({!r})):
    if os.fork() == 0:
        print('held', flush=True)
        time.sleep(60)
    input()
"""
    with elsewhere(fork.format(str(tmp_path))) as other:
        with pytest.raises(ConfigError, match="another run"), locked(tmp_path):
            pass
        children = Path(f"/proc/{other.pid}/task/{other.pid}/children").read_text().split()
        other.kill()
        other.wait()
        try:
            with locked(tmp_path):
                pass
        finally:
            for child in children:
                subprocess.run(["kill", "-9", child], check=True)


@pytest.mark.parametrize("name", ["checkpoints", "tensorboard", "adapter", "model"])
def test_a_linked_folder_is_not_written_through(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path, name: str
) -> None:
    theirs, run = tmp_path / "theirs", tmp_path / "run"
    train(prepare(make_model(), settings=settings), data, None, settings, theirs)
    run.mkdir()
    (run / name).symlink_to(theirs / "checkpoints")
    before = sorted((theirs / "checkpoints").rglob("*"))
    with pytest.raises(ConfigError, match=rf"run/{name} is a link to .*; remove the link"):
        train(prepare(make_model(), settings=settings), data, None, settings, run)
    assert sorted((theirs / "checkpoints").rglob("*")) == before
    assert [path.name for path in run.iterdir()] == [name]


def test_a_linked_run_directory_is_one(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path
) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "run").symlink_to("there")
    train(prepare(make_model(), settings=settings), data, None, settings, tmp_path / "run")
    assert (tmp_path / "there/checkpoints").is_dir()


def test_an_old_checkpoint_that_is_a_link_is_removed_without_what_it_points_to(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path
) -> None:
    other = settings.replace(max_steps=1)
    train(prepare(make_model(), settings=other), data, None, other, tmp_path / "theirs")
    train(prepare(make_model(), settings=settings), data, None, settings, tmp_path / "run")
    folder = tmp_path / "run/checkpoints"
    (folder / "step-00000001").symlink_to(tmp_path / "theirs/checkpoints/step-00000001")
    longer = settings.replace(max_steps=14, keep_last=1)
    model = prepare(make_model(), settings=settings)
    train(model, data, None, longer, tmp_path / "run", resume=folder / "step-00000012")
    assert [path.name for path in folder.iterdir()] == ["step-00000014"]
    assert json.loads((tmp_path / "theirs/checkpoints/step-00000001/state.json").read_text())["step"] == 1


def test_the_folder_is_looked_at_again_once_it_is_locked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    from slora.training import finetune_run, run_model

    quick: dict[str, Any] = {
        "model": "demo/letters_vit", "data": "digits", "r": 2, "max_steps": 2, "batch_size": 8, "device": "cpu",
        "precision": "fp32", "log_every": 1, "save_every": 1, "eval_every": 0, "tensorboard": False,
        "count_flops": False, "head_first": 0,
    }  # fmt: skip
    build = run_model.build

    def second(first: Callable[[], Any]) -> None:
        """Let `first` come and go while the model of the next run is built."""

        def built(settings: TrainSettings, run_dir: Path | None) -> Any:
            monkeypatch.setattr(finetune_run, "build", build)
            first()
            return build(settings, run_dir)

        monkeypatch.setattr(finetune_run, "build", built)

    out = tmp_path / "out"
    second(lambda: finetune_run.finetune(quick, out=out))
    with pytest.raises(ConfigError, match="already holds a run"):
        finetune_run.finetune({**quick, "lr": 0.5}, out=out)
    assert rundir.read_settings(out).lr != 0.5
    second(lambda: finetune_run.finetune({"max_steps": 3}, resume=out))
    with pytest.raises(ConfigError, match="already holds step-00000003"):
        finetune_run.finetune({"max_steps": 4}, resume=out)
    assert rundir.read_settings(out).max_steps == 3
