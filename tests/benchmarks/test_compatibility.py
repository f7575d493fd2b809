"""The census: what it checks of an architecture, and that it notices what is wrong."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slora
from benchmarks import __main__ as command_line
from benchmarks.compatibility import architectures, census
from benchmarks.compatibility.checks import ModelUnderTest, Row, check
from benchmarks.results import RESULTS, BenchmarkError, read_result
from slora.layers import SelectiveLoRALinear

Patch = pytest.MonkeyPatch


class Branches(nn.Module):
    """Two layers that are used, one that is not, and a convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv1d(3, 8, 1)
        self.up, self.down, self.other = nn.Linear(8, 16), nn.Linear(16, 8), nn.Linear(8, 8)
        self.head = nn.Linear(8, 2)

    def forward(self, x: Tensor) -> Tensor:
        hidden: Tensor = self.patches(x).mT.contiguous()
        return self.head(hidden + self.down(self.up(hidden).relu())).mean(1)  # type: ignore[no-any-return]


def _branches() -> ModelUnderTest:
    torch.manual_seed(0)
    return ModelUnderTest("branches", Branches(), (torch.randn(2, 3, 5),))


@pytest.mark.parametrize("name", architectures.TABLES["quick"].split())
def test_an_architecture_of_every_kind_is_right(name: str, tmp_path: Path) -> None:
    row = check(partial(architectures.build, *name.split("/")), tmp_path)
    assert (row["verdict"], row["reason"]) == ("right", "")
    assert row["adapted"] > 0


def test_a_row_says_what_is_adapted_reached_and_left_out(tmp_path: Path) -> None:
    row = check(_branches, tmp_path)
    assert (row["verdict"], row["reason"]) == ("right", "")
    assert (row["adapted"], row["unreached"]) == (3, ["other"])
    # Of three layers, a convolution and a head, with biases.
    assert row["share"] == round(320 / (320 + 32 + 32 + 18), 4)


def _project(change: Callable[[Any, Tensor, Tensor], Tensor]) -> Callable[[Patch], None]:
    """Replace what a layer returns: `change` takes the layer, its input and its output."""
    project = SelectiveLoRALinear.project
    return lambda patch: patch.setattr(
        SelectiveLoRALinear, "project", lambda self, x: change(self, x, project(self, x))
    )


def _without_blocks(layer: Any, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.linear(x, layer.weight, layer.bias) if layer.out_features == 16 else y


def _wrong_merge(patch: Patch) -> None:
    merge = slora.merge
    patch.setattr(slora, "merge", lambda model: merge(model, 1.01))


def _stale_unmerge(patch: Patch) -> None:
    unmerge = slora.unmerge
    patch.setattr(slora, "unmerge", lambda model: (unmerge(model), model.down.weight.data.mul_(1.001)))


def _empty_load(patch: Patch) -> None:
    patch.setattr(slora, "load_adapter", lambda model, folder: model)


# A base weight that unmerge does not restore is another base, as load_adapter says.
@pytest.mark.filterwarnings("ignore::slora.errors.BaseModelWarning")
@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (_project(lambda layer, x, y: y * (1 + 1e-6)), "after inject the output has other bits"),
        (_project(_without_blocks), "the gradient of B of up deviates by 1.0e+00"),
        (_project(lambda layer, x, y: y + (y - y.detach())), "the gradient of A of down deviates by 1.0e+00"),
        (_wrong_merge, "the merged output deviates by"),
        (_stale_unmerge, "unmerged it gives another output than before"),
        (_stale_unmerge, "unload leaves other weights"),
        (_empty_load, "loaded from a file it gives another output"),
    ],
    ids="bits gradient-missing gradient-wrong merge unmerge unload load".split(),
)
def test_what_is_wrong_is_noticed(
    break_it: Callable[[Patch], None], reason: str, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setattr("benchmarks.compatibility.checks.SHOWN", 100)
    break_it(monkeypatch)
    row = check(_branches, tmp_path)
    assert row["verdict"] == "wrong"
    assert reason in row["reason"]


def test_what_cannot_be_adapted_or_run_has_its_reason(tmp_path: Path) -> None:
    def row(model: nn.Module, *shape: int) -> Row:
        return check(lambda: ModelUnderTest("model", model, (torch.randn(shape),)), tmp_path)

    assert row(nn.Sequential(nn.Conv1d(3, 4, 1)), 2, 3, 5)["verdict"] == "nothing"
    adapted = row(slora.inject(nn.Sequential(nn.Linear(3, 4)), slora.SelectiveLoRAConfig(r=2)), 2, 3)
    assert adapted["verdict"] == "refused"
    assert adapted["reason"].startswith("inject: the model is adapted already")
    narrow = row(nn.Sequential(nn.Linear(3, 4)), 2, 5)
    assert narrow["verdict"] == "skipped"
    assert narrow["reason"].startswith("the base model alone: RuntimeError: ")


@pytest.mark.usefixtures("no_processes")
def test_the_rows_of_a_census_are_written_in_order_and_a_part_of_it_not_over_the_whole(
    tmp_path: Path, monkeypatch: Patch
) -> None:
    def work(name: str) -> Row:
        if name == "timm/swin":
            raise ValueError("of all things")
        return {"verdict": "right", "reason": ""}

    monkeypatch.setattr(census, "architectures", lambda: {"timm": ["swin", "beit"], "transformers": ["beit", "bert"]})
    monkeypatch.setattr(census, "work", work)
    assert census.chosen(["timm/", "bert"]) == ["timm/swin", "timm/beit", "transformers/bert"]
    with pytest.raises(BenchmarkError, match="no architecture has 'swing' in its name"):
        census.chosen(["swing"])
    monkeypatch.setattr(command_line, "RESULTS", tmp_path)
    assert command_line.main(["compatibility", "bert"]) == 0
    assert list(tmp_path.iterdir()) == []
    assert command_line.main(["compatibility"]) == 1
    rows = read_result(tmp_path / "compatibility.json")["architectures"]
    assert [(row["library"], row["family"], row["verdict"], row["reason"]) for row in rows] == [
        ("timm", "swin", "failed", "of all things"), ("timm", "beit", "right", ""),
        ("transformers", "beit", "right", ""), ("transformers", "bert", "right", ""),
    ]  # fmt: skip


def test_the_committed_census_has_no_wrong_result_and_no_crash() -> None:
    rows = read_result(RESULTS / "compatibility.json")["architectures"]
    assert [(row["family"], row["reason"]) for row in rows if row["verdict"] in ("wrong", "failed")] == []
