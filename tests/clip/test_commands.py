"""The commands on a run with a zero-shot head, as a user types them."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from slora.cli import app
from slora.runs.flags import completed

pytestmark = pytest.mark.once

QUICK = (
    "--head zero-shot --tower both --templates simple --blocks 0.25 --max-steps 4 --save-every 2 --batch-size 8 --r 2 "
    "--augment none --num-workers 0 --device cpu --precision fp32 --log-every 1 --no-tensorboard --no-progress"
).split()


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--pretrained", "--data", "x"], ["--pretrained=true", "--data", "x"]),
        (["--data", "x", "--pretrained"], ["--data", "x", "--pretrained=true"]),
        (["--pretrained", "openai", "--data", "x"], ["--pretrained", "openai", "--data", "x"]),
        (["--pretrained=openai"], ["--pretrained=openai"]),
        (["--no-pretrained", "--download"], ["--pretrained=false", "--download"]),
        (["--no-download", "--model", "--pretrained"], ["--no-download", "--model", "--pretrained=true"]),
    ],
)
def test_pretrained_may_stand_without_a_value(given: list[str], expected: list[str]) -> None:
    assert completed(given) == expected


@pytest.fixture
def command(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., str]:
    """Return `run(*arguments)`: what a command prints that succeeds."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments: str) -> str:
        monkeypatch.setattr(sys, "argv", ["slora", *arguments])
        with pytest.raises(SystemExit) as caught:
            app.main()
        out, err = capsys.readouterr()
        assert not caught.value.code, err
        return out

    return run


def test_a_run_is_evaluated_inspected_swept_merged_and_reported(
    command: Callable[..., str], tiny: str, weights: str, images: Path
) -> None:
    data = f"imagefolder:{images}"
    command("finetune", "--model", tiny, "--pretrained", weights, "--data", data, *QUICK, "--out", "run")
    assert "zero-shot" in Path("run/config.yaml").read_text()
    assert "both towers with a zero-shot head, contrastive loss" in Path("run/report.html").read_text()
    assert "top-1" in command("evaluate", "run", "--source", data, "--k", "1,2")
    assert json.loads(Path("run/evaluation.json").read_text())["knn"]["bank"] == 27
    assert "transformer.resblocks" in command("inspect", "run", "--checkpoint", "last")
    assert "zero-shot accuracy on" in command("merge", "run", "--sweep", "0,1", "--zero-shot", str(images))
    accuracies = [entry["top1"] for entry in json.loads(Path("run/sweep.json").read_text())["scales"]]
    assert accuracies[1] == pytest.approx(json.loads(Path("run/result.json").read_text())["accuracy"], rel=1e-6)
    command("merge", "run", "--out", "merged.safetensors")
    # The merged file is where the next run starts.
    command("finetune", "--model", tiny, "--pretrained", "merged.safetensors", "--data", data, *QUICK, "--out", "next")
    command("merge", "run", "--checkpoint", "last", "--out", "second.safetensors")
    command("report", "run")


def test_a_linear_head_takes_its_weights_from_a_file_too(
    command: Callable[..., str], tiny: str, weights: str, images: Path
) -> None:
    quick = [word for word in QUICK if word not in ("--head", "zero-shot", "--tower", "both", "--templates", "simple")]
    data = f"imagefolder:{images}"
    command("finetune", "--model", tiny, "--pretrained", weights, "--data", data, *quick, "--out", "run")
    assert json.loads(Path("run/result.json").read_text())["accuracy"] is not None
    command("merge", "run", "--out", "merged.safetensors")
