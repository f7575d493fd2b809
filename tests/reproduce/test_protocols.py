"""The protocols: published figures, plans and what is missing."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from slora import ConfigError
from slora.reproduce.needs import imagenet
from slora.reproduce.protocols import PROTOCOLS, figures
from slora.reproduce.run import Reproduction, Request, as_markdown
from tests.sources.suite_folders import class_folders

pytestmark = pytest.mark.once


def test_the_published_figures_are_those_of_the_papers() -> None:
    clip, dino = PROTOCOLS["forgetting-clip"], PROTOCOLS["forgetting-dino"]
    assert {run.name: run.published.get("forgetting") for run in clip.runs} == {
        "flyp": -16.24, "lora": -17.12, "selective": None,
    }  # fmt: skip
    assert (clip.settings["r"], clip.runs[2].settings["budget"]) == (128, 0.0625)  # type: ignore[index]
    assert {run.name: (run.published.get("target"), run.published.get("knn")) for run in dino.runs} == {
        "full": (88.13, 25.24), "linear": (80.57, 76.11), "lora-r4": (87.91, 66.82), "lora-r8": (88.27, 65.99),
        "lora-r16": (87.84, 65.06), "block-expansion-p3": (88.58, 74.61), "selective": (None, None),
    }  # fmt: skip
    assert (dino.settings["model"], dino.settings["max_steps"], dino.settings["batch_size"], dino.k) == (
        "timm/vit_base_patch16_224.dino", 10_000, 128, (10, 20, 100, 200),
    )  # fmt: skip


def test_figures_are_read_from_an_evaluation() -> None:
    result: dict[str, Any] = {
        "accuracy": {"top1": 0.5},
        "means": {"ood": {"after": 0.25}},
        "forgetting": {"mean_change": -0.125},
        "knn": {"after": {"10": 0.75, "20": 0.875}},
    }
    assert figures(result) == {"target": 50, "ood": 25, "forgetting": -12.5, "knn": 87.5}
    assert figures({**result, "means": {}, "forgetting": None, "knn": None}) == {"target": 50}


def test_the_plan_names_what_is_known_what_was_chosen_and_what_the_user_changed(tmp_path: Path) -> None:
    request = Request("forgetting-dino", tmp_path / "out", changes={"max_steps": 7}, runs=["lora-r4"], k=[5])
    text = "\n".join(Reproduction(request).plan())
    assert "published in arXiv 2404.17245" in text
    assert "known: model DINO ViT-B/16; data CIFAR-100; 10 000 steps of batch 128" in text
    assert "our choice: AdamW with learning rate 1e-3" in text
    assert "changed, so that figures are not those of the protocol: max_steps=7, k=5" in text
    assert f"run lora-r4 in {tmp_path}/out/lora-r4 (to be trained)" in text
    assert "max_steps=7" in text
    assert not (tmp_path / "out").exists()


def test_imagenet_is_found_in_folders_with_both_parts_or_left_to_its_archives(tmp_path: Path) -> None:
    assert imagenet(tmp_path) == "imagenet"
    class_folders(tmp_path / "ILSVRC2012/val", ["n01440764"])
    assert imagenet(tmp_path) == "imagenet"
    class_folders(tmp_path / "ILSVRC2012/train", ["n01440764"])
    assert imagenet(tmp_path) == f"imagefolder:{tmp_path}/ILSVRC2012"


@pytest.mark.parametrize("name", list(PROTOCOLS))
def test_everything_that_is_missing_is_listed_with_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    import huggingface_hub.constants

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    # Opened by name, a data set of torchvision would ask the network only if it may download.
    found = Reproduction(Request(name, tmp_path / "out", data_root=tmp_path / "data")).missing()
    listed = {need.what: need.where for need in found}
    if name == "forgetting-dino":
        assert set(listed) == {
            "weights of timm/vit_base_patch16_224.dino dino",
            "data set cifar100",
            "data set imagenet",
        }
        assert "models--timm--vit_base_patch16_224.dino" in listed["weights of timm/vit_base_patch16_224.dino dino"]
        assert "run again with --download" in listed["data set cifar100"]
    else:
        assert set(listed) == {
            "weights of open_clip/ViT-B-16 openai", "data set imagenet",
            *(f"test set {suite}" for suite in PROTOCOLS[name].suites),
            *(f"zero-shot set {each}" for each in PROTOCOLS[name].zero_shot),
            f"captions {tmp_path}/data/coco/annotations/captions_val2017.json",
        }  # fmt: skip
        assert "hf download timm/vit_base_patch16_clip_224.openai" in listed["weights of open_clip/ViT-B-16 openai"]
        assert "imagenet-r.tar" in listed["test set imagenet-r"]
    assert "with train/ and val/, each with the 1000 wnid folders" in listed["data set imagenet"]
    assert not (tmp_path / "out").exists()


def test_weights_in_the_cache_of_the_hub_are_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    asked = []

    def cached(repository: str, file: str) -> str | None:
        asked.append((repository, file))
        return "/somewhere" if file == "pytorch_model.bin" else None

    monkeypatch.setattr(huggingface_hub, "try_to_load_from_cache", cached)
    request = Request("forgetting-dino", tmp_path / "out", data_root=tmp_path)
    assert not [need for need in Reproduction(request).missing() if need.what.startswith("weights")]
    assert {repository for repository, _ in asked} == {"timm/vit_base_patch16_224.dino"}


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"protocol": "forgetting"}, "protocol 'forgetting' is unknown; use forgetting-clip or forgetting-dino"),
        ({"runs": ["lora"]}, "run 'lora' is not part of forgetting-dino; use some of full, linear, lora-r4"),
        ({"runs": ["block-expansion-p3"]}, "run 'block-expansion-p3' is not part"),
        ({"suites": "imagenet-s"}, "test set 'imagenet-s' is unknown"),
        ({"changes": {"lrr": 1}}, "setting 'lrr' is unknown; near names are 'lr'"),
    ],
    ids=["protocol", "run", "published only", "suite", "setting"],
)
def test_unknown_names_are_refused(tmp_path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Reproduction(Request(**{"protocol": "forgetting-dino", "out": tmp_path, **given}))


def test_our_figures_stand_beside_the_published_ones() -> None:
    lines = as_markdown(
        {
            "paper": "a paper",
            "difference": {"measure": "knn", "run": "new", "published": 7.31, "ours": {"full": 2.5}},
            "measures": {"knn": "k-NN"},
            "note": "Mind it.",
            "changed": ["lr=1"],
            "runs": {"full": {"published": {"knn": 25.24}, "ours": {"knn": 30}}, "new": {"published": {}, "ours": {}}},
        }
    )
    assert lines[:4] == [
        "| run | k-NN: ours | k-NN: published |", "| --- | --- | --- |", "| full | 30.00 | 25.24 |", "| new | - | - |",
    ]  # fmt: skip
    assert lines[-4:] == [
        "Percent; changes in points. Published in a paper.",
        "k-NN, of new: +2.50 above full; published +7.31.",
        "Mind it.",
        "Not the protocol: lr=1.",
    ]
