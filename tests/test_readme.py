"""Python blocks of README.md run as they are written."""

from __future__ import annotations

import itertools
import re
from collections import OrderedDict
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slora
from slora.layers import adapted_layers

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def block(text: str) -> str:
    """The Python block that has `text`."""
    (found,) = (code for code in re.findall(r"```python\n(.*?)```", README, re.DOTALL) if text in code)
    return str(found)


def run(text: str, **names: Any) -> dict[str, Any]:
    """Run the block that has `text`, with `names` of what README says comes before."""
    known = {"slora": slora, "torch": torch, "cross_entropy": F.cross_entropy, **names}
    exec(block(text), known)
    return known


def adapted() -> nn.Module:
    layers = {name: nn.Sequential(nn.Linear(32, 32), nn.Tanh()) for name in ("first", "second", "third")}
    model = nn.Sequential(OrderedDict(layers | {"head": nn.Linear(32, 3)}))
    return slora.inject(model, slora.SelectiveLoRAConfig(r=16, modules_to_save=["head"]))


def test_a_rank_wise_strategy_leaves_its_budget_of_ranks() -> None:
    model, batch = adapted(), (torch.randn(8, 32), torch.randint(3, (8,)))
    run("selection.finish()", model=model, epochs=itertools.repeat(batch))
    assert sum(A.shape[0] for _, layer in adapted_layers(model) for A in layer.lora_A if A.any()) == 40


def test_each_term_of_retention_is_a_scalar() -> None:
    model = adapted()
    images, labels = torch.randn(4, 32), torch.tensor([0, 1, 2, 0])
    known: dict[str, Any] = {
        "slora": slora,
        "model": model,
        "old_images": images,
        "old_labels": labels,
        "old_logits": model,
    }
    for line in block("slora.retention.L2(").splitlines():
        exec(line, known)
        assert known["keep"]().shape == ()


def test_a_clip_is_evaluated_and_its_adapter_compressed(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    batches = [(torch.rand(6, 3, 16, 16), torch.randint(2, (6,)))]
    known = run("build_clip(", batches=batches, captions=["a photo of a b."] * 6, image_of_caption=torch.arange(6))
    F.cross_entropy(known["model"](batches[0][0]), batches[0][1]).backward()
    layers = dict(adapted_layers(known["clip"].model))
    assert len(layers) == 24
    assert all(layer.lora_B.grad is not None for layer in layers.values())
    accuracy, recall = capsys.readouterr().out.splitlines()
    assert 0 <= float(accuracy) <= 1
    assert recall.startswith("{1: ")
    assert (tmp_path / "small.safetensors").is_file()
    assert known["texts"].shape[0] == 6
