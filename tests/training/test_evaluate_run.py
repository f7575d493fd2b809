"""The `evaluate` command: what a model can do, and what it knew and still knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from slora import CheckpointError, ConfigError
from slora.evaluation import features, knn_accuracy
from slora.runs import rundir
from slora.sources import data
from slora.sources.data import open_data
from slora.training import finetune_run, run_model
from slora.training.evaluate_run import evaluate

QUICK: dict[str, Any] = {
    "model": "demo/letters_vit", "data": "digits", "r": 2, "max_steps": 6, "batch_size": 8, "device": "cpu",
    "precision": "fp32", "eval_every": 0, "save_every": 0, "tensorboard": False, "count_flops": False, "lr": 0.02,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _few_images(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """4 letters of each class to vote and 1 to name, 80 digits to train on and 40 to evaluate on."""
    from slora.demo import digits as digits_module
    from slora.demo import letters as letters_module

    rendered, whole = letters_module.letters, digits_module.digits

    def few(seed: int) -> Any:
        (images, labels), (more_images, more_labels) = whole(seed)
        return (images[:80], labels[:80]), (more_images[:40], more_labels[:40])

    monkeypatch.setattr(letters_module, "letters", lambda n, seed: rendered(4 if n == 100 else 1, seed))
    monkeypatch.setattr(digits_module, "digits", few)
    monkeypatch.chdir(tmp_path)


def expected(model: torch.nn.Module, k: int) -> float:
    source, spec = open_data("letters"), data.InputSpec(1, 16, (0.0,), (1.0,))
    parts = []
    for training in (True, False):
        images, labels = source.data(spec, training=training)[:]  # type: ignore[misc]
        parts += features(model, [(images, labels)])
    return knn_accuracy(*parts, k=[k])[k]  # type: ignore[misc]


@pytest.mark.parametrize("method", ["selective", "lora", "full", "linear"])
def test_before_is_the_model_that_training_started_from_and_after_the_trained_one(method: str) -> None:
    folder, trained = finetune_run.finetune({**QUICK, "method": method})
    settings = rundir.read_settings(folder)
    before = run_model.rebuild(settings, 10).model
    after = run_model.load_result(run_model.rebuild(settings, 10).model, settings, folder)
    result = evaluate(folder, "letters", k=[5])
    assert result["accuracy"]["top1"] == pytest.approx(trained.accuracy)
    assert result["knn"]["before"] == {"5": pytest.approx(expected(before, 5))}
    assert result["knn"]["after"] == {"5": pytest.approx(expected(after, 5))}
    assert (result["knn"]["bank"], result["knn"]["queries"]) == (208, 52)
    if method == "linear":
        assert result["knn"]["before"] == result["knn"]["after"]
    if method == "full":
        assert result["knn"]["before"] != result["knn"]["after"]
    assert json.loads((folder / "evaluation.json").read_text()) == result


def test_without_a_source_only_the_accuracy_is_measured() -> None:
    folder, _ = finetune_run.finetune(QUICK)
    result = evaluate(folder)
    assert result["knn"] is None
    assert result["accuracy"]["count"] == 40


def test_bad_input_is_refused_before_anything_is_computed(tmp_path: Path) -> None:
    folder, _ = finetune_run.finetune(QUICK)
    with pytest.raises(ConfigError, match="data='leters' is unknown; near names are letters"):
        evaluate(folder, "leters")
    with pytest.raises(ConfigError, match="k=300 exceeds the 208 images of letters that vote"):
        evaluate(folder, "letters", k=[10, 300])
    with pytest.raises(ConfigError, match="shots=0 is not a number of images per class"):
        evaluate(folder, "letters", k=[5], shots=[0])
    with pytest.raises(ConfigError, match="shots=5 exceeds the 4 images of class 'A'"):
        evaluate(folder, "letters", k=[5], shots=[1, 5])
    with pytest.raises(ConfigError, match=r"holds no config.yaml"):
        evaluate(tmp_path)
    for path in (folder / "adapter").iterdir():
        path.unlink()
    (folder / "adapter").rmdir()
    with pytest.raises(CheckpointError, match="the run is not finished"):
        evaluate(folder)
