"""ImageNet and its shifted test sets with a head of ImageNet's classes, against logits that are read by hand."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from slora import ConfigError
from slora.runs import rundir
from slora.sources.data import open_data
from slora.sources.imagenet import subset, wnids
from slora.sources.suites import open_suite
from slora.training import run_model
from slora.training.evaluate_run import evaluate
from slora.training.finetune_run import finetune
from tests.sources.suite_folders import OBJECTNET, class_folders, objectnet

pytestmark = pytest.mark.once

GIVEN: dict[str, Any] = {
    "model": "timm/vit_tiny_patch16_224", "img_size": 16, "method": "selective", "budget": 4, "max_steps": 4, "r": 2,
    "model_args": {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 3}, "batch_size": 16, "lr": 0.05,
    "augment": "none", "num_workers": 0, "device": "cpu", "precision": "fp32", "save_every": 0, "eval_every": 0,
    "tensorboard": False, "progress": False, "count_flops": False,
}  # fmt: skip


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """ImageNet-R, ObjectNet, and training images of their classes in `own`."""
    folder: Path = tmp_path_factory.mktemp("suites")
    numbers = {*subset("imagenet-r"), *(number for group in OBJECTNET.values() for number in group)}
    class_folders(folder / "own/train", [wnids()[number] for number in sorted(numbers)])
    class_folders(folder / "own/val", [wnids()[number] for number in sorted(numbers)[:20]])
    class_folders(folder / "imagenet-r", [wnids()[number] for number in subset("imagenet-r")])
    objectnet(folder / "objectnet-1.0")
    return folder


@pytest.fixture(scope="module")
def run(root: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out: Path = tmp_path_factory.mktemp("run") / "run"
    return finetune({**GIVEN, "data": f"imagefolder:{root / 'own'}"}, out=out)[0]


def test_a_head_of_imagenet_is_measured_on_every_suite_by_its_classes(run: Path, root: Path) -> None:
    result = evaluate(run, suites={"imagenet-r": None, "objectnet": root / "objectnet-1.0"}, eval_root=root)
    own = open_data(f"imagefolder:{root / 'own'}")
    found = [(row["task"], row["data"]) for row in result["rows"]]
    assert found == [("id", own.name), ("ood", "imagenet-r"), ("ood", "objectnet")]
    settings = rundir.read_settings(run)
    models = [run_model.rebuild(settings, len(own.classes)).model.eval() for _ in range(2)]
    run_model.load_result(models[1], settings, run)
    spec = run_model.rebuild(settings, len(own.classes)).input
    groups = {"imagenet-r": [(number,) for number in subset("imagenet-r")]}
    groups["objectnet"] = [OBJECTNET[name] for name in sorted(OBJECTNET)]
    for name, classes in groups.items():
        data: Any = open_suite(name, root).data(spec)
        images, labels = (torch.stack([torch.as_tensor(item[i]) for item in data]) for i in (0, 1))
        (row,) = (each for each in result["rows"] if each["data"] == name)
        for key, model in zip(("before", "after"), models, strict=True):
            with torch.no_grad():
                logits = model(images)
            columns = [[own.classes.index(wnids()[number]) for number in group] for group in classes]
            best = torch.stack([logits[:, group].amax(1) for group in columns], 1)
            assert row[key] == pytest.approx(float((best.argmax(1) == labels).float().mean())), (name, key)
            loss = torch.nn.functional.cross_entropy(best, labels)
            assert row["nll"][key] == pytest.approx(float(loss), rel=1e-4)
    ood = [row["after"] for row in result["rows"] if row["task"] == "ood"]
    assert result["means"]["ood"]["after"] == pytest.approx(sum(ood) / 2)
    assert result["forgetting"] is None


def test_a_model_that_cannot_classify_a_set_is_refused_by_name(run: Path, root: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"zero_shot=.*imagenet-r'\] needs a CLIP, but the run is of timm/vit_tiny"):
        evaluate(run, zero_shot=[str(root / "imagenet-r")])
    with pytest.raises(ConfigError, match=r"retrieval=\['x'\] needs a CLIP"):
        evaluate(run, retrieval=["x"])
    class_folders(tmp_path / "some", wnids()[:3], count=4)
    few, _ = finetune({**GIVEN, "data": f"imagefolder:{tmp_path / 'some'}", "batch_size": 4}, out=tmp_path / "few")
    with pytest.raises(ConfigError, match=r"imagenet-r has the class 'hammerhead shark', which is none of the 3"):
        evaluate(few, suites={"imagenet-r": None}, eval_root=root)
    class_folders(tmp_path / "others", ["cat", "dog"], count=4)
    other, _ = finetune(
        {**GIVEN, "data": f"imagefolder:{tmp_path / 'others'}", "batch_size": 4}, out=tmp_path / "other"
    )
    with pytest.raises(ConfigError, match="imagenet-r needs a head with ImageNet's classes or a CLIP"):
        evaluate(other, suites={"imagenet-r": None}, eval_root=root)
