"""A protocol from end to end on a tiny ViT, with generated folders in ImageNet's layout; stopped and run again."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest

import slora.demo  # noqa: F401 (registers its model)
from slora import ConfigError
from slora.reproduce.run import Reproduction, Request
from slora.runs import checkpoint_folders
from slora.sources.imagenet import wnids
from slora.training import evaluate_run, finetune_run
from tests.sources.suite_folders import class_folders

pytestmark = pytest.mark.once


@pytest.fixture(scope="module")
def request_(tmp_path_factory: pytest.TempPathFactory) -> Request:
    """The DINO protocol at a scale for tests: the demo's ViT, two runs, six steps."""
    root: Path = tmp_path_factory.mktemp("data")
    for part in ("train", "val"):
        class_folders(root / "imagenet" / part, wnids()[:6], count=3)
        class_folders(root / "target" / part, ["red", "green", "blue"], count=4)
    changes = {
        "model": "demo/letters_vit", "data": f"imagefolder:{root / 'target'}", "max_steps": 6, "batch_size": 4,
        "num_workers": 0, "device": "cpu", "precision": "fp32", "augment": "none", "head_first": 0, "save_every": 2,
        "tensorboard": False, "progress": False, "count_flops": False, "keep_last": 9,
    }  # fmt: skip
    out = tmp_path_factory.mktemp("runs") / "dino"
    return Request("forgetting-dino", out, root, changes=changes, runs=["linear", "selective"], k=[5])


def test_a_protocol_runs_from_local_data_to_figures_beside_the_published_ones(request_: Request) -> None:
    planned = Reproduction(request_)
    assert planned.missing() == []
    result = planned.run()
    assert result == json.loads((request_.out / "reproduction.json").read_text())
    assert set(result["runs"]) == {"linear", "selective"}
    for run in ("linear", "selective"):
        evaluation = json.loads((request_.out / run / "evaluation.json").read_text())
        assert evaluation["knn"]["source"] == f"imagefolder:{request_.data_root / 'imagenet'}"
        assert result["runs"][run]["ours"] == {
            "target": pytest.approx(100 * evaluation["accuracy"]["top1"]),
            "knn": pytest.approx(100 * evaluation["knn"]["after"]["5"]),
        }
    assert result["runs"]["linear"]["published"] == {"target": 80.57, "knn": 76.11}
    page = (request_.out / "reproduction.md").read_text()
    assert "| 80.57 |" in page
    assert "Not the protocol: model=demo/letters_vit" in page


def test_what_is_done_is_not_done_again(request_: Request, monkeypatch: pytest.MonkeyPatch) -> None:
    first = Reproduction(request_).run()
    assert "(trained and evaluated)" in "\n".join(Reproduction(request_).plan())
    monkeypatch.setattr(finetune_run, "finetune", lambda *args, **kwargs: pytest.fail("trained again"))
    called: list[Any] = []
    whole = evaluate_run.evaluate
    monkeypatch.setattr(evaluate_run, "evaluate", lambda *args, **kw: called.append(args) or whole(*args, **kw))
    assert Reproduction(request_).run() == first
    assert not called
    Reproduction(dataclasses.replace(request_, k=[3])).run()
    assert len(called) == 2


def test_a_stopped_run_goes_on_from_its_checkpoint_to_the_same_figures(request_: Request, tmp_path: Path) -> None:
    expected = Reproduction(request_).run()
    mine = dataclasses.replace(request_, out=tmp_path / "out")
    Reproduction(mine).run()
    # As a kill after step 2 of the second run leaves it.
    folder = tmp_path / "out/selective"
    for path in checkpoint_folders.checkpoints(folder / "checkpoints"):
        if path.name != "step-00000002":
            for file in path.iterdir():
                file.unlink()
            path.rmdir()
    for path in [*(folder / "adapter").iterdir(), folder / "result.json", folder / "evaluation.json"]:
        path.unlink()
    (folder / "adapter").rmdir()
    assert "selective (resumes from step-00000002)" in "\n".join(Reproduction(mine).plan())
    assert Reproduction(mine).run() == expected


def test_a_folder_of_other_settings_is_not_gone_on_with(request_: Request) -> None:
    Reproduction(request_).run()
    other = dataclasses.replace(request_, changes={**request_.changes, "lr": 0.5})
    with pytest.raises(ConfigError, match=r"linear holds a run with lr=0.001, but this one has 0.5"):
        Reproduction(other).run()
