"""The census: what it checks of an architecture, that it notices what is wrong, and that one crash costs one row."""

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
from benchmarks.compatibility.checks import Row, check
from benchmarks.compatibility.model_under_test import ModelUnderTest
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
    assert (row["verdict"], row["reason"], row["adapted"], row["reached"]) == ("right", "", 3, 2)
    assert row["unreached"] == ["other"]
    assert row["elsewhere"] == {"Conv1d": round(32 / row["parameters"], 4)}
    assert row["deviation"] < 1e-14
    assert 0 < row["merge_error"] < 1e-5


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
    patch.setattr(slora, "merge", lambda model: merge(model, 1.001))


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
        (_project(_without_blocks), "up gets no gradient in training"),
        (_project(lambda layer, x, y: y + (y - y.detach())), "the gradient of A of down deviates by 1.0e+00"),
        (_wrong_merge, "the merged output deviates by"),
        (_wrong_merge, "merged weights of up are not W + cBA"),
        (_stale_unmerge, "unmerged it gives another output than before"),
        (_stale_unmerge, "unload leaves other weights"),
        (_empty_load, "loaded from a file it gives another output"),
    ],
    ids="bits gradient-missing gradient-wrong merged-output merged-weights unmerge unload load".split(),
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


def test_one_that_crashes_or_hangs_is_a_row_and_the_others_have_their_turn(tmp_path: Path, monkeypatch: Patch) -> None:
    ends = "{'crash': os.abort, 'hang': lambda: time.sleep(60)}.get(name.split('/')[1], lambda: None)()"
    (tmp_path / "census_tasks.py").write_text(
        f"import os, time\ndef task(name, to):\n    {ends}\n    to.send({{'verdict': 'right', 'reason': ''}})\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(census, "PRELOADED", [])
    import census_tasks  # type: ignore[import-not-found]

    rows = census.run(["a/crash", "a/hang", "a/well"], 2, 5.0, tmp_path, census_tasks.task)
    assert [row["verdict"] for row in rows] == ["failed", "failed", "right"]
    assert [row["reason"] for row in rows] == ["the process ended with -6", "no end after 5 s", ""]
    assert read_result(tmp_path / "compatibility.json")["architectures"] == rows


def test_words_name_a_library_a_family_or_a_part(monkeypatch: Patch) -> None:
    known = {"timm": ["beit", "swin"], "transformers": ["beit", "data2vec-beit", "bert"]}
    monkeypatch.setattr(census, "architectures", lambda: known)
    assert census.chosen(["beit"]) == ["timm/beit", "transformers/beit"]
    assert census.chosen(["timm/beit", "data2vec"]) == ["timm/beit", "transformers/data2vec-beit"]
    assert census.chosen(["timm"]) == ["timm/beit", "timm/swin"]
    assert len(census.chosen([])) == 5
    with pytest.raises(BenchmarkError, match="no architecture is named 'swing'; near are 'swin'"):
        census.chosen(["swing"])


def test_a_part_of_the_census_is_not_written_over_the_whole(monkeypatch: Patch) -> None:
    written: list[Path | None] = []
    monkeypatch.setattr(census, "run", lambda names, jobs, seconds, out: written.append(out) or [{"verdict": "wrong"}])
    assert {command_line.main(["compatibility", *words]) for words in (["--quick"], [], ["t5"])} == {1}
    assert written == [None, RESULTS, None]


def test_the_committed_census_has_no_wrong_result_and_no_crash() -> None:
    rows = read_result(RESULTS / "compatibility.json")["architectures"]
    assert [(row["family"], row["reason"]) for row in rows if row["verdict"] in ("wrong", "failed")] == []
