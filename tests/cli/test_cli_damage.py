"""Every command names what is wrong with the files of a run in one line, and ends."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from slora.cli import app

pytestmark = pytest.mark.once

COMMANDS = {
    "inspect": ["inspect", "run"],
    "inspect a checkpoint": ["inspect", "run", "--checkpoint", "last"],
    "report": ["report", "run"],
    "merge": ["merge", "run", "--out", "merged.safetensors"],
    "evaluate": ["evaluate", "run"],
    "compress": ["compress", "run", "--out", "small.safetensors"],
    "resume": ["finetune", "--resume", "run", "--max-steps", "3"],
    "config": ["finetune", "--config", "run/config.yaml", "--out", "new"],
}
# An adapter is compressed without its run.
EVERY = tuple(name for name in COMMANDS if name != "compress")
STATE, METRICS, RESULT = "checkpoints/step-00000002/state.json", "metrics.jsonl", "result.json"


def text(content: str) -> Callable[[Path], object]:
    return lambda path: path.write_text(content)


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def half(path: Path) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])


def setting(line: str) -> Callable[[Path], object]:
    name = line.partition(":")[0]

    def change(path: Path) -> None:
        kept = [each for each in path.read_text().splitlines() if not each.startswith(f"{name}:")]
        path.write_text("\n".join([*kept, line, ""]))

    return change


# What is done to which file, and the commands that have to refuse it, which name it.
DAMAGE: list[tuple[str, str, Callable[[Path], object], tuple[str, ...]]] = [
    ("brackets", "config.yaml", text("lr: " + "[" * 100_000), EVERY),
    ("pipe", "config.yaml", pipe, EVERY),
    ("digits", "config.yaml", setting("gate_init: " + "9" * 400), EVERY),
    ("large", "config.yaml", setting("gate_init: 1e400"), EVERY),
    ("text", "config.yaml", setting("threshold: abc"), EVERY),
    ("unknown", "config.yaml", setting("epoch: 3"), tuple(name for name in EVERY if name != "report")),
    ("pipe", METRICS, pipe, ("inspect", "report", "resume")),
    ("nested", RESULT, text("[" * 2000 + "]" * 2000), ("inspect",)),
    ("list", RESULT, text("[]"), ("inspect",)),
    ("text", RESULT, text('{"accuracy": "high", "steps": 1, "seconds": 2}'), ("inspect",)),
    ("pipe", RESULT, pipe, ("inspect",)),
    ("numbers", "classes.json", text("[[1]]"), ("inspect a checkpoint", "merge")),
    ("pipe", "classes.json", pipe, ("inspect a checkpoint", "merge")),
    ("nested", STATE, text("[" * 2000), ("inspect a checkpoint", "resume")),
    ("pipe", STATE, pipe, ("inspect a checkpoint", "resume")),
    ("nested", "evaluation.json", text("[" * 2000 + "]" * 2000), ("report",)),
    ("pipe", "evaluation.json", pipe, ("report",)),
    ("pipe", "adapter/selective.json", pipe, ("inspect", "report", "merge", "evaluate", "compress")),
    ("pipe", "adapter/adapter_model.safetensors", pipe, ("merge", "evaluate", "compress")),
    ("half", "adapter/adapter_model.safetensors", half, ("merge", "evaluate", "compress")),
]


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A finished run on few digits."""
    from slora.demo import digits as module
    from slora.training import finetune_run

    whole = module.digits

    def few(seed: int) -> Any:
        (images, labels), (more_images, more_labels) = whole(seed)
        return (images[:80], labels[:80]), (more_images[:40], more_labels[:40])

    folder = tmp_path_factory.mktemp("good") / "run"
    settings = {
        "model": "demo/letters_vit", "data": "digits", "r": 2, "max_steps": 2, "batch_size": 8, "device": "cpu",
        "precision": "fp32", "log_every": 1, "save_every": 1, "eval_every": 0, "tensorboard": False,
        "count_flops": False, "head_first": 0, "progress": False,
    }  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "digits", few)
        finetune_run.finetune(settings, out=folder)
        (folder / "evaluation.json").write_text("{}")
        yield folder


@pytest.mark.parametrize(
    ("what", "name", "change", "commands"), DAMAGE, ids=[f"{name}-{what}" for what, name, _, _ in DAMAGE]
)
def test_a_damaged_file_is_one_line_of_every_command_that_reads_it(
    good: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    what: str,
    name: str,
    change: Callable[[Path], object],
    commands: tuple[str, ...],
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("SLORA_TRACEBACK", "")
    for command in commands:
        shutil.rmtree("run", ignore_errors=True)
        shutil.copytree(good, "run")
        if command == "resume":
            # Otherwise it is finished.
            (tmp_path / "run" / RESULT).unlink(missing_ok=name != RESULT)
        change(tmp_path / "run" / name)
        monkeypatch.setattr(sys, "argv", ["slora", *COMMANDS[command]])
        begin = time.monotonic()
        with pytest.raises(SystemExit) as caught:
            app.main()
        said = capsys.readouterr().err.strip().splitlines()
        assert caught.value.code == 2, command
        assert Path(name).name in said[-1], command
        assert said[-1].startswith("error: "), command
        assert len(said[-1]) < 600, command
        assert time.monotonic() - begin < 20, command
    assert not Path("new").exists()
