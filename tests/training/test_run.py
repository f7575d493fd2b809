"""The run directory from `finetune`, on the demo's model and scikit-learn's digits."""

from __future__ import annotations

import errno
import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import slora
import slora.adapters.save_load
from slora import CheckpointError, ConfigError, NonFiniteLossError, SLoRAError, TargetError, WriteError
from slora.runs import checkpoint_folders, rundir
from slora.runs.lock import locked
from slora.runs.metrics import read_metrics
from slora.training import checkpoint_save, finetune_run, merge_run, run_model

QUICK: dict[str, Any] = {
    "model": "demo/letters_vit",
    "data": "digits",
    "r": 2,
    "max_steps": 4,
    "batch_size": 8,
    "device": "cpu",
    "precision": "fp32",
    "log_every": 2,
    "save_every": 2,
    "eval_every": 0,
    "tensorboard": False,
    "count_flops": False,
}


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


def test_a_run_directory_holds_what_the_run_learned_and_what_it_takes_to_repeat_it() -> None:
    folder, result = finetune_run.finetune(QUICK)
    assert folder == Path("runs/letters_vit-digits-selective")
    assert sorted(path.name for path in folder.iterdir()) == [
        "adapter", "checkpoints", "classes.json", "config.yaml", "metrics.jsonl", "result.json",
    ]  # fmt: skip
    config = yaml.safe_load((folder / "config.yaml").read_text())
    assert {key: config[key] for key in QUICK} == QUICK
    written = json.loads((folder / "result.json").read_text())
    assert written["accuracy"] == result.accuracy
    assert sum(written["blocks"].values()) == 36
    again, repeated = finetune_run.finetune({}, config=folder / "config.yaml")
    assert again == Path("runs/letters_vit-digits-selective-2")
    assert repeated.history[-1] == result.history[-1]


@pytest.mark.parametrize("method", ["selective", "lora", "full", "linear"])
def test_what_a_run_learned_is_loaded_into_a_plain_model(method: str) -> None:
    folder, result = finetune_run.finetune({**QUICK, "method": method, "lr": 0.05, "warmup": 0.0})
    settings = rundir.read_settings(folder)
    model, spec, source = run_model.build(settings)
    run_model.load_result(model, settings, folder)
    images, labels = source.data(spec, training=False)[:]  # type: ignore[misc]
    with torch.no_grad():
        accuracy = (model.eval()(images).argmax(1) == labels).float().mean().item()
        start = run_model.rebuild(settings, 10).model.eval()(images)
        assert not torch.allclose(model(images), start, atol=1e-2)
    assert accuracy == pytest.approx(result.accuracy)
    assert (folder / "adapter").exists() == (method in ("selective", "lora"))
    assert (folder / "model/model.safetensors").exists() == (method in ("full", "linear"))


def test_a_few_shot_run_has_epochs_of_the_drawn_images_and_is_resumed_with_as_many() -> None:
    settings = {**QUICK, "shots": 1, "batch_size": 5, "epochs": 2, "max_steps": None}
    folder, result = finetune_run.finetune(settings)
    assert result.steps == 4
    with pytest.raises(CheckpointError, match=r"was written with shots=1, this run has 2"):
        finetune_run.finetune({"shots": 2, "epochs": 3}, resume=folder)


def test_a_stopped_run_goes_on_in_its_folder_and_ends_as_the_whole_one() -> None:
    whole, _ = finetune_run.finetune({**QUICK, "max_steps": 6})
    first, _ = finetune_run.finetune({**QUICK, "max_steps": 6}, out=Path("stopped"))
    # As a kill after step 2 leaves it.
    for path in checkpoint_folders.checkpoints(first / "checkpoints"):
        if path.name != "step-00000004":
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    again, _ = finetune_run.finetune({}, resume=first)
    assert again == first
    ours, theirs = (load_file(folder / "adapter/adapter_model.safetensors") for folder in (whole, first))
    assert all(torch.equal(ours[key], theirs[key]) for key in ours)


def test_a_finished_run_is_not_gone_on_with_unless_it_is_to_take_more_steps() -> None:
    folder, _ = finetune_run.finetune(QUICK)
    before = (folder / "config.yaml").read_text()
    with pytest.raises(ConfigError, match=rf"{folder} is finished: it has taken all of its {QUICK['max_steps']} steps"):
        finetune_run.finetune({"lr": 1e-5}, resume=folder)
    assert (folder / "config.yaml").read_text() == before
    _, result = finetune_run.finetune({"max_steps": QUICK["max_steps"] + 1}, resume=folder)
    assert result.steps == QUICK["max_steps"] + 1


def test_a_resumed_run_may_change_its_learning_rate_but_not_its_batches() -> None:
    folder, _ = finetune_run.finetune(QUICK)
    config = (folder / "config.yaml").read_bytes()
    with pytest.raises(CheckpointError, match="was written with batch_size=8, this run has 16"):
        finetune_run.finetune({"batch_size": 16}, resume=folder)
    assert (folder / "config.yaml").read_bytes() == config
    _, result = finetune_run.finetune({"lr": 1e-4, "max_steps": 6}, resume=folder)
    assert result.steps == 6


def test_a_checkpoint_can_be_branched_off_into_another_folder() -> None:
    folder, _ = finetune_run.finetune(QUICK)
    start = folder / "checkpoints/step-00000002"
    with pytest.raises(ConfigError, match="already holds step-00000004"):
        finetune_run.finetune({}, resume=start)
    branch, result = finetune_run.finetune({"lr": 1e-4}, resume=start, out=Path("branch"))
    assert (branch, result.steps) == (Path("branch"), 4)
    ours, theirs = (read_metrics(path / "metrics.jsonl") for path in (branch, folder))
    assert [record["step"] for record in ours] == [record["step"] for record in theirs] == [2, 4, 4]
    assert ours[0] == theirs[0], "the steps before the branch are the first run's"
    assert ours[1] != theirs[1]


def test_a_folder_with_another_run_is_not_written_into() -> None:
    folder, _ = finetune_run.finetune(QUICK)
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match=f"{folder} already holds a run; resume it with --resume {folder}, or"):
        finetune_run.finetune(QUICK, out=folder)
    other, _ = finetune_run.finetune(QUICK)
    with pytest.raises(ConfigError, match=f"{folder} already holds a run; choose another --out"):
        finetune_run.finetune({}, resume=other, out=folder)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"model": None}, ConfigError, "no model was named"),
        ({"model": "timm/vit_bass"}, ConfigError, "near names are"),
        ({"data": "digit"}, ConfigError, "near names are digits"),
        ({"learning_rate": 1}, ConfigError, "'learning_rate' is unknown"),
        ({"target_modules": "qvk"}, TargetError, "'qvk' matches no module; near names are 'qkv'"),
        ({"batch_size": 9999}, ConfigError, "batch_size=9999 exceeds the 80 training images"),
        ({"r": 97}, ConfigError, "r=97 is above"),
    ],
    ids=["no model", "model", "data", "setting", "target", "batch", "rank"],
)
def test_bad_input_is_refused_with_near_names(change: dict[str, Any], error: type[SLoRAError], message: str) -> None:
    with pytest.raises(error, match=message):
        finetune_run.finetune({**QUICK, **change})


def test_a_budget_above_the_blocks_leaves_no_folder_behind() -> None:
    with pytest.raises(ConfigError, match="budget=37 blocks is out of range; use 0 to 36"):
        finetune_run.finetune({**QUICK, "budget": 37})
    assert not Path("runs").exists()


def test_an_adapter_with_freed_blocks_is_saved_and_loaded() -> None:
    folder, _ = finetune_run.finetune(
        {**QUICK, "inactive": "frozen", "gate_lr": 1.0, "penalty": 3.0, "selection_warmup": 0.0, "warmup": 0.0}
    )
    settings = rundir.read_settings(folder)
    model = run_model.load_result(run_model.rebuild(settings, 10).model, settings, folder)
    assert not any(active.any() for active in slora.active_blocks(model).values())


def test_a_run_that_breaks_leaves_no_adapter_and_no_result(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("slora.training.trainer._cross_entropy", lambda smoothing: _Breaking())
    with pytest.raises(NonFiniteLossError, match=r"at step 3.*checkpoints/step-00000002"):
        finetune_run.finetune(QUICK)
    folder = Path("runs/letters_vit-digits-selective")
    assert sorted(path.name for path in folder.iterdir()) == [
        "checkpoints", "classes.json", "config.yaml", "metrics.jsonl",
    ]  # fmt: skip


class _Breaking:
    def __init__(self) -> None:
        self.calls = 0

    def __call__(self, logits: torch.Tensor, labels: torch.Tensor) -> torch.Tensor:
        self.calls += 1
        loss = torch.nn.functional.cross_entropy(logits, labels)
        return loss / 0.0 if self.calls == 3 else loss


def ran(message: str, marker: str) -> dict[str, Any]:
    """The arguments of `finetune` in the command line that a message names after `marker`."""
    words = shlex.split(message.rpartition(marker)[2].partition(" and, to ")[0])
    assert words[:2] == ["slora", "finetune"]
    given = dict(zip(words[2::2], words[3::2], strict=True))
    paths = {key: Path(given[f"--{key}"]) for key in ("config", "out", "resume") if f"--{key}" in given}
    return {"overrides": {"lr": float(given["--lr"])} if "--lr" in given else {}, **paths}


def failing(monkeypatch: pytest.MonkeyPatch, step: int) -> None:
    """Let the loss be NaN from the forward pass number `step` on."""
    import torch.nn.functional as F

    calls = 0

    def criterion(logits: Any, labels: Any) -> Any:
        nonlocal calls
        calls += 1
        return F.cross_entropy(logits, labels) * (float("nan") if calls >= step else 1.0)

    monkeypatch.setattr("slora.training.trainer._cross_entropy", lambda smoothing: criterion)


def test_a_run_that_broke_before_its_first_checkpoint_is_restarted_as_its_message_says(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        failing(patch, 1)
        with pytest.raises(NonFiniteLossError, match="no checkpoint was written before it; start again") as caught:
            finetune_run.finetune({**QUICK, "lr": 0.5, "tensorboard": True}, out=Path("nf"))
    (Path("nf") / "metrics.jsonl").write_text('{"step": 9, "loss": 1.0}\n')
    old = [path.name for path in Path("nf/tensorboard").iterdir()]
    command = ran(str(caught.value), "Run: ")
    assert command == {"overrides": {"lr": 0.05}, "config": Path("nf/config.yaml"), "out": Path("nf")}
    with pytest.raises(CheckpointError, match=r"holds no checkpoint; restart its run with: slora finetune --config"):
        finetune_run.finetune({}, resume=Path("nf"))
    folder, result = finetune_run.finetune(**command)
    assert (folder, result.steps, rundir.read_settings(folder).lr) == (Path("nf"), 4, 0.05)
    assert [record["step"] for record in read_metrics(folder / "metrics.jsonl")] == [2, 4, 4]
    assert not set(old) & {path.name for path in Path("nf/tensorboard").iterdir()}


def test_after_a_loss_that_is_not_finite_the_message_goes_on_from_the_last_checkpoint(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with monkeypatch.context() as patch:
        failing(patch, 3)
        with pytest.raises(NonFiniteLossError, match="last good checkpoint is nf/checkpoints/step-00000002") as caught:
            finetune_run.finetune({**QUICK, "lr": 0.5}, out=Path("nf"))
    command = ran(str(caught.value), "Run: ")
    assert command == {"overrides": {"lr": 0.05}, "resume": Path("nf")}
    assert finetune_run.finetune(**command)[1].steps == 4


@pytest.mark.parametrize("saved", [1, 2], ids=["one checkpoint", "two"])
def test_a_checkpoint_of_a_diverging_run_is_named_with_the_way_back(
    saved: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {**QUICK, "save_every": 1, "lr": 0.5}
    with monkeypatch.context() as patch:
        failing(patch, saved + 1)
        with pytest.raises(NonFiniteLossError):
            finetune_run.finetune(settings, out=Path("nf"))
    last = Path(f"nf/checkpoints/step-0000000{saved}")
    with monkeypatch.context() as patch:
        failing(patch, 1)
        with pytest.raises(NonFiniteLossError) as caught:
            finetune_run.finetune({"lr": 0.05}, resume=Path("nf"))
    message = str(caught.value)
    assert f"no checkpoint was written since {last}; resume from it with a lower lr" in message
    assert "this checkpoint itself may be from a diverging run" in message
    assert ran(message, "Run: ") == {"overrides": {"lr": 0.005}, "resume": last}
    if saved == 2:
        assert "go back to the one before it, nf/checkpoints/step-00000001" in message
        command = ran(message, "to go back: ")
    else:
        assert "from a diverging run: start again." in message
        command = ran(message, "to start again: ")
    folder, result = finetune_run.finetune(**command)
    assert (folder, result.steps) == (Path("nf-2"), 4)
    assert [path.name for path in checkpoint_folders.checkpoints("nf/checkpoints")][-1] == last.name


def test_a_full_disk_before_the_first_checkpoint_says_what_to_run(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(checkpoint_save, "save_file", full)
        with pytest.raises(WriteError, match="free space or choose another folder, then start the run again") as caught:
            finetune_run.finetune(QUICK, out=Path("here it is"))
    assert finetune_run.finetune(**ran(str(caught.value), "Then run: "))[0] == Path("here it is")


def test_two_processes_do_not_write_into_one_folder() -> None:
    code = (
        "from pathlib import Path\nfrom slora.runs.lock import locked\n"
        "with locked(Path('shared')):\n    print('held', flush=True)\n    input()"
    )
    other = subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert other.stdin is not None
    assert other.stdout is not None
    assert other.stdout.readline() == "held\n"
    with pytest.raises(ConfigError, match="another run is writing into shared"):
        finetune_run.finetune(QUICK, out=Path("shared"))
    other.kill()
    other.wait()
    assert list(Path("shared").iterdir()) == []
    with locked(Path("shared")):
        pass


@pytest.mark.parametrize(
    "damage",
    [
        lambda tensors: tensors.pop("head.bias"),
        lambda tensors: tensors.update(extra=torch.zeros(1)),
        lambda tensors: tensors.update({"head.bias": tensors["head.bias"][:-1].clone()}),
        lambda tensors: tensors.update({"head.bias": tensors["head.bias"].half()}),
        lambda tensors: tensors["head.bias"].fill_(float("nan")),
    ],
    ids=["missing", "too many", "shape", "dtype", "NaN"],
)
def test_a_damaged_result_of_a_run_without_blocks_changes_nothing(damage: Any) -> None:
    folder, _ = finetune_run.finetune({**QUICK, "method": "linear"})
    path = folder / "model/model.safetensors"
    tensors = load_file(path)
    damage(tensors)
    save_file(tensors, path)
    settings = rundir.read_settings(folder)
    model = run_model.build(settings)[0]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(CheckpointError, match=r"model\.safetensors does not fit this .*(head\.bias|extra)"):
        run_model.load_result(model, settings, folder)
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_a_folder_that_cannot_be_made_is_named() -> None:
    with pytest.raises(WriteError, match=r"\(/dev/full is not a folder\); choose another folder"):
        finetune_run.finetune(QUICK, out=Path("/dev/full"))


def test_a_new_result_takes_away_the_evaluation_of_the_old_one() -> None:
    folder, _ = finetune_run.finetune(QUICK)
    (folder / "evaluation.json").write_text("{}")
    finetune_run.finetune({"max_steps": 5}, resume=folder)
    assert not (folder / "evaluation.json").exists()


def test_a_full_disk_at_the_end_leaves_the_last_checkpoint_to_go_on_from(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*args: Any, **kwargs: Any) -> Any:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(slora.adapters.save_load, "save_file", full)
        with pytest.raises(CheckpointError, match=r"adapter_model.safetensors could not be written \(No space left"):
            finetune_run.finetune(QUICK)
    folder = Path("runs/letters_vit-digits-selective")
    assert not (folder / "result.json").exists()
    finetune_run.finetune({}, resume=folder)
    assert (folder / "adapter/adapter_model.safetensors").exists()


def test_a_run_that_is_not_finished_is_named_as_such() -> None:
    folder, _ = finetune_run.finetune({**QUICK, "method": "linear"})
    (folder / "model/model.safetensors").unlink()
    settings = rundir.read_settings(folder)
    with pytest.raises(
        CheckpointError, match=f"the run is not finished; continue it with: slora finetune --resume {folder}"
    ):
        run_model.load_result(run_model.build(settings)[0], settings, folder)


def test_weights_of_another_model_are_refused() -> None:
    folder, _ = finetune_run.finetune({**QUICK, "method": "linear"})
    settings = rundir.read_settings(folder)
    other = run_model.rebuild(settings, 11).model
    with pytest.raises(CheckpointError, match=r"model.safetensors does not fit this VisionTransformer"):
        run_model.load_result(other, settings, folder)


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"holds no config.yaml; give the folder of a run"):
        rundir.read_settings(tmp_path)


@pytest.mark.parametrize("from_run", [True, False], ids=["run", "adapter"])
def test_a_merged_model_computes_what_the_adapted_one_does(from_run: bool) -> None:
    folder, _ = finetune_run.finetune({**QUICK, "lr": 0.05})
    settings = rundir.read_settings(folder)
    model, spec, source = run_model.build(settings)
    run_model.load_result(model, settings, folder)
    out = Path("merged.safetensors")
    if from_run:
        count = merge_run.merge_adapter(folder, out, None, False, None)
    else:
        count = merge_run.merge_adapter(folder / "adapter", out, "demo/letters_vit", False, None)
    assert count == 36
    plain = run_model.rebuild(settings, 10).model
    plain.load_state_dict(load_file(out))
    images, _ = source.data(spec, training=False)[:20]  # type: ignore[misc]
    with torch.no_grad():
        expected, found = model.eval()(images), plain.eval()(images)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)
    with pytest.raises(ConfigError, match=r"merged.safetensors exists"):
        merge_run.merge_adapter(folder, out, None, False, None)


def test_a_merged_file_says_what_it_holds() -> None:
    folder, _ = finetune_run.finetune({**QUICK, "pretrained": True})
    merge_run.merge_adapter(folder, Path("run.safetensors"), scale=0.5)
    digest = json.loads((folder / "adapter/selective.json").read_text())["base"]["digest"]
    expected = {
        "format": "pt", "slora_version": slora.__version__, "model": "demo/letters_vit", "pretrained": "true",
        "active_blocks": "36", "scale": "0.5", "base_fingerprint": digest,
    }  # fmt: skip
    with safe_open("run.safetensors", framework="pt") as file:
        found = file.metadata()
    assert json.loads(found.pop("classes")) == [str(digit) for digit in range(10)]
    assert found == {**expected, "data": "digits", "method": "selective"}
    merge_run.merge_adapter(folder / "adapter", Path("adapter.safetensors"), "demo/letters_vit", pretrained=True)
    with safe_open("adapter.safetensors", framework="pt") as file:
        assert file.metadata() == {**expected, "scale": "1.0"}
    full, _ = finetune_run.finetune({**QUICK, "method": "full", "max_steps": 1})
    merge_run.merge_adapter(full, Path("full.safetensors"), which="last")
    with safe_open("full.safetensors", framework="pt") as file:
        found = file.metadata()
    assert (found["method"], found["active_blocks"], "base_fingerprint" in found) == ("full", "0", False)


def test_a_base_weight_that_is_not_finite_is_not_written_into_a_merged_file(monkeypatch: pytest.MonkeyPatch) -> None:
    finetune_run.finetune({**QUICK, "max_steps": 1}, out=Path("run"))

    def spoilt(*args: Any) -> Any:
        built = run_model.rebuild(*args)
        dict(built.model.named_parameters())["blocks.0.attn.qkv.weight"].data[-1, -1] = float("nan")
        return built

    monkeypatch.setattr(merge_run, "rebuild", spoilt)
    with pytest.raises(CheckpointError, match=r"'blocks\.0\.attn\.qkv\.weight' holds NaN"):
        merge_run.merge_adapter(Path("run"), Path("merged.safetensors"))
    assert not Path("merged.safetensors").exists()


def test_an_adapter_without_its_run_needs_the_name_of_its_model() -> None:
    folder, _ = finetune_run.finetune(QUICK)
    with pytest.raises(
        ConfigError, match=r"is an adapter without the config\.yaml of its run; name its model with --model"
    ):
        merge_run.merge_adapter(folder / "adapter", Path("x.safetensors"), None, False, None)
    full, _ = finetune_run.finetune({**QUICK, "method": "linear"})
    plain = re.escape(f"method=linear, which has no LoRA blocks to show or to merge; its result is already a "
                      f"plain model: {full / 'model/model.safetensors'}")  # fmt: skip
    with pytest.raises(ConfigError, match=plain):
        merge_run.merge_adapter(full, Path("x.safetensors"), None, False, None)


def contents(folder: Path) -> dict[Path, bytes]:
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_refused_resume_leaves_the_settings_of_the_run() -> None:
    folder, _ = finetune_run.finetune(QUICK)
    with open(folder / "checkpoints/step-00000004/tensors.safetensors", "rb+") as file:
        file.write(b"damage")
    before = contents(folder)
    with pytest.raises(CheckpointError, match="is damaged: its SHA-256"):
        finetune_run.finetune({"max_steps": 6}, resume=folder)
    assert contents(folder) == before


@pytest.mark.parametrize("file", ["tensors.safetensors", "state.json", "sha256sums.txt"])
@pytest.mark.parametrize("way", ["continue from it in another folder: ", "or here: "])
def test_beside_a_damaged_checkpoint_the_newest_intact_one_is_named_with_commands_that_work(
    file: str, way: str
) -> None:
    finetune_run.finetune(QUICK, out=Path("run"))
    last = Path("run/checkpoints/step-00000004")
    (last / file).write_bytes(b"damage")
    with pytest.raises(CheckpointError, match="The newest intact one is step-00000002") as caught:
        finetune_run.finetune({"max_steps": 6}, resume=Path("run"))
    message = str(caught.value).partition(" or here: ")[0] if way.startswith("continue") else str(caught.value)
    if way == "or here: ":
        moved, _, message = message.rpartition(way)[2].partition(" && ")
        subprocess.run(shlex.split(moved), check=True)
        way = ""
    folder, result = finetune_run.finetune(**ran(message, way or "or here: "))
    assert (folder, result.steps) == (Path("run-2" if way else "run"), 4)


def test_where_no_checkpoint_is_intact_the_run_starts_again_elsewhere() -> None:
    finetune_run.finetune({**QUICK, "save_every": 0}, out=Path("run"))
    (Path("run/checkpoints/step-00000004") / "state.json").write_bytes(b"{}")
    with pytest.raises(CheckpointError, match="No other checkpoint of this run is intact") as caught:
        finetune_run.finetune({}, resume=Path("run"))
    assert finetune_run.finetune(**ran(str(caught.value), "start again: "))[0] == Path("run-2")


def test_a_finished_run_without_checkpoints_is_restarted_in_another_folder() -> None:
    finetune_run.finetune(QUICK, out=Path("run"))
    shutil.rmtree("run/checkpoints")
    with pytest.raises(CheckpointError, match="run holds no checkpoint; restart its run with") as caught:
        finetune_run.finetune({}, resume=Path("run"))
    assert finetune_run.finetune(**ran(str(caught.value), "restart its run with: "))[0] == Path("run-2")
    with pytest.raises(ConfigError, match="run already holds a run; choose another --out"):
        finetune_run.finetune(QUICK, out=Path("run"))


def test_a_folder_that_another_run_writes_into_is_refused_before_a_model_is_built(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    finetune_run.finetune(QUICK, out=Path("run"))
    monkeypatch.setattr(finetune_run, "build", None)
    code = "from pathlib import Path; from slora.runs.lock import locked\nwith locked(Path('run')): input(print())"
    with subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(ConfigError, match="another run is writing into run; wait"):
            finetune_run.finetune({"max_steps": 6}, resume=Path("run"))
        other.kill()
