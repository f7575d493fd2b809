"""`merge --sweep`: each scale is the merged model of that scale, and the run is left as it was."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from slora import CheckpointError, ConfigError
from slora.evaluation import accuracy
from slora.layers import adapted_layers
from slora.report.sweep import sweep_figure
from slora.runs import rundir
from slora.sources.data import open_data
from slora.training import finetune_run, run_model, sweep_run
from slora.training.evaluate_run import evaluate
from slora.training.sweep_run import sweep
from tests.training.test_evaluate_run import QUICK, _few_images  # noqa: F401 (a fixture)

pytestmark = pytest.mark.once

RUN = {**QUICK, "method": "lora", "pretrained": True, "max_steps": 12}


def test_a_scale_is_the_base_plus_so_much_of_the_update() -> None:
    folder, _ = finetune_run.finetune(RUN)
    result = sweep(folder, [0.0, 0.5, 1.0], "letters")
    assert json.loads((folder / "sweep.json").read_text()) == result
    settings = rundir.read_settings(folder)
    images, labels = open_data("digits").evaluation.tensors
    for row in result["scales"]:
        model = run_model.load_result(run_model.rebuild(settings, 10).model, settings, folder)
        for _, layer in adapted_layers(model):
            n = len(layer.weight) // layer.blocks
            for i in range(layer.blocks):
                update = row["scale"] * layer.scaling * layer.lora_B[i] @ layer.lora_A[i]
                layer.base_weight.data[i * n : (i + 1) * n] += update.detach()
            layer.enabled = False
        measured = accuracy(model, [(images, labels)], torch.device("cpu"))
        assert row["top1"] == pytest.approx(measured.top1)
        assert row["loss"] == pytest.approx(measured.loss, rel=1e-5)
    whole = evaluate(folder, "letters", k=[20])
    assert result["scales"][2]["knn"] == whole["knn"]["after"]["20"]
    assert result["before"] == result["scales"][0]["knn"] == whole["knn"]["before"]["20"]


def test_without_old_data_the_target_alone_is_measured() -> None:
    folder, _ = finetune_run.finetune(RUN)
    result = sweep(folder, [1.0])
    assert (result["source"], result["before"], result["scales"][0]["knn"]) == (None, None, None)
    assert sweep_figure(result).axes[0].get_xlabel() == "scale"


def test_the_figure_has_a_point_for_each_scale() -> None:
    rows = [{"scale": s, "top1": 0.8 + 0.1 * s, "loss": 1.0, "knn": 0.9 - 0.1 * s} for s in (1.0, 0.0)]
    result = {"data": "digits", "source": "letters", "k": 20, "before": 0.95, "zero_shot": {}, "scales": rows}
    figure = sweep_figure(result)
    (axes,) = figure.axes
    assert [text.get_text() for text in axes.texts] == ["before fine-tuning: 95.0 %", "0", "1"]
    assert list(axes.lines[1].get_xdata()) == pytest.approx([90, 80])
    assert list(axes.lines[1].get_ydata()) == pytest.approx([80, 90])


def test_points_that_fall_together_share_a_label_and_two_images_are_no_cliff() -> None:
    rows = [{"scale": s, "top1": 0.7932, "loss": 1.0, "knn": 0.9923 + 0.0004 * (s == 0)} for s in (1.5, 0.0, 1.0)]
    result = {"data": "digits", "source": "letters", "k": 20, "before": 0.9927, "zero_shot": {}, "scales": rows}
    (axes,) = sweep_figure(result).axes
    assert [text.get_text() for text in axes.texts][1:] == ["0, 1, 1.5"]
    low, high = axes.get_xlim()
    assert low < 99.23 < 99.27 < high
    assert high - low > 2


@pytest.mark.parametrize(
    ("scales", "message"),
    [([], "sweep holds no scale"), ([0, math.nan], "sweep holds nan"), ([0.5, 0.5], "sweep holds 0.5 twice")],
)
def test_scales_that_say_nothing_are_refused(tmp_path: Path, scales: list[float], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        sweep(tmp_path, scales)


def test_a_run_without_blocks_has_nothing_to_scale() -> None:
    folder, _ = finetune_run.finetune({**QUICK, "method": "linear"})
    with pytest.raises(ConfigError, match=r"linear.* to scale"):
        sweep(folder, [1.0])


def test_other_base_weights_are_an_error_that_names_both(monkeypatch: pytest.MonkeyPatch) -> None:
    folder, _ = finetune_run.finetune(RUN)
    whole = sweep_run.build

    def other(settings: Any, run_dir: Path) -> Any:
        model, spec, source = whole(settings, run_dir)
        model.get_parameter("blocks.0.attn.qkv.weight").data[0] += 1
        return model, spec, source

    monkeypatch.setattr(sweep_run, "build", other)
    with pytest.raises(
        CheckpointError, match=r"adapter was trained on other base weights \(\w{12}\) than this \w+ has \(\w{12}\)"
    ):
        sweep(folder, [1.0])
    assert not (folder / "sweep.json").exists()


def test_a_damaged_adapter_is_refused() -> None:
    folder, _ = finetune_run.finetune(RUN)
    path = folder / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(dict(list(tensors.items())[1:]), path)
    with pytest.raises(CheckpointError):
        sweep(folder, [1.0])
