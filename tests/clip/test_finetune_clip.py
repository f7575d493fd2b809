"""Fine-tuning a CLIP from the command to weights that open_clip loads."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from slora.adapters.save_load import load_adapter
from slora.runs.metrics import read_metrics
from slora.sources.data import as_input, open_data
from slora.sources.models import build_clip
from slora.training.evaluate_run import evaluate
from slora.training.finetune_run import finetune
from slora.training.merge_run import merge_adapter
from tests.clip import tiny_clip

CASES = [(tower, loss) for tower in ("image", "text", "both") for loss in ("cross-entropy", "contrastive")]

SETTINGS: dict[str, Any] = {
    "head": "zero-shot", "templates": "simple", "budget": 2, "max_steps": 6, "save_every": 3, "batch_size": 8,
    "r": 2, "lr": 0.02, "augment": "none", "num_workers": 0, "device": "cpu", "precision": "fp32", "log_every": 2,
    "tensorboard": False, "progress": False, "count_flops": False,
}  # fmt: skip

Run = Callable[..., Path]


@pytest.fixture(scope="module")
def run(tiny: str, weights: str, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """Return `run(**settings)`: the directory of a finished run, the same for the same settings."""
    known: dict[str, Path] = {}

    def make(**settings: Any) -> Path:
        key = json.dumps(settings, sort_keys=True)
        if key not in known:
            given = {"model": tiny, "pretrained": weights, "data": f"imagefolder:{images}", **SETTINGS, **settings}
            known[key], _ = finetune(given, out=tmp_path_factory.mktemp("runs") / "run")
        return known[key]

    return make


def merged(folder: Path, to: Path) -> nn.Module:
    """The plain CLIP that open_clip builds from the merged file of a run."""
    import open_clip

    merge_adapter(folder, to)
    model: nn.Module = open_clip.create_model("ViT-tiny-clip", pretrained=str(to))
    return model.eval()


@pytest.mark.parametrize(("tower", "loss"), CASES)
def test_the_merged_file_is_a_clip_in_which_the_asked_tower_has_changed(
    tower: str, loss: str, run: Run, tmp_path: Path
) -> None:
    folder, base = run(tower=tower, loss=loss), tiny_clip.model().state_dict()
    after = merged(folder, tmp_path / "merged.safetensors").state_dict()
    changed = {name for name, value in after.items() if not torch.equal(value, base[name])}
    assert "logit_scale" in changed
    towers = {"image" if name.startswith("visual.") else "text" for name in changed - {"logit_scale"}}
    assert towers <= {"image", "text"} if tower == "both" else towers == {tower}
    # Two blocks, each in one weight.
    assert 1 <= len(changed) - 1 <= 2
    with safe_open(tmp_path / "merged.safetensors", "pt") as file:
        metadata = file.metadata()
    assert (metadata["head"], metadata["tower"], metadata["loss"]) == ("zero-shot", tower, loss)
    assert json.loads(metadata["names"]) == ["blue", "green", "red"]
    assert len(json.loads(metadata["templates"])) == 7


@pytest.mark.parametrize(("tower", "loss"), CASES)
def test_the_accuracy_of_a_run_is_that_of_open_clips_zero_shot_classifier(
    tower: str, loss: str, run: Run, images: Path, tmp_path: Path
) -> None:
    import open_clip

    folder = run(tower=tower, loss=loss)
    model: Any = merged(folder, tmp_path / "merged.safetensors")
    tokenizer = open_clip.get_tokenizer("ViT-tiny-clip")
    heads = open_clip.build_zero_shot_classifier(
        model, tokenizer, ["blue", "green", "red"], open_clip.SIMPLE_IMAGENET_TEMPLATES
    )
    spec, held_out = build_clip(tiny_clip.NAME).input, open_data(f"imagefolder:{images}").evaluation
    pixels = torch.stack([as_input(image, spec) for image, _ in held_out])
    labels = torch.tensor([label for _, label in held_out])
    with torch.no_grad():
        logits = model.logit_scale.exp() * model.encode_image(pixels, normalize=True) @ heads
    last = [record for record in read_metrics(folder / "metrics.jsonl") if "eval_loss" in record][-1]
    assert last["eval_accuracy"] == (logits.argmax(1) == labels).double().mean().item()
    # Merging rounds each weight once; a similarity is a sum of 24 products times at most 100.
    loss_by_hand = nn.functional.cross_entropy(logits, labels).item()
    assert last["eval_loss"] == pytest.approx(loss_by_hand, rel=1e-4, abs=1e-4)
    assert evaluate(folder)["accuracy"]["loss"] == pytest.approx(last["eval_loss"], rel=1e-5)


@pytest.mark.parametrize(("tower", "loss"), CASES)
def test_a_resumed_run_ends_bit_for_bit_where_the_uninterrupted_one_ends(
    tower: str, loss: str, run: Run, tmp_path: Path
) -> None:
    whole = run(tower=tower, loss=loss)
    resumed, _ = finetune({}, resume=whole / "checkpoints" / "step-00000003", out=tmp_path / "resumed")
    one, two = (load_file(folder / "adapter" / "adapter_model.safetensors") for folder in (whole, resumed))
    assert one.keys() == two.keys()
    assert all(torch.equal(one[key], two[key]) for key in one)
    results = [json.loads((folder / "result.json").read_text()) for folder in (whole, resumed)]
    assert results[0]["accuracy"] == results[1]["accuracy"]


def test_the_adapter_belongs_to_the_plain_clip(run: Run, weights: str, tmp_path: Path) -> None:
    folder = run(tower="both", loss="contrastive")
    clip = build_clip(tiny_clip.NAME, weights)
    load_adapter(clip.model, folder / "adapter")
    after = merged(folder, tmp_path / "merged.safetensors")
    pixels, tokens = torch.randn(2, 3, 16, 16), clip.tokenizer(["red", "green"])
    assert torch.equal(clip.model.logit_scale, after.logit_scale)
    for name, inputs in (("encode_image", pixels), ("encode_text", tokens)):
        with torch.no_grad():
            ours, theirs = (getattr(model.eval(), name)(inputs) for model in (clip.model, after))
        # Weights round once when they are merged; embeddings are of the order of 1.
        assert torch.allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    # Without the directory of its run: the name of the model is enough.
    merge_adapter(folder / "adapter", tmp_path / "again.safetensors", f"{tiny_clip.NAME}:{weights}")
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(value, again[name]) for name, value in after.state_dict().items())


def test_blocks_of_the_asked_tower_are_made_and_no_others(run: Run) -> None:
    for tower, towers in (("image", {True}), ("text", {False}), ("both", {True, False})):
        blocks = json.loads((run(tower=tower, loss="contrastive") / "result.json").read_text())["blocks"]
        assert {name.startswith("visual.") for name in blocks} == towers
        assert len(blocks) == 8 * len(towers)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_other_methods_train_the_asked_tower_too(method: str, run: Run, tmp_path: Path) -> None:
    import open_clip

    folder = run(tower="text", method=method, budget=None)
    base = tiny_clip.model().state_dict()
    if method == "full":
        after = open_clip.create_model("ViT-tiny-clip", pretrained=str(folder / "model" / "model.safetensors"))
    else:
        after = merged(folder, tmp_path / "merged.safetensors")
    changed = {name for name, value in after.state_dict().items() if not torch.equal(value, base[name])}
    assert {"transformer.resblocks.0.mlp.c_fc.weight", "logit_scale"} <= changed
    assert not any(name.startswith("visual.") for name in changed)
    assert evaluate(folder)["accuracy"]["count"] == 3


def test_gates_amp_accumulation_distillation_and_flops_work_with_both_towers(run: Run) -> None:
    folder = run(
        tower="both", budget=None, penalty=0.1, precision="bf16", gradient_accumulation=2, retain_data="generic",
        count_flops=True, batch_size=4, clip_norm=0.5,
    )  # fmt: skip
    records = read_metrics(folder / "metrics.jsonl")
    assert all(torch.tensor(record["loss"]).isfinite() for record in records if "loss" in record)
    assert json.loads((folder / "result.json").read_text())["flops"] > 0


def test_a_drift_price_counts_the_drift_of_both_towers(run: Run) -> None:
    folder = run(tower="both", drift_price=0.5)
    assert sum(map(len, json.loads((folder / "result.json").read_text())["active_blocks"].values())) == 2


def test_a_share_of_the_flops_is_a_budget_of_the_contrastive_loss(run: Run) -> None:
    folder = run(tower="both", budget=0.3, budget_unit="flops")
    assert sum(map(len, json.loads((folder / "result.json").read_text())["active_blocks"].values())) > 0


@pytest.mark.parametrize("loss", ["cross-entropy", "contrastive"])
def test_sensitivities_are_of_the_loss_of_the_run_and_see_both_towers(loss: str, run: Run) -> None:
    folder = run(tower="both", loss=loss, strategy="sensitivity", budget=12, max_steps=2)
    blocks = json.loads((folder / "result.json").read_text())["active_blocks"]
    # Without a gradient in one tower, its 12 blocks would be left out.
    assert sum(map(len, blocks.values())) == 12
    assert {name.startswith("visual.") for name, active in blocks.items() if active} == {True, False}


def test_frozen_weights_of_16_bits_are_those_of_both_towers(run: Run) -> None:
    folder = run(tower="both", precision="bf16", base_dtype="bfloat16", max_steps=2)
    assert json.loads((folder / "result.json").read_text())["accuracy"] is not None
    folder = run(tower="image", precision="bf16", base_dtype="bfloat16", max_steps=2)
    assert json.loads((folder / "result.json").read_text())["accuracy"] is not None


def test_a_run_keeps_its_prompts_whatever_their_files_hold_later(run: Run, tmp_path: Path) -> None:
    names, prompts = tmp_path / "names.txt", tmp_path / "prompts.txt"
    names.write_text("the sea\na meadow\na rose\n")
    prompts.write_text("a picture of {}\n")
    folder = run(class_names=str(names), templates=str(prompts))
    before = evaluate(folder)["accuracy"]
    names.unlink()
    prompts.write_text("something else\n")
    assert evaluate(folder)["accuracy"] == before
    assert json.loads((folder / "prompts.json").read_text()) == {
        "names": ["the sea", "a meadow", "a rose"],
        "templates": ["a picture of {}"],
    }
    finetune({}, resume=folder / "checkpoints" / "step-00000003", out=tmp_path / "resumed")


def losses_of(rank: int, processes: int, weights: str, images: str, folder: Path) -> list[float]:
    """The losses of runs of both losses with 8 images a step in all processes, each with its accuracy."""
    tiny_clip.register(folder / f"configs-{rank}")
    given = {**SETTINGS, "optimizer": "sgd", "batch_size": 8 // processes, "log_every": 1, "clip_norm": 0.0}
    given |= {"model": tiny_clip.NAME, "pretrained": weights, "data": f"imagefolder:{images}", "tower": "both"}
    found: list[float] = []
    for loss in ("cross-entropy", "contrastive"):
        _, result = finetune({**given, "loss": loss}, out=folder / f"{loss}-{processes}")
        found += [record["loss"] for record in result.history if "loss" in record] + [result.accuracy or 0.0]
    return found


def test_two_processes_compute_what_one_does(
    two_processes: Callable[..., list[Any]], weights: str, images: Path, tmp_path: Path
) -> None:
    first, second = two_processes(losses_of, 2, weights, str(images), tmp_path)
    one = losses_of(0, 1, weights, str(images), tmp_path)
    assert first == second == pytest.approx(one, rel=1e-4)
    assert len(one) == 14
