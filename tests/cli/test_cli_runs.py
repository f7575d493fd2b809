"""What the commands read from a run, and what they say of it."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest

from slora.cli.inspect import block_table
from tests.cli.conftest import QUICK, Outcome

pytestmark = pytest.mark.once


def test_evaluate_shows_accuracy_and_what_is_still_known(slora: Callable[..., Outcome], tmp_path: Path) -> None:
    assert slora("finetune", *QUICK, "--out", "run").code == 0
    outcome = slora("evaluate", "run", "--source", "letters", "--k", "5,10")
    assert outcome.code == 0, outcome.err
    assert "accuracy on digits (40 images)" in outcome.out
    assert "k-NN on letters (52 images, 208 vote)" in outcome.out
    assert outcome.out.splitlines()[-1] == "add it to the report of the run with: slora report run"
    rows = [line.split() for line in outcome.out.splitlines() if line.startswith("  letters")]
    assert [row[:2] for row in rows] == [["letters", "5-NN"], ["letters", "10-NN"]]
    assert all(len(row) == 5 for row in rows)
    assert "forgetting, mean change over 1 set " in outcome.out
    assert json.loads((tmp_path / "run/evaluation.json").read_text())["knn"]["source"] == "letters"


def test_reproduce_says_what_is_missing_or_runs_and_compares(slora: Callable[..., Outcome], tmp_path: Path) -> None:
    outcome = slora("reproduce", "forgetting-dino", "--data-root", "nowhere")
    assert outcome.code == 3, outcome.err
    assert "missing on this machine:" in outcome.out
    assert "data set cifar100: " in outcome.out
    assert not (tmp_path / "runs").exists()
    small = ["--model", "demo/letters_vit", "--data", "digits", "--source", "letters", "--k", "5", "--steps", "2"]
    small += ["--batch-size", "8", "--device", "cpu", "--runs", "linear", "--set", "count_flops=false", "--out", "here"]
    plan = slora("reproduce", "forgetting-dino", *small, "--dry-run")
    assert plan.code == 0, plan.err
    assert "run linear in here/linear (to be trained)" in plan.out
    assert not (tmp_path / "here").exists()
    outcome = slora("reproduce", "forgetting-dino", *small)
    assert outcome.code == 0, outcome.err
    assert "| 80.57 |" in outcome.out
    assert outcome.out.splitlines()[-1] == "written to here/reproduction.md"


def test_merge_and_inspect_read_a_run(slora: Callable[..., Outcome], tmp_path: Path) -> None:
    assert slora("finetune", *QUICK, "--out", "run").code == 0
    outcome = slora("inspect", "run")
    assert outcome.code == 0, outcome.err
    lines = outcome.out.splitlines()
    assert lines[0].split()[:2] == ["layer", "in"]
    assert sum(line.startswith("blocks.") for line in lines) == 24
    assert "###  0.1" in outcome.out
    assert "36 of 36 blocks active (100.0%)" in outcome.out
    outcome = slora("merge", "run", "--out", "merged.safetensors")
    assert outcome.code == 0, outcome.err
    assert outcome.out == "36 blocks merged; merged.safetensors holds the plain model\n"
    assert (tmp_path / "merged.safetensors").stat().st_size > 1e6
    assert slora("merge", "run", "--out", "merged.safetensors").code == 2


def test_a_checkpoint_is_evaluated_merged_and_inspected_by_its_step(
    slora: Callable[..., Outcome], tmp_path: Path
) -> None:
    assert slora("finetune", *QUICK, "--out", "run").code == 0
    outcome = slora("evaluate", "run", "--checkpoint", "2")
    assert outcome.code == 0, outcome.err
    assert "accuracy of step-00000002 on digits (40 images)" in outcome.out
    assert "slora report" not in outcome.out
    outcome = slora("inspect", "run", "--checkpoint", "best")
    assert outcome.code == 0, outcome.err
    assert "36 of 36 blocks active (100.0%)" in outcome.out
    assert outcome.out.splitlines()[-1] == "checkpoint step-00000004"
    outcome = slora("merge", "run", "--checkpoint", "last", "--out", "merged.safetensors")
    assert outcome.out == "36 blocks merged; merged.safetensors holds the plain model\n"
    for command in (["evaluate", "run"], ["inspect", "run"], ["merge", "run", "--out", "x.safetensors"]):
        outcome = slora(*command, "--checkpoint", "3")
        assert outcome.code == 2
        assert "run has no checkpoint of step 3; there are 2, 4" in outcome.err


def test_the_size_of_images_and_more_arguments_of_the_model_are_kept_with_the_run(
    slora: Callable[..., Outcome], tmp_path: Path
) -> None:
    tiny = "--model timm/vit_tiny_patch16_224 --img-size 32 --model-args depth=1,init_values=1e-5 --max-steps 1".split()
    outcome = slora("finetune", *QUICK, *tiny, "--out", "run")
    assert outcome.code == 0, outcome.err
    config = (tmp_path / "run/config.yaml").read_text()
    assert "\nimg_size: 32\nmodel_args:\n  depth: 1\n  init_values: 1.0e-05\n" in config
    assert slora("evaluate", "run").code == 0
    assert slora("merge", "run", "--checkpoint", "last", "--out", "x").code == 0
    outcome = slora("finetune", "--resume", "run", "--img-size", "48")
    assert outcome.code == 2
    assert "was written with img_size=32, this run has 48" in outcome.err
    outcome = slora("finetune", *QUICK, *tiny, "--model-args", "dept=1", "--out", "other")
    assert outcome.code == 2
    assert "model_args holds 'dept', which timm/vit_tiny_patch16_224 does not take" in outcome.err


@pytest.mark.parametrize("method", ["linear", "full"])
def test_inspect_and_merge_name_what_a_run_without_blocks_holds(slora: Callable[..., Outcome], method: str) -> None:
    assert slora("finetune", *QUICK, "--method", method, "--max-steps", "1", "--out", "run").code == 0
    for outcome in (slora("inspect", "run"), slora("merge", "run", "--out", "x.safetensors")):
        assert outcome.code == 2
        assert f"run was trained with method={method}, which has no LoRA blocks" in outcome.err
        assert outcome.err.rstrip().endswith("is already a plain model: run/model/model.safetensors")


def test_inspect_and_merge_of_an_unfinished_run_say_how_to_go_on(slora: Callable[..., Outcome], tmp_path: Path) -> None:
    assert slora("finetune", *QUICK, "--max-steps", "1", "--out", "run").code == 0
    (tmp_path / "run/adapter").rename(tmp_path / "gone")
    for outcome in (slora("inspect", "run"), slora("merge", "run", "--out", "x.safetensors")):
        assert outcome.code == 2
        assert "the run is not finished; continue it with: slora finetune --resume run" in outcome.err
    (tmp_path / "run/checkpoints").rename(tmp_path / "gone too")
    for outcome in (slora("inspect", "run"), slora("merge", "run", "--out", "x.safetensors")):
        assert outcome.code == 2
        assert "continue it with: slora finetune --config run/config.yaml --out run" in outcome.err


def test_a_run_of_one_step_took_time_and_is_not_called_steps(slora: Callable[..., Outcome]) -> None:
    counted = [argument for argument in QUICK if argument != "--no-count-flops"]
    outcome = slora("finetune", *counted, "--max-steps", "1")
    assert outcome.code == 0, outcome.err
    (line,) = (line for line in outcome.out.splitlines() if "results are in" in line)
    assert line.startswith("1 step in ")
    assert float(line.split()[3]) > 0


def test_layers_are_listed_in_the_order_of_their_numbers() -> None:
    entry = {"r": 2, "blocks": 2, "active": [1], "gate": [0.0, 0.2]}
    layers = {f"blocks.{number}.fc": entry for number in (0, 1, 10, 2)}
    table = block_table(layers, {name: [8, 4] for name in layers})
    assert [line.split()[0] for line in table.splitlines()[1:-1]] == [f"blocks.{n}.fc" for n in (0, 1, 2, 10)]
    assert "4 -> 8" in table
    assert ".#" in table
    assert table.splitlines()[-1] == "4 of 8 blocks active (50.0%)"


def test_ranks_are_listed_by_block_where_they_differ() -> None:
    whole = {"r": 2, "blocks": 3, "active": [0, 2], "gate": [0.2, 0.0, 0.2]}
    layers = {"0.fc": {**whole, "ranks": [2, 0, 1]}, "1.fc": whole}
    lines = block_table(layers, {name: [9, 4] for name in layers}).splitlines()
    assert [line.split()[4] for line in lines[1:3]] == ["2/./1", "2"]
    layers["2.fc"] = {**whole, "active": []}
    lines = block_table(layers, {name: [9, 4] for name in layers}, by_rank=True).splitlines()
    assert [line.split()[4] for line in lines[1:4]] == ["2/./1", "2/./2", "././."]


def test_a_damaged_adapter_is_named(slora: Callable[..., Outcome], tmp_path: Path) -> None:
    (tmp_path / "selective.json").write_text('{"layers": {}}')
    outcome = slora("inspect", ".")
    assert outcome.code == 2
    assert "selective.json is incomplete or damaged" in outcome.err


def test_merging_into_other_weights_than_the_adapters_is_refused_and_writes_nothing(tmp_path: Path) -> None:
    import slora
    from slora.demo.model import load_pretrained
    from slora.training.merge_run import merge_adapter

    model = slora.inject(load_pretrained(10), slora.SelectiveLoRAConfig(r=2, modules_to_save=["head"]))
    slora.save_adapter(model, tmp_path / "adapter")
    out = tmp_path / "merged.safetensors"
    with pytest.raises(slora.CheckpointError, match="--pretrained"):
        merge_adapter(tmp_path / "adapter", out, "demo/letters_vit", pretrained=False, classes=None)
    assert not out.exists()


@pytest.mark.parametrize("given", [["--pretrained"], ["--pretrained", "true"]], ids=" ".join)
def test_an_adapter_is_merged_into_pretrained_weights(slora: Callable[..., Outcome], given: list[str]) -> None:
    assert slora("finetune", *QUICK, "--pretrained", "--head-first", "0", "--out", "run").code == 0
    named = ("run/adapter", "--model", "demo/letters_vit", "--out", "plain.safetensors")
    outcome = slora("merge", *named, *given)
    assert outcome.code == 0, outcome.err
    refused = slora("merge", "run", "--no-pretrained", "--out", "other.safetensors")
    assert refused.code == 2
    assert "--pretrained" in refused.err


def test_a_run_that_switches_no_block_off_says_so_and_why(slora: Callable[..., Outcome]) -> None:
    for method in ("selective", "lora"):
        outcome = slora("finetune", *QUICK, "--method", method, "--out", method)
        assert outcome.code == 0, outcome.err
        for text in (outcome.out, slora("inspect", method).out, slora("inspect", f"{method}/adapter").out):
            assert ("all blocks are active" in text) == (method == "selective")
        assert ("(gate_lr * penalty) = 180 steps" in outcome.out) == (method == "selective")


def test_a_run_that_switches_every_block_off_says_so_and_why(slora: Callable[..., Outcome]) -> None:
    off = ["--gate-lr", "5", "--penalty", "10", "--selection-warmup", "0"]
    outcome = slora("finetune", *QUICK, *off, "--out", "run")
    assert outcome.code == 0, outcome.err
    assert "active blocks: 0" in outcome.out
    for text in (outcome.out, slora("inspect", "run").out):
        (line,) = (line for line in text.splitlines() if line.startswith("no block is active: the model is the base"))
        assert "= 0.036 steps to switch a block off" in line
    text = slora("inspect", "run/adapter").out
    assert text.splitlines()[-1].endswith("Lower the penalty, or lengthen its warm-up.")
