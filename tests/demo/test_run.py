"""`slora demo`: a short run goes through from end to end, and what it prints is what it wrote."""

from __future__ import annotations

import contextlib
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from slora.demo import run
from slora.errors import CheckpointError, ConfigError

METHODS = ["full", "linear", "lora", "selective"]
LAYERS = [f"blocks.{i}.{name}" for i in range(6) for name in ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2")]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, str]]:
    """A quick run of one seed and few steps: the folder it wrote and what it printed."""
    out = tmp_path_factory.mktemp("demo") / "out"
    printed = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(printed):
        patch.setitem(run.QUICK, "max_steps", 4)
        run.main(out, seeds=1, quick=True)
    return out, printed.getvalue()


@pytest.fixture(scope="module")
def result(finished: tuple[Path, str]) -> dict[str, Any]:
    loaded: dict[str, Any] = json.loads((finished[0] / "demo.json").read_text(encoding="utf-8"))
    return loaded


def made_up(**values: dict[str, list[float]]) -> dict[str, Any]:
    """A result with the given values of some keys by method, one per seed."""
    plain = {"target_accuracy": 0.9, "source_after": 0.8, "active": 36, "blocks": 36, "trainable": 1, "kept": 1}
    runs = []
    for method in METHODS:
        for seed in range(3):
            own = {key: of_method[method][seed] for key, of_method in values.items() if method in of_method}
            runs.append({"method": method, "seed": seed, "flops": 10**12, "seconds": 2.0, **plain, **own})
    return {"source_before": 0.85, "runs": runs}


def test_a_quick_run_leaves_its_four_files_and_nothing_else(finished: tuple[Path, str]) -> None:
    out, printed = finished
    assert sorted(path.name for path in out.iterdir()) == ["blocks.png", "demo.json", "report.html", "scatter.png"]
    for name in ("blocks.png", "scatter.png"):
        assert (out / name).read_bytes().startswith(b"\x89PNG")
    assert str(out / "report.html") in printed


def test_demo_json_holds_every_run_in_the_promised_format(result: dict[str, Any]) -> None:
    assert result["format"] == 1
    assert list(result["settings"]) == METHODS
    assert {"slora", "torch", "processor", "threads"} <= set(result["environment"])
    assert [(entry["method"], entry["seed"]) for entry in result["runs"]] == [(method, 0) for method in METHODS]
    for entry in result["runs"]:
        adapted = entry["method"] in ("lora", "selective")
        assert sorted(entry["block_map"]) == (sorted(LAYERS) if adapted else [])
        assert entry["blocks"] == (36 if adapted else 0)
        assert entry["active"] == sum(map(sum, entry["block_map"].values()))
        assert 0 <= entry["target_accuracy"] <= 1
        assert 0 <= entry["source_after"] <= 1
        assert entry["flops"] > 0
        assert entry["seconds"] > 0
        assert [record["step"] for record in entry["history"]] == [2, 4]
        assert set(entry["history"][0]) == {"step", "loss", "accuracy", "active"}


def test_all_methods_get_the_same_batches_under_the_same_schedule() -> None:
    settings = [run.settings_of(method).to_dict() for method in METHODS]
    for name in ("max_steps", "batch_size", "gradient_accumulation", "warmup", "min_lr_ratio", "optimizer", "seed"):
        assert len({entry[name] for entry in settings}) == 1, name
    assert [entry["method"] for entry in settings] == METHODS


def test_parameters_are_counted_by_method(result: dict[str, Any]) -> None:
    full, linear, lora, selective = result["runs"]
    r, head = run.RECIPES["lora"]["r"], 970
    in_blocks = 6 * r * (3 * (96 + 96) + (96 + 96) + (96 + 384) + (384 + 96))
    assert full["trainable"] == full["kept"] == sum(p.numel() for p in run.pretrained().parameters())
    assert linear["trainable"] == linear["kept"] == head
    assert lora["trainable"] == lora["kept"] == head + in_blocks
    assert selective["trainable"] == head + in_blocks + 36
    assert selective["kept"] <= head + in_blocks


def test_a_linear_probe_leaves_the_features_as_they_were(result: dict[str, Any]) -> None:
    assert result["runs"][1]["source_after"] == result["source_before"]


def test_the_printed_table_shows_the_figures_of_demo_json(finished: tuple[Path, str], result: dict[str, Any]) -> None:
    for entry, label in zip(result["runs"], ("full", "linear probe", "LoRA", "selective"), strict=True):
        line = next(line for line in finished[1].splitlines() if re.match(rf"{label}\s+\d", line))
        before, after = 100 * result["source_before"], 100 * entry["source_after"]
        figures = [
            f"{100 * entry['target_accuracy']:.1f}", f"{before:.1f} → {after:.1f}",
            f"{before - after:.1f}".replace("-0.0", "0.0"),
            f"{entry['active']}/36" if entry["blocks"] else "none", f"{entry['trainable']:,}", f"{entry['kept']:,}",
            f"{entry['flops'] / 1e12:.2f}", f"{entry['seconds']:.1f}",
        ]  # fmt: skip
        assert re.split(r"\s{2,}", line.strip()) == [label, *figures]


def test_the_page_is_self_contained_and_tells_of_every_method(
    finished: tuple[Path, str], result: dict[str, Any]
) -> None:
    html = (finished[0] / "report.html").read_text(encoding="utf-8")
    assert not re.search(r"<(link|script|img|iframe)\b", html)
    assert not re.search(r'(src|href)="(?!#)', html)
    for label in run.LABELS.values():
        assert f"<td>{label}</td>" in html
    for row in run.cells(result):
        for cell in row:
            assert f"<td>{cell}</td>" in html
    for sentence in run.aims(result):
        assert sentence.replace("'", "&#39;") in html
    assert "quick run" in html


def test_every_aim_is_said_to_be_met_or_missed(finished: tuple[Path, str], result: dict[str, Any]) -> None:
    sentences = run.aims(result)
    assert len(sentences) == 3
    for sentence in sentences:
        assert sentence in finished[1]
        assert ": met. " in sentence or ": missed. " in sentence


def test_figures_are_means_over_seeds_with_their_standard_deviation() -> None:
    result = made_up(
        target_accuracy={"selective": [0.97, 0.98, 0.99]},
        source_after={"selective": [0.80, 0.82, 0.84]},
        active={"selective": [8, 8, 9]},
    )
    (row,) = [row for row in run.cells(result) if row[0] == "selective"]
    assert row == ["selective", "98.0 ± 1.0", "85.0 → 82.0", "3.0 ± 2.0", "8.33/36", "1", "1", "1.00", "2.0"]


@pytest.mark.parametrize(
    ("values", "verdicts", "figures"),
    [
        (
            {
                "target_accuracy": {"lora": [0.98] * 3, "selective": [0.96, 0.98, 0.97]},
                "source_after": {"lora": [0.65] * 3, "selective": [0.76] * 3},
                "active": {"selective": [9, 8, 10]},
            },
            ["met", "met", "met"],
            ["97.0 %, 1.0 points below LoRA's 98.0 %", "9 of 36 blocks active, 25 % (8 to 10 by seed)",
             "loses 9.0 points of k-NN accuracy on letters, LoRA 20.0"],
        ),
        (
            {
                "target_accuracy": {"lora": [0.98] * 3, "selective": [0.95] * 3},
                "source_after": {"lora": [0.81] * 3, "selective": [0.82] * 3},
                "active": {"selective": [9, 10, 9]},
            },
            ["missed", "missed", "missed"],
            ["3.0 points below", "9.33 of 36 blocks active, 26 %", "loses 3.0 points"],
        ),
    ],
    ids=["met", "missed"],
)  # fmt: skip
def test_aims_are_judged_by_the_means(values: Any, verdicts: list[str], figures: list[str]) -> None:
    for sentence, verdict, figure in zip(run.aims(made_up(**values)), verdicts, figures, strict=True):
        assert f": {verdict}. " in sentence
        assert figure in sentence


def test_ctrl_c_stops_with_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(*_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "run_method", stopped)
    with pytest.raises(SystemExit) as exit_status:
        run.main(tmp_path, seeds=1, quick=True)
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
        run.write_report(result, tmp_path)


def test_no_seeds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="seeds=0"):
        run.main(tmp_path, seeds=0)


def test_a_report_can_be_opened(
    tmp_path: Path, result: dict[str, Any], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    opened: list[str] = []
    monkeypatch.setattr(run, "_run_all", lambda *_: result)
    monkeypatch.setattr("webbrowser.open", opened.append)
    run.main(tmp_path, seeds=1, open_report=True)
    assert opened == [(tmp_path / "report.html").resolve().as_uri()]
