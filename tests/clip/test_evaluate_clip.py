"""What `slora evaluate` measures of a CLIP, against the same computed by hand with open_clip's models."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

from slora import CheckpointError, ConfigError, DataError
from slora.adapters.save_load import load_adapter
from slora.report.sweep import sweep_figure, sweep_lines
from slora.runs.eval_table import as_lines
from slora.runs.rundir import read_settings
from slora.sources.data import as_input
from slora.sources.eval_sets import open_eval_set
from slora.sources.imagenet import class_names
from slora.sources.models import build_clip
from slora.sources.suites import open_suite
from slora.training.evaluate_run import evaluate
from slora.training.finetune_run import finetune
from slora.training.sweep_run import sweep
from tests.sources.suite_folders import class_folders, image, objectnet

pytestmark = pytest.mark.once

TEMPLATE = "a picture of {}."


class Setting:
    """A run on three colours, and everything to evaluate it on."""

    def __init__(self, root: Path, model: str, weights: str, images: Path) -> None:
        self.root = root
        (root / "templates.txt").write_text(TEMPLATE + "\n")
        self.given: dict[str, Any] = {
            "model": model, "pretrained": weights, "data": f"imagefolder:{images}", "head": "zero-shot",
            "tower": "both", "templates": str(root / "templates.txt"), "budget": 6, "max_steps": 8, "save_every": 0,
            "eval_every": 0, "batch_size": 8, "r": 4, "lr": 0.05, "augment": "none", "num_workers": 0, "device": "cpu",
            "precision": "fp32", "tensorboard": False, "progress": False, "count_flops": False,
        }  # fmt: skip
        objectnet(root / "objectnet-1.0")
        class_folders(root / "fruit", ["n07753592", "red_apple", "pear"], count=4)
        captions = [{"image": f"{i}.png", "captions": [f"colour {i}", f"number {i} of six"]} for i in range(6)]
        (root / "captions").mkdir()
        for i in range(6):
            (root / "captions" / f"{i}.png").write_bytes(image(3 * i))
        (root / "captions/captions.jsonl").write_text("\n".join(map(json.dumps, captions)))
        self.captions = captions
        self.run = finetune(self.given, out=root / "run")[0]

    def evaluate(self, **changes: Any) -> dict[str, Any]:
        return evaluate(
            self.run, f"imagefolder:{self.root / 'fruit'}", [2], suites={"objectnet": None}, eval_root=self.root,
            zero_shot=[str(self.root / "fruit")], retrieval=[str(self.root / "captions")], shots=[1], **changes,
        )  # fmt: skip


@pytest.fixture(scope="module")
def setting(tiny: str, weights: str, images: Path, tmp_path_factory: pytest.TempPathFactory) -> Setting:
    return Setting(tmp_path_factory.mktemp("evaluated"), tiny, weights, images)


@pytest.fixture(scope="module")
def result(setting: Setting) -> dict[str, Any]:
    return setting.evaluate()


@pytest.fixture(scope="module")
def towers(setting: Setting) -> tuple[Any, Any, Any]:
    """The CLIP before and after fine-tuning, and its tokenizer."""
    before, after = (build_clip(setting.given["model"], setting.given["pretrained"]) for _ in range(2))
    load_adapter(after.model, setting.run / "adapter")
    return before.model.eval(), after.model.eval(), before


def row(result: dict[str, Any], data: str, metric: str) -> dict[str, Any]:
    found = [each for each in result["rows"] if (each["data"], each["metric"]) == (data, metric)]
    assert len(found) == 1
    return dict(found[0])


@torch.no_grad()
def zero_shot(model: Any, tokenizer: Any, names: list[str], images: Tensor) -> Tensor:
    """Probabilities of the classes, one prompt each."""
    texts = F.normalize(model.encode_text(tokenizer([TEMPLATE.format(name) for name in names])), dim=1)
    return (model.logit_scale.exp() * F.normalize(model.encode_image(images), dim=1) @ texts.T).softmax(1)


def stack(clip: Any, found: Any) -> tuple[Tensor, Tensor]:
    return torch.stack([as_input(x, clip.input) for x, _ in found]), torch.tensor([label for _, label in found])


def test_zero_shot_accuracy_is_that_of_prompts_before_and_after(setting: Setting, result: Any, towers: Any) -> None:
    *models, clip = towers
    found = row(result, "fruit", "top-1")
    images, labels = stack(clip, open_eval_set(str(setting.root / "fruit")).images)
    for key, model in zip(("before", "after"), models, strict=True):
        chances = zero_shot(model, clip.tokenizer, ["banana", "pear", "red apple"], images)
        assert found[key] == pytest.approx(float((chances.argmax(1) == labels).float().mean()))
        assert found["nll"][key] == pytest.approx(float(-chances[range(12), labels].log().mean()), rel=1e-4)
    assert found["task"] == "zero-shot"
    assert found["change"] == found["after"] - found["before"]
    assert found["nll"]["before"] != found["nll"]["after"]


def test_a_sweep_measures_zero_shot_accuracy_from_before_to_after(setting: Setting, result: Any) -> None:
    found = sweep(setting.run, [0.0, 1.0], zero_shot=[str(setting.root / "fruit")])
    expected = row(result, "fruit", "top-1")
    assert found["zero_shot"] == {"fruit": expected["before"]}
    assert [entry["zero_shot"]["fruit"] for entry in found["scales"]] == [expected["before"], expected["after"]]
    title, head, before, *rows = sweep_lines(found)
    assert title.endswith("zero-shot accuracy on fruit")
    assert head.split() == ["scale", "top-1", "loss", "fruit", "points"]
    assert (len(before.split()), [len(line.split()) for line in rows]) == (2, [5, 5])
    (axes,) = sweep_figure(found).axes
    assert axes.get_xlabel().startswith("zero-shot accuracy on fruit (%)")
    with pytest.raises(ConfigError, match="zero_shot holds 'digits' twice"):
        sweep(setting.run, [1.0], zero_shot=["digits", "digits"])


def test_a_suite_takes_the_largest_probability_of_the_classes_that_it_stands_for(
    setting: Setting, result: Any, towers: Any
) -> None:
    *models, clip = towers
    found = row(result, "objectnet", "top-1")
    images, labels = stack(clip, open_suite("objectnet", setting.root).images)
    for key, model in zip(("before", "after"), models, strict=True):
        chances = zero_shot(model, clip.tokenizer, list(class_names()), images)
        guessed = torch.stack([chances[:, [409, 530]].amax(1), chances[:, 954]], 1).argmax(1)
        assert found[key] == pytest.approx(float((guessed == labels).float().mean()))
    # The run is not on ImageNet's classes, so for it this is zero-shot classification.
    assert found["task"] == "zero-shot"


def test_recall_is_that_of_both_towers(setting: Setting, result: Any, towers: Any) -> None:
    *models, clip = towers
    images = torch.stack([as_input(open_image(setting.root / "captions" / f"{i}.png"), clip.input) for i in range(6)])
    texts = clip.tokenizer([caption for entry in setting.captions for caption in entry["captions"]])
    for key, model in zip(("before", "after"), models, strict=True):
        with torch.no_grad():
            cosines = F.normalize(model.encode_text(texts), dim=1) @ F.normalize(model.encode_image(images), dim=1).T
        hits = [int(cosines[t].argmax()) == t // 2 for t in range(12)]
        assert row(result, "captions", "R@1 text to image")[key] == pytest.approx(sum(hits) / 12)
        hits = [bool({2 * i, 2 * i + 1} & set(cosines[:, i].topk(5).indices.tolist())) for i in range(6)]
        assert row(result, "captions", "R@5 image to text")[key] == pytest.approx(sum(hits) / 6)
    # Ten images would be needed for recall@10.
    assert not [each for each in result["rows"] if each["metric"].startswith("R@10")]


def open_image(path: Path) -> Any:
    from PIL import Image

    return Image.open(path).convert("RGB")


def test_rows_say_together_what_was_forgotten(result: Any, setting: Setting) -> None:
    tasks = [each["task"] for each in result["rows"]]
    assert tasks == ["id", *["zero-shot"] * 2, *["retrieval"] * 4, "knn", *["few-shot"] * 2]
    by_set: dict[Any, list[float]] = {}
    for each in result["rows"]:
        if each["task"] in ("zero-shot", "retrieval", "knn"):
            by_set.setdefault((each["task"], each["data"]), []).append(each["after"] - each["before"])
    expected = [sum(changes) / len(changes) for changes in by_set.values()]
    assert result["forgetting"]["mean_change"] == pytest.approx(sum(expected) / 4)
    assert result["forgetting"]["sets"] == 4
    assert result["means"]["id"]["after"] == result["accuracy"]["top1"]
    assert json.loads((setting.run / "evaluation.json").read_text()) == result
    lines = as_lines(result)
    assert len(lines) == 1 + len(tasks) + 5 + 2
    assert lines[-1].startswith("forgetting, mean change over 4 sets")


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"zero_shot": ["absent/folder"]}, DataError, "absent/folder is not a folder"),
        ({"retrieval": ["absent"]}, DataError, "absent does not exist"),
        ({"suites": {"imagenet-a": None}, "eval_root": Path("absent")}, DataError, "imagenet-a: .* does not exist"),
        ({"shots": [1]}, ConfigError, r"shots=\[1\] needs source"),
    ],
    ids=["zero-shot", "retrieval", "suite", "shots"],
)
def test_what_is_missing_is_named_before_a_model_is_built(
    setting: Setting, monkeypatch: pytest.MonkeyPatch, changes: Any, error: Any, message: str
) -> None:
    monkeypatch.setattr("slora.training.evaluate_run.build", lambda *args: pytest.fail("a model was built"))
    with pytest.raises(error, match=message):
        evaluate(setting.run, **changes)


def test_an_adapter_of_another_base_is_refused(setting: Setting, tmp_path: Path) -> None:
    run = tmp_path / "run"
    shutil.copytree(setting.run, run)
    other: Any = build_clip(setting.given["model"], setting.given["pretrained"]).model
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    torch.save(other.state_dict(), tmp_path / "other.pt")
    config = (run / "config.yaml").read_text().replace(setting.given["pretrained"], str(tmp_path / "other.pt"))
    (run / "config.yaml").write_text(config)
    with pytest.raises(CheckpointError, match="was trained on another base"):
        evaluate(run)


def test_a_clip_that_was_trained_in_full_is_measured_too(setting: Setting, result: Any, tmp_path: Path) -> None:
    given = {**setting.given, "method": "full", "budget": None, "lr": 1e-3}
    run, _ = finetune(given, out=tmp_path / "run")
    found = row(evaluate(run, zero_shot=[str(setting.root / "fruit")]), "fruit", "top-1")
    same = row(result, "fruit", "top-1")
    assert (found["before"], found["nll"]["before"]) == (same["before"], same["nll"]["before"])
    trained = build_clip(setting.given["model"], setting.given["pretrained"])
    trained.model.load_state_dict(load_file(run / "model/model.safetensors"))
    images, labels = stack(trained, open_eval_set(str(setting.root / "fruit")).images)
    chances = zero_shot(trained.model.eval(), trained.tokenizer, ["banana", "pear", "red apple"], images)
    assert found["nll"]["after"] == pytest.approx(float(-chances[range(12), labels].log().mean()), rel=1e-4)


def test_a_linear_head_on_a_clip_keeps_both_towers_to_evaluate(setting: Setting, tmp_path: Path) -> None:
    given = {**setting.given, "head": "linear", "tower": "image", "templates": None, "budget": 2, "head_first": 0}
    run, _ = finetune(given, out=tmp_path / "run")
    result = evaluate(run, retrieval=[str(setting.root / "captions")])
    own = row(result, read_settings(run).data or "", "top-1")
    assert own["before"] is None
    assert own["after"] == result["accuracy"]["top1"]
    base = build_clip(setting.given["model"], setting.given["pretrained"])
    texts = base.tokenizer([caption for entry in setting.captions for caption in entry["captions"]])
    images = torch.stack([as_input(open_image(setting.root / "captions" / f"{i}.png"), base.input) for i in range(6)])
    with torch.no_grad():
        cosines = (
            F.normalize(base.model.encode_text(texts), dim=1) @ F.normalize(base.model.encode_image(images), dim=1).T
        )
    hits = sum(int(cosines[t].argmax()) == t // 2 for t in range(12))
    assert row(result, "captions", "R@1 text to image")["before"] == pytest.approx(hits / 12)
