"""The CLIP protocol from end to end on a tiny CLIP, with generated folders in the layouts of the real ones."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from slora.reproduce.run import Reproduction, Request
from slora.sources.imagenet import class_names, wnids
from tests.sources.suite_folders import class_folders, image, objectnet

pytestmark = pytest.mark.once


def coco(root: Path) -> None:
    """Write three images with two captions each, as COCO's val2017."""
    (root / "val2017").mkdir(parents=True)
    (root / "annotations").mkdir()
    for i in range(3):
        (root / f"val2017/{i:012}.jpg").write_bytes(image(40 * i))
    images = [{"id": i, "file_name": f"{i:012}.jpg"} for i in range(3)]
    notes = [{"image_id": i % 3, "caption": f"caption {i}"} for i in range(6)]
    (root / "annotations/captions_val2017.json").write_text(json.dumps({"images": images, "annotations": notes}))


def test_the_clip_protocol_runs_on_a_tiny_clip(tiny: str, weights: str, tmp_path: Path) -> None:
    data = tmp_path / "data"
    for part in ("train", "val"):
        class_folders(data / "imagenet" / part, wnids())
    objectnet(data / "objectnet-1.0")
    coco(data / "coco")
    class_folders(data / "pets", ["red_setter", "pug"], count=2)
    (tmp_path / "templates.txt").write_text("a {}\n")
    changes = {
        "model": tiny, "pretrained": weights, "templates": str(tmp_path / "templates.txt"), "max_steps": 2, "r": 2,
        "batch_size": 8, "num_workers": 0, "device": "cpu", "precision": "fp32", "save_every": 0, "eval_every": 0,
        "tensorboard": False, "progress": False, "count_flops": False, "selection_warmup": 0.1,
    }  # fmt: skip
    request = Request(
        "forgetting-clip", tmp_path / "out", data, changes=changes, runs=["selective"],
        suites="imagenet,objectnet", zero_shot=[str(data / "pets")],
    )  # fmt: skip
    planned = Reproduction(request)
    assert planned.settings["selective"].data == f"imagefolder:{data / 'imagenet'}"
    assert planned.missing() == []
    result = planned.run()
    ours = result["runs"]["selective"]["ours"]
    # The others were not run.
    assert result["difference"] == {"measure": "forgetting", "run": "selective", "published": 7.31, "ours": {}}
    evaluation = json.loads((tmp_path / "out/selective/evaluation.json").read_text())
    rows = {(row["task"], row["data"]): row for row in evaluation["rows"]}
    assert list(rows) == [
        ("id", "imagenet"),
        ("ood", "objectnet"),
        ("zero-shot", "pets"),
        ("retrieval", "captions_val2017"),
    ]
    # The classes of the run are ImageNet's, so its prompts are their names.
    assert json.loads((tmp_path / "out/selective/prompts.json").read_text())["names"] == list(class_names())
    assert ours == {
        "imagenet": 100 * rows["id", "imagenet"]["after"],
        "ood": 100 * rows["ood", "objectnet"]["after"],
        "forgetting": 100 * evaluation["forgetting"]["mean_change"],
    }
    assert evaluation["forgetting"]["sets"] == 2
