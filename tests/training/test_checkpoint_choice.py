"""`--checkpoint`: the weights of one checkpoint of a run, finished or not, evaluated, merged and inspected."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from slora import CheckpointError, ConfigError
from slora.cli import inspect, merge
from slora.layers import adapted_layers
from slora.runs import checkpoint_folders, checkpoint_state, rundir
from slora.runs.checkpoint_state import digests_of
from slora.runs.settings import Method
from slora.training import finetune_run, merge_run, run_model, trainer
from slora.training.evaluate_run import evaluate

pytestmark = pytest.mark.once

QUICK: dict[str, Any] = {
    "model": "demo/letters_vit", "data": "digits", "r": 2, "max_steps": 4, "batch_size": 8, "device": "cpu",
    "precision": "fp32", "log_every": 2, "save_every": 1, "eval_every": 1, "keep_last": 9, "tensorboard": False,
    "count_flops": False, "lr": 0.05, "warmup": 0.0, "gate_lr": 0.4,
}  # fmt: skip


@pytest.fixture(autouse=True)
def _few_digits_elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """80 digits to train on and 40 to evaluate on, in an empty working directory."""
    from slora.demo import digits as module

    whole = module.digits

    def few(seed: int) -> Any:
        (images, labels), (more_images, more_labels) = whole(seed)
        return (images[:80], labels[:80]), (more_images[:40], more_labels[:40])

    monkeypatch.setattr(module, "digits", few)
    monkeypatch.chdir(tmp_path)


def watched(monkeypatch: pytest.MonkeyPatch) -> dict[int, nn.Module]:
    """Keep a copy of the model at every checkpoint that a run writes."""
    import copy

    seen: dict[int, nn.Module] = {}
    save = trainer.save_checkpoint

    def copying(folder: Path, model: nn.Module, *others: Any) -> Path:
        path = save(folder, model, *others)
        seen[checkpoint_state.step_of(path)] = copy.deepcopy(model).eval()
        return path

    monkeypatch.setattr(trainer, "save_checkpoint", copying)
    return seen


def images() -> torch.Tensor:
    return torch.rand(6, 1, 16, 16, generator=torch.Generator().manual_seed(5))


@pytest.mark.parametrize("method", ["selective", "lora", "full", "linear"])
def test_a_checkpoint_computes_what_the_model_did_at_its_step(method: Method, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(monkeypatch)
    folder, _ = finetune_run.finetune({**QUICK, "method": method})
    settings = rundir.read_settings(folder)
    for step in (1, 3):
        model = run_model.load_result(
            run_model.rebuild_for(folder, settings), settings, folder, checkpoint_folders.chosen(folder, str(step))
        )
        with torch.no_grad():
            assert torch.equal(model.eval()(images()), seen[step](images()))
        out = Path(f"{step}.safetensors")
        count = merge_run.merge_adapter(folder, out, which=str(step))
        assert count == sum(len(layer.activity().active) for _, layer in adapted_layers(seen[step]))
        plain = run_model.rebuild(settings, 10).model.eval()
        plain.load_state_dict(load_file(out))
        with torch.no_grad():
            torch.testing.assert_close(plain(images()), seen[step](images()), rtol=1e-4, atol=1e-5)
    assert not torch.equal(seen[1](images()), seen[3](images()))


def test_an_interrupted_run_is_evaluated_merged_and_inspected_from_its_checkpoints(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("slora.training.trainer._cross_entropy", lambda smoothing: Breaking(at=4))
    with pytest.raises(RuntimeError, match="power cut"):
        finetune_run.finetune(QUICK, out=Path("cut"))
    cut = Path("cut")
    assert not (cut / rundir.RESULT).exists()
    result = evaluate(cut, which="last")
    assert result["checkpoint"] == "step-00000003"
    records = [json.loads(line) for line in (cut / "metrics.jsonl").read_text().splitlines()]
    accuracy = {record["step"]: record["eval_accuracy"] for record in records if "eval_accuracy" in record}
    assert result["accuracy"]["top1"] == pytest.approx(accuracy[3])
    assert json.loads((cut / "evaluation-step-00000003.json").read_text()) == result
    assert not (cut / "evaluation.json").exists()
    best = max(accuracy, key=lambda step: accuracy[step])
    assert evaluate(cut, which="best")["accuracy"]["top1"] == pytest.approx(accuracy[best])
    assert run_model.blocks_of(cut, "2")[0] == "step-00000002"
    assert merge_run.merge_adapter(cut, Path("cut.safetensors"), which="last") > 0
    with pytest.raises(
        CheckpointError, match=r"\(--checkpoint last uses .*\): the run is not finished; continue it with"
    ):
        evaluate(cut)


class Breaking:
    """Cross-entropy that fails at a step as a cut of the power does."""

    def __init__(self, at: int) -> None:
        self.at, self.calls = at, 0

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise RuntimeError("power cut")
        return nn.functional.cross_entropy(logits, labels)


def change(folder: Path, best_step: int | None) -> None:
    """Let the newest checkpoint of a run name another step as its best."""
    state = checkpoint_folders.newest(folder) / "state.json"
    content = json.loads(state.read_text())
    content["result"] |= {"best_step": best_step, "best_accuracy": None if best_step is None else 0.5}
    state.write_text(json.dumps(content))
    (state.parent / "sha256sums.txt").write_text(digests_of(state, state.parent / "tensors.safetensors"))


def test_best_is_the_step_that_the_run_says_it_is() -> None:
    folder, result = finetune_run.finetune(QUICK)
    assert checkpoint_folders.chosen(folder, "best").name == f"step-{result.best_step:08d}"
    assert checkpoint_folders.chosen(folder, "last").name == "step-00000004"
    assert checkpoint_folders.chosen(folder, "2").name == "step-00000002"
    change(folder, best_step=3)
    assert checkpoint_folders.chosen(folder, "best").name == "step-00000003"


def test_blocks_freed_by_frozen_are_shown_and_merged(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = watched(monkeypatch)
    settings = {"inactive": "frozen", "gate_lr": 40.0, "penalty": 0.3, "selection_warmup": 0.0}
    folder, _ = finetune_run.finetune({**QUICK, **settings, "max_steps": 3})
    freed = [name for name, layer in adapted_layers(seen[3]) if layer.released]
    assert freed
    _, content = run_model.blocks_of(folder, "3")
    for name, layer in adapted_layers(seen[3]):
        assert content["layers"][name]["gate"] == layer.gate.tolist()
        assert content["layers"][name]["active"] == list(layer.activity().active)
        assert content["layers"][name]["r"] == 2


def test_what_cannot_be_meant_is_named_with_the_checkpoints_there_are(tmp_path: Path) -> None:
    folder, _ = finetune_run.finetune({**QUICK, "max_steps": 2})
    with pytest.raises(CheckpointError, match=r"has no checkpoint of step 7; there are 1, 2$"):
        checkpoint_folders.chosen(folder, "7")
    with pytest.raises(ConfigError, match=r"checkpoint='bets' is neither best nor last .*; there are 1, 2$"):
        checkpoint_folders.chosen(folder, "bets")
    best = checkpoint_folders.chosen(folder, "best")
    shutil.rmtree(best)
    with pytest.raises(
        CheckpointError, match=rf"most accurate at step {checkpoint_state.step_of(best)}, which has no checkpoint"
    ):
        checkpoint_folders.chosen(folder, "best")
    unevaluated, _ = finetune_run.finetune({**QUICK, "max_steps": 1, "method": "linear"})
    change(unevaluated, best_step=None)
    with pytest.raises(CheckpointError, match="was not evaluated yet"):
        checkpoint_folders.chosen(unevaluated, "best")
    with pytest.raises(ConfigError, match="method=linear, which has no LoRA blocks to show"):
        run_model.blocks_of(unevaluated, "last")
    with pytest.raises(ConfigError, match=r"no LoRA blocks that scale=0.5 could act on"):
        merge_run.merge_adapter(unevaluated, Path("x"), which="last", scale=0.5)
    with pytest.raises(ConfigError, match=r"holds no config.yaml"):
        evaluate(tmp_path, which="last")


def test_a_checkpoint_from_before_the_choice_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    own = {name: value for name, value in QUICK.items() if not name.startswith("gate_")}
    folder, _ = finetune_run.finetune({**own, "budget": 2, "selection_warmup": 0.25, "settling": 0.5})
    inspect.inspect(folder, checkpoint="1")
    assert "note: the choice of blocks is not made yet in step-00000001: it is final at step 2 of 4" in (
        capsys.readouterr().out
    )
    merge.merge(folder, Path("early.safetensors"), checkpoint="1")
    assert "is not made yet in step-00000001" in capsys.readouterr().out
    inspect.inspect(folder, checkpoint="2")
    merge.merge(folder, Path("late.safetensors"), checkpoint="2")
    assert "not made yet" not in capsys.readouterr().out
