"""`torchrun -m slora finetune` in two processes: the run of one process with the same global batch."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
from safetensors.torch import load_file

import slora.demo  # noqa: F401 (registers its model and data sets)
from slora import CheckpointError
from slora.runs.metrics import read_metrics
from slora.training import finetune_run

# The command line, which starts processes.
pytestmark = pytest.mark.once

# Products of about a hundred terms in six layers, and as many in the backward, rounded to 2^-24 each, over six steps.
ROUNDING = 2**-24 * 2 * 6 * 10 * 6
SETTINGS: dict[str, Any] = {
    "model": "demo/letters_vit", "pretrained": True, "data": "digits", "budget": 4, "max_steps": 6, "lr": 0.1,
    "optimizer": "sgd", "log_every": 1, "eval_every": 3, "save_every": 3, "head_first": 5, "device": "cpu",
    "precision": "fp32", "num_workers": 0, "tensorboard": False, "count_flops": False,
}  # fmt: skip


class Ended(NamedTuple):
    """What a command left."""

    code: int
    out: str
    err: str


def torchrun(*arguments: str) -> Ended:
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*launcher, "-m", "slora", "finetune", *arguments], env=environment, capture_output=True, text=True, timeout=300
    )
    return Ended(done.returncode, done.stdout, done.stderr)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path, Ended]:
    """A run of one process, the same in two, and what the latter printed."""
    folder = tmp_path_factory.mktemp("runs")
    one, _ = finetune_run.finetune({**SETTINGS, "batch_size": 32}, out=folder / "one")
    # JSON is YAML.
    config = folder / "two.yaml"
    config.write_text(json.dumps({**SETTINGS, "batch_size": 16}), encoding="utf-8")
    ended = torchrun("--config", str(config), "--out", str(folder / "two"))
    assert ended.code == 0, ended.err
    return one, folder / "two", ended


def assert_equal_runs(first: Path, second: Path) -> None:
    """Equal losses, accuracies and blocks, to rounding."""
    for one, two in zip(read_metrics(first / "metrics.jsonl"), read_metrics(second / "metrics.jsonl"), strict=True):
        assert one.keys() == two.keys()
        for key in one.keys() - {"seconds", "images_per_second", "gates"}:
            value = pytest.approx(one[key], rel=ROUNDING) if isinstance(one[key], float) else one[key]
            assert two[key] == value, (key, one["step"])
    results = [json.loads((folder / "result.json").read_text(encoding="utf-8")) for folder in (first, second)]
    assert results[0]["active_blocks"] == results[1]["active_blocks"]
    one, two = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (first, second))
    assert one.keys() == two.keys()
    for key, value in one.items():
        assert (two[key] - value).abs().max() <= ROUNDING * value.abs().max(), key


def test_two_processes_end_where_one_does(runs: tuple[Path, Path, Ended]) -> None:
    assert_equal_runs(runs[0], runs[1])


def test_the_first_process_alone_writes_and_prints(runs: tuple[Path, Path, Ended]) -> None:
    one, two, ended = runs
    names = [sorted(str(path.relative_to(folder)) for path in folder.rglob("*")) for folder in (one, two)]
    assert names[1] == sorted([*names[0], "report.html"])
    assert ended.out.count("6 steps in") == 1
    assert ended.out.count("report:") == 1


def resumed(rank: int, folder: Path) -> None:
    finetune_run.finetune({}, resume=folder)


def test_a_run_in_two_processes_is_resumed_by_two_and_by_no_other_number(
    runs: tuple[Path, Path, Ended], two_processes: Callable[..., list[Any]], tmp_path: Path
) -> None:
    _, two, _ = runs
    broken = tmp_path / "broken"
    shutil.copytree(two, broken)
    for path in ("adapter", "checkpoints/step-00000006"):
        shutil.rmtree(broken / path)
    (broken / "result.json").unlink()
    with pytest.raises(CheckpointError, match=r"is of a run in 2 processes, this one has 1, so .*--nproc_per_node 2"):
        finetune_run.finetune({}, resume=broken, out=tmp_path / "alone")
    two_processes(resumed, broken)
    assert_equal_runs(two, broken)


def test_an_error_ends_all_processes_and_is_said_once(runs: tuple[Path, Path, Ended]) -> None:
    ended = torchrun("--config", str(runs[1].parent / "two.yaml"), "--out", str(runs[1]))
    assert ended.code != 0
    assert ended.err.count("error: ") == 1
    assert "already holds a run" in ended.err


RETAINING: dict[str, Any] = {
    "retain_data": "mixed", "retain_samples": 24, "drift_penalty": 0.1, "l2_penalty": 0.01, "ewc_penalty": 1.0,
    "log_drift": True, "max_steps": 4,
}  # fmt: skip


def finetuned(rank: int, folder: Path, settings: dict[str, Any]) -> None:
    finetune_run.finetune(settings, out=folder)


def test_terms_of_retention_are_the_same_in_two_processes(
    two_processes: Callable[..., list[Any]], tmp_path: Path
) -> None:
    one, two = tmp_path / "one", tmp_path / "two"
    finetuned(0, one, {**SETTINGS, **RETAINING, "batch_size": 32})
    two_processes(finetuned, two, {**SETTINGS, **RETAINING, "batch_size": 16})
    first, second = (read_metrics(folder / "metrics.jsonl") for folder in (one, two))
    # Terms that are squares of the update double its rounding.
    for a, b in zip(first, second, strict=True):
        if "retention" in a:
            assert set(a["retention"]) == {"distillation", "local drift", "l2", "ewc"}
            assert b["retention"] == pytest.approx(a["retention"], rel=2 * ROUNDING, abs=1e-12)
    tensors = [load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (one, two)]
    assert tensors[0].keys() == tensors[1].keys()
    for key, value in tensors[0].items():
        assert (tensors[1][key] - value).abs().max() <= ROUNDING * value.abs().max(), key
