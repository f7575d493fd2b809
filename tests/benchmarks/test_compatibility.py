"""The census: what it asks of an architecture, that it notices what is wrong, and what people read of it."""

from __future__ import annotations

import json
import sys
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
from benchmarks.compatibility.examination import Row, examine
from benchmarks.compatibility.subject import Subject
from benchmarks.report import compatibility
from benchmarks.results import RESULTS, SCHEMA, BenchmarkError, read_result
from slora.layers import SelectiveLoRALinear


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


def _subject() -> Subject:
    torch.manual_seed(0)
    return Subject("branches", Branches(), (torch.randn(2, 3, 5),))


@pytest.mark.parametrize(("library", "family"), census.QUICK)
def test_an_architecture_of_every_kind_is_right(library: str, family: str, tmp_path: Path) -> None:
    row = examine(partial(architectures.build, library, family), tmp_path)
    assert (row["verdict"], row["reason"]) == ("right", "")
    assert row["adapted"] > 0


def test_the_examination_says_what_is_adapted_reached_and_left_out(tmp_path: Path) -> None:
    row = examine(_subject, tmp_path)
    assert (row["verdict"], row["reason"]) == ("right", "")
    assert (row["adapted"], row["reached"], row["unreached"]) == (3, 2, ["other"])
    parameters = sum(p.numel() for p in Branches().parameters())
    assert row["parameters"] == parameters
    assert row["elsewhere"] == {
        "Conv1d": round(32 / parameters, 4)
    }  # fmt: skip
    assert row["deviation"] < 1e-14
    assert 0 < row["merge_error"] < 1e-5


def _wrong_forward(patch: pytest.MonkeyPatch) -> None:
    project = SelectiveLoRALinear.project
    patch.setattr(SelectiveLoRALinear, "project", lambda self, x: project(self, x) * (1 + 1e-6))


def _skipped(patch: pytest.MonkeyPatch) -> None:
    project = SelectiveLoRALinear.project

    def past(self: Any, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.weight, self.bias) if self.out_features == 16 else project(self, x)

    patch.setattr(SelectiveLoRALinear, "project", past)


def _wrong_gradient(patch: pytest.MonkeyPatch) -> None:
    project = SelectiveLoRALinear.project

    def twice(self: Any, x: Tensor) -> Tensor:
        y = project(self, x)
        return y + (y - y.detach())

    patch.setattr(SelectiveLoRALinear, "project", twice)


def _wrong_merge(patch: pytest.MonkeyPatch) -> None:
    merge = slora.merge
    patch.setattr(slora, "merge", lambda model: merge(model, 1.001))


def _stale_unmerge(patch: pytest.MonkeyPatch) -> None:
    unmerge = slora.unmerge

    def leave(model: nn.Module) -> None:
        unmerge(model)
        model.down.weight.data.mul_(1.001)  # type: ignore[operator, union-attr]

    patch.setattr(slora, "unmerge", leave)


def _empty_load(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(slora, "load_adapter", lambda model, folder: model)


# A base weight that unmerge does not give back is another base, as load_adapter says.
@pytest.mark.filterwarnings("ignore::slora.errors.BaseModelWarning")
@pytest.mark.parametrize(
    ("break_it", "reason"),
    [
        (_wrong_forward, "after inject the output has other bits"),
        (_skipped, "up gets no gradient in training"),
        (_wrong_gradient, "the gradient of A of down deviates by 1.0e+00"),
        (_wrong_merge, "the merged output deviates by"),
        (_wrong_merge, "merged weights of up are not W + cBA"),
        (_stale_unmerge, "unmerged it gives another output than before"),
        (_stale_unmerge, "unload leaves other weights"),
        (_empty_load, "loaded from a file it gives another output"),
    ],
)
def test_the_examination_notices(
    break_it: Callable[[pytest.MonkeyPatch], None], reason: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("benchmarks.compatibility.examination.SHOWN", 100)
    break_it(monkeypatch)
    row = examine(_subject, tmp_path)
    assert row["verdict"] == "wrong"
    assert reason in row["reason"]


def test_a_model_without_linear_layers_has_nothing_to_adapt(tmp_path: Path) -> None:
    row = examine(lambda: Subject("flat", nn.Sequential(nn.Conv1d(3, 4, 1)), (torch.randn(2, 3, 5),)), tmp_path)
    assert (row["verdict"], row["elsewhere"]) == ("nothing", {"Conv1d": 1.0})


def test_what_slora_refuses_is_said_in_its_words_and_what_fails_by_itself_is_not_tried(tmp_path: Path) -> None:
    model = nn.Sequential(nn.Linear(3, 4))
    subject = Subject("adapted before", slora.inject(model, slora.SelectiveLoRAConfig(r=2)), (torch.randn(2, 3),))
    row = examine(lambda: subject, tmp_path)
    assert row["verdict"] == "refused"
    assert row["reason"].startswith("inject: the model is adapted already")
    row = examine(lambda: Subject("too narrow", nn.Sequential(nn.Linear(3, 4)), (torch.randn(2, 5),)), tmp_path)
    assert row["verdict"] == "skipped"
    assert row["reason"].startswith("the base model alone: RuntimeError: ")
    assert "mat1 and mat2 shapes cannot be multiplied" in row["reason"]


def test_one_that_crashes_or_hangs_is_a_row_and_the_others_have_their_turn(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = "import os, time\ndef task(name, path):\n    {'crash': os.abort, 'hang': lambda: time.sleep(60)}.get("
    (tmp_path / "census_tasks.py").write_text(tasks + 'name[1], lambda: path.write_text(\'{"verdict": "right"}\'))()\n')
    monkeypatch.syspath_prepend(tmp_path)
    import census_tasks  # type: ignore[import-not-found]

    names = [("a", "crash"), ("a", "hang"), ("a", "well")]
    rows: dict[Any, Row] = dict(census.each(names, 2, 5.0, census_tasks.task))
    assert rows[names[0]]["reason"] == "the process ended with -6"
    assert rows[names[1]]["reason"] == "no end after 5 s"
    assert [rows[name]["verdict"] for name in names] == ["failed", "failed", "right"]
    sys.modules.pop("census_tasks")


def test_words_name_a_library_a_family_or_a_part(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {"timm": ["beit", "swin"], "transformers": ["beit", "data2vec-beit", "bert"]}
    monkeypatch.setattr(census, "architectures", lambda: known)
    assert census.chosen(["beit"]) == [("timm", "beit"), ("transformers", "beit")]
    assert census.chosen(["timm/beit", "data2vec"]) == [("timm", "beit"), ("transformers", "data2vec-beit")]
    assert census.chosen(["timm"]) == [("timm", "beit"), ("timm", "swin")]
    assert len(census.chosen([])) == 5
    assert command_line.main(["compatibility", "swing"]) == 2
    with pytest.raises(BenchmarkError, match="no architecture is named 'swing'; near are 'swin'"):
        census.chosen(["swing"])


def _census(*rows: Row) -> dict[str, Any]:
    environment = {
        "packages": {"timm": "1.0", "torch": "2.11"},
        "device": "a processor",
        "commit": "0" * 40,
        "dirty": False,
    }
    return {"schema": SCHEMA, "case": "compatibility", "device": "cpu", "complete": True, "environment": environment,
            "architectures": [{"library": "timm", "reason": "", **row} for row in rows]}  # fmt: skip


def test_the_page_has_a_row_for_each_with_the_reason_of_every_gap_and_readme_the_numbers() -> None:
    right = {"family": "vit", "model": "vit_tiny", "verdict": "right", "adapted": 8, "merge_error": 1.4e-7}
    gaps = {"unreached": ["a", "b", "c", "d"], "compared_in": "float32", "elsewhere": {"Conv2d": 0.256}}
    rows = (
        right,
        {**right, **gaps, "family": "eva"},
        {"family": "vgg", "verdict": "nothing", "reason": "no linear layer"},
    )
    text = compatibility.page(_census(*rows))
    assert "| vit | vit_tiny | 8 | right | 1e-07 |  |" in text
    assert "does not depend on `a`, `b`, `c` and 1 more; compared in fp32" in text
    assert "not adapted: Conv2d 26 % |" in text
    assert "| vgg |  |  | nothing to adapt |  | no linear layer |" in text
    text = compatibility.summary(_census(*rows))
    assert "* timm 1.0: 2 of 3 families (1 without a linear layer below the head)" in text


def test_a_damaged_or_cut_census_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "benchmarks" / "results" / "compatibility.json"
    path.parent.mkdir(parents=True)
    assert compatibility.read(tmp_path) is None
    path.write_text(json.dumps(_census({"family": "vit"})))
    with pytest.raises(BenchmarkError, match="an architecture lacks one of family, library, reason, verdict"):
        compatibility.read(tmp_path)
    path.write_text(json.dumps({**_census(), "complete": False}))
    with pytest.raises(BenchmarkError, match="was cut; run: python -m benchmarks compatibility"):
        compatibility.read(tmp_path)


def test_a_part_of_the_census_is_not_written_over_the_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    written: list[Path | None] = []

    def run(names: Any, jobs: int, seconds: float, out: Path | None) -> list[Row]:
        written.append(out)
        return [{"verdict": "wrong" if len(written) > 2 else "right"}]

    monkeypatch.setattr(census, "run", run)
    assert [command_line.main(["compatibility", *words]) for words in (["--quick"], [], ["t5"])] == [0, 0, 1]
    assert written == [None, RESULTS, None]


def test_the_committed_census_has_no_wrong_result_and_no_crash() -> None:
    result = RESULTS / "compatibility.json"
    if not result.exists():
        pytest.skip("no whole census has been written yet; python -m benchmarks compatibility does")
    rows = read_result(result)["architectures"]
    assert [(row["family"], row["reason"]) for row in rows if row["verdict"] in ("wrong", "failed")] == []
