"""Reports: a run directory becomes one self-contained page, and its figures draw all there is to draw."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import matplotlib
import pytest
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from slora.config import SelectiveLoRAConfig
from slora.errors import CheckpointError, ConfigError
from slora.report import run_page, write_report
from slora.report.block_map import block_map
from slora.report.cells import grid_position
from slora.report.charts import bars, curves, target_against_retention
from slora.report.gates import gate_curves
from slora.report.page import Picture, Section, Table, inline_svg, render, scaled
from slora.report.style import PALETTE, save_png
from slora.runs.eval_table import forgetting, means, row

pytestmark = pytest.mark.once

TIMM = {
    f"blocks.{i}.{name}": [i == 1] * blocks
    for i in range(3)
    for name, blocks in (("attn.qkv", 3), ("attn.proj", 1), ("mlp.fc1", 1), ("mlp.fc2", 1))
}


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    folder = tmp_path / "my-run"
    (folder / "adapter").mkdir(parents=True)
    records = []
    for step in range(10, 51, 10):
        records.append({"step": step, "loss": 2 / step, "accuracy": step / 100, "lr": 1e-3, "active": 20 - step // 5})
        records[-1] |= {"blocks": 18, "seconds": step / 10, "flops": step * 10**9}
    records.append({"step": 50, "eval_loss": 0.5, "eval_accuracy": 0.8125})
    lines = [json.dumps(record) for record in records]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 6')
    (folder / "config.yaml").write_text("model: timm/some_vit\nmethod: selective\nexclude_modules: [a, b]\nlr: 0.001\n")
    layers = {
        name: {
            "r": 8,
            "blocks": len(on),
            "active": [i for i, a in enumerate(on) if a],
            "gate": [0.2 if a else 0.0 for a in on],
        }
        for name, on in TIMM.items()
    }
    base = {"class": "VisionTransformer", "shapes": {name: [24, 24] for name in TIMM}, "digest": ""}
    content = {"format": 1, "config": SelectiveLoRAConfig().to_dict(), "layers": layers, "base": base}
    (folder / "adapter" / "selective.json").write_text(json.dumps(content))
    return folder


def blocks_drawn(figure: Figure) -> list[Rectangle]:
    patches = figure.axes[0].patches
    return [patch for patch in patches if patch.get_gid() == "block" and isinstance(patch, Rectangle)]


def assert_self_contained(html: str) -> None:
    assert not re.search(r"<(link|script|img|iframe|object|embed)\b", html)
    assert not re.search(r"@import|url\((?!#)", html)
    assert not re.search(r'(src|href)="(?!#)', html)
    assert set(re.findall(r"https?://[^\"\s]+", html)) <= {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}


def test_a_run_directory_becomes_one_self_contained_page(run_dir: Path) -> None:
    path = write_report(run_dir)
    assert path == run_dir / "report.html"
    html = path.read_text(encoding="utf-8")
    assert_self_contained(html)
    assert "Fine-tuning run my-run" in html
    assert "timm/some_vit, selective: 50 steps, 5 s, 50 GFLOP. " in html
    assert "Accuracy on the evaluation data: 81.25 % at the end. 10 of 18 blocks are active." in html
    for title in ("Loss at the end", "Accuracy at the end", "Active blocks: 18 at first, 10 at the end"):
        assert title in html
    assert "6 of 18 blocks are active (33 %)" in html
    assert "<td>exclude_modules</td><td>a, b</td>" in html
    assert html.count("<svg") == 5


EVALUATION = {
    "accuracy": {"data": "digits", "top1": 0.9704, "top5": 0.99, "per_class": 0.9689, "loss": 0.1, "count": 1540},
    "knn": {
        "source": "letters", "bank": 5200, "queries": 2600,
        "before": {"10": 0.9908, "200": 0.9923}, "after": {"10": 0.985, "200": 0.9931},
    },
}  # fmt: skip


def test_the_page_of_an_evaluated_run_shows_accuracy_and_forgetting(run_dir: Path) -> None:
    plain = write_report(run_dir).read_text(encoding="utf-8")
    assert "Forgetting" not in plain
    (run_dir / "evaluation.json").write_text(json.dumps(EVALUATION))
    html = write_report(run_dir).read_text(encoding="utf-8")
    assert_self_contained(html)
    text = " ".join(re.sub(r"<[^>]+>", " ", html).split())
    assert "Accuracy on digits, 1,540 images: top-1 97.04 %, top-5 99.00 %, mean over classes" in text
    assert "on the features of letters, where 5,200 images vote on 2,600 others" in text
    assert "neighbours k before (%) after (%) change (points) 10 99.08 98.50 -0.58 200 99.23 99.31 +0.08" in text
    assert html.count("<svg") == plain.count("<svg") + 1
    assert "k-NN on letters: 99.2 % before, 98.9 % after, the mean over k" in text.replace("\u00a0", " ")


@pytest.mark.parametrize("knn", [None, {**EVALUATION["knn"], "before": {"20": 0.5}, "after": {"20": 0.25}}])
def test_an_evaluation_without_source_or_of_one_k_draws_no_curve(run_dir: Path, knn: Any) -> None:
    pictures = write_report(run_dir).read_text(encoding="utf-8").count("<svg")
    (run_dir / "evaluation.json").write_text(json.dumps({**EVALUATION, "knn": knn}))
    html = write_report(run_dir).read_text(encoding="utf-8")
    assert "97.04 %" in html
    assert ("<td>-25.00</td>" in html) == (knn is not None)
    assert html.count("<svg") == pictures


def test_the_table_of_an_evaluation_shows_rows_means_and_forgetting(run_dir: Path) -> None:
    rows = [
        {**row("id", "imagenet", "top-1", None, 0.75, 50), "nll": {"before": None, "after": 1.25}},
        row("ood", "imagenet-r", "top-1", 0.5, 0.625, 50),
        {**row("zero-shot", "imagefolder:/data/birds", "top-1", 0.5, 0.25, 9), "nll": {"before": 0.5, "after": 0.75}},
        row("retrieval", "coco", "R@1 text to image", 0.25, 0.5, 9),
    ]
    result = {**EVALUATION, "knn": None, "rows": rows, "means": means(rows), "forgetting": forgetting(rows, "digits")}
    (run_dir / "evaluation.json").write_text(json.dumps(result))
    html = write_report(run_dir).read_text(encoding="utf-8")
    text = " ".join(re.sub(r"<[^>]+>", " ", html).split())
    assert "in distribution: imagenet, top-1 - 75.00 - - \N{RIGHTWARDS ARROW} 1.250 out of distribution" in text
    assert "zero-shot classification: birds, top-1 50.00 25.00 -25.00 0.500 \N{RIGHTWARDS ARROW} 0.750" in text
    assert "out of distribution, mean of top-1 50.00 62.50 +12.50" in text
    # The mean of -25 for the birds and +25 for the captions.
    assert "Forgetting: +0.00 points over 2 sets. It is the mean change of zero-shot accuracy" in text


@pytest.mark.parametrize("text", ["{}", "[]", '{"accuracy": {"top1": 1}, "knn": null}', "{"])
def test_a_damaged_evaluation_is_named(run_dir: Path, text: str) -> None:
    (run_dir / "evaluation.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"evaluation\.json .*damaged"):
        write_report(run_dir)


def test_the_page_can_go_elsewhere(run_dir: Path, tmp_path: Path) -> None:
    out = tmp_path / "pages" / "one.html"
    assert write_report(run_dir, out) == out
    assert out.exists()
    assert not (run_dir / "report.html").exists()


def test_a_run_without_blocks_settings_or_evaluation_gets_a_report_of_what_it_has(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "loss": 2.0, "accuracy": null, "lr": 0.1}\n')
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert html.count("<svg") == 2
    assert "Settings" not in html
    assert "Which blocks are active" not in html


def test_a_run_directory_without_metrics_is_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl"):
        write_report(tmp_path)


def test_a_run_that_logged_nothing_yet_is_named(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text("")
    with pytest.raises(CheckpointError, match=r"metrics\.jsonl holds no training step yet"):
        write_report(tmp_path)


@pytest.mark.parametrize("text", ['{"layers": 3}', "{}", "[]", '{"layers": {"a": {"blocks": 2}}}', "{"])
def test_a_damaged_adapter_is_named(run_dir: Path, text: str) -> None:
    (run_dir / "adapter" / "selective.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"selective\.json"):
        write_report(run_dir)


def test_damaged_settings_are_named(run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text("- a\n- b\n")
    with pytest.raises(ConfigError, match=r"config\.yaml"):
        write_report(run_dir)


@pytest.mark.parametrize("line", ["threshold: abc", "gate_init: [0.1]", "lr: {a: 1}", "budget: 7.5", "lr: 1e400"])
def test_a_setting_that_is_none_is_named(run_dir: Path, line: str) -> None:
    with_gates(run_dir)
    (run_dir / "config.yaml").write_text(f"method: selective\n{line}\n")
    with pytest.raises(ConfigError, match=rf"config\.yaml: .*{line.partition(':')[0]}"):
        write_report(run_dir)


def test_a_setting_of_another_version_is_shown_as_it_stands(run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text("method: selective\nof-another: [1, 2]\n")
    html = write_report(run_dir).read_text(encoding="utf-8")
    assert "of_another" in html
    assert "[1, 2]" in html


def test_values_that_no_axis_holds_are_left_out(run_dir: Path) -> None:
    with open(run_dir / "metrics.jsonl", "a") as file:
        file.write('\n{"step": 51, "loss": 1e308}\n{"step": 52, "loss": -1e308}\n')
    assert_self_contained(write_report(run_dir).read_text(encoding="utf-8"))


def test_a_page_that_cannot_be_written_is_named(run_dir: Path) -> None:
    (run_dir / "taken").write_text("a file")
    with pytest.raises(CheckpointError, match=r"taken/report\.html"):
        write_report(run_dir, run_dir / "taken" / "report.html")
    assert not list(run_dir.glob("*.tmp"))


@pytest.mark.parametrize("runs", [1, 3, 7])
def test_the_block_map_draws_every_block_once(runs: int) -> None:
    cells = blocks_drawn(block_map([TIMM] * runs, "blocks"))
    assert len(cells) == 18
    assert len({cell.get_xy() for cell in cells}) == 18
    assert sum(cell.get_fill() and cell.get_facecolor()[3] > 0 for cell in cells) == 6


def test_the_block_map_counts_the_runs_that_keep_a_block() -> None:
    none = {name: [False] * len(on) for name, on in TIMM.items()}
    axes = block_map([TIMM, none, TIMM], "blocks").axes[0]
    assert [text.get_text() for text in axes.texts if text.get_text().isdigit()] == ["2"] * 6


def test_the_block_map_of_a_timm_model_has_layers_by_projections() -> None:
    axes = block_map([TIMM], "blocks").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["q", "k", "v", "proj", "fc1", "fc2"]
    assert [label.get_text() for label in axes.get_yticklabels()] == ["0", "1", "2"]


def test_the_block_map_does_not_depend_on_the_order_in_which_a_file_lists_layers() -> None:
    many = {
        f"blocks.{i}.{name}": [True] for i in range(11) for name in ("attn.q_proj", "attn.k_proj", "attn.proj", "x")
    }
    axes = block_map([dict(sorted(many.items()))], "blocks").axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [str(i) for i in range(11)]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["q_proj", "k_proj", "proj", "x"]


@pytest.mark.parametrize(
    ("names", "rows", "columns"),
    [
        (
            ["encoder.layer.0.attention.attention.query", "encoder.layer.0.attention.output.dense",
             "encoder.layer.0.output.dense"],
            ["0"],
            ["query", "attention.output.dense", "output.dense"],
        ),
        (
            ["visual.transformer.resblocks.0.mlp.c_fc", "transformer.resblocks.0.mlp.c_fc"],
            ["0", "visual 0"],
            ["c_fc"],
        ),
        (["layers.0.blocks.0.fc", "layers.0.blocks.1.fc", "layers.1.blocks.0.fc"], ["0.0", "0.1", "1.0"], ["fc"]),
        (["0", "2"], ["model"], ["0", "2"]),
        (["encoder.up", "decoder.up"], ["decoder", "encoder"], ["up"]),
    ],
    ids=["transformers", "two towers", "stages", "sequential", "no numbers"],
)  # fmt: skip
def test_the_block_map_takes_whatever_names_there_are(names: list[str], rows: list[str], columns: list[str]) -> None:
    figure = block_map([{name: [True] for name in names}], "blocks")
    axes = figure.axes[0]
    assert len(blocks_drawn(figure)) == len(names)
    assert [label.get_text() for label in axes.get_yticklabels()] == rows
    assert [label.get_text() for label in axes.get_xticklabels()] == columns


def test_blocks_of_a_layer_that_is_not_fused_are_numbered() -> None:
    axes = block_map([{"blocks.0.fc1": [True, False]}], "blocks").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == ["fc1 1", "fc1 2"]


@pytest.mark.parametrize("maps", [[], [{}]], ids=["no run", "no layer"])
def test_an_empty_block_map_is_refused(maps: list[dict[str, list[bool]]]) -> None:
    with pytest.raises(ValueError, match="no blocks to draw"):
        block_map(maps, "blocks")


@pytest.mark.parametrize(
    ("layer", "place"),
    [
        ("blocks.3.attn.qkv", ("blocks.3", "attn.qkv")),
        ("blocks.3.mlp.0", ("blocks.3", "mlp.0")),
        ("neck.proj", ("neck", "proj")),
        ("proj", ("model", "proj")),
    ],
)
def test_a_layer_has_a_row_and_a_projection(layer: str, place: tuple[str, str]) -> None:
    assert grid_position(layer) == place


def test_the_scatter_draws_every_run_and_the_line_before() -> None:
    runs = {"lora": [(0.5, 0.9), (0.6, 0.8)], "selective": [(0.7, 0.85)]}
    figure = target_against_retention(runs, 0.75, "title", {"lora": "LoRA"})
    axes = figure.axes[0]
    drawn = {(x, y) for line in axes.lines for x, y in zip(line.get_xdata(), line.get_ydata(), strict=True)}
    assert {(50.0, 90.0), (60.0, 80.0), (70.0, 85.0), (55.0, 85.0)} <= {(round(x, 9), round(y, 9)) for x, y in drawn}
    assert [text.get_text() for text in axes.texts] == ["before fine-tuning: 75.0 %"]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["LoRA", "selective"]
    low, high = axes.get_xlim()
    assert low < 50
    assert high > 75


def test_curves_draw_the_mean_of_the_runs() -> None:
    figure = curves({"lora": [([1, 2], [1.0, 3.0]), ([1, 2], [3.0, 5.0])], "full": []}, "title", "loss")
    assert figure.axes[0].lines[0].get_ydata().tolist() == [2.0, 4.0]
    assert len(figure.axes[0].lines) == 1


def test_bars_print_the_mean() -> None:
    axes = bars({"full": [1.0, 2.0], "lora": [-3.0]}, "title", "points").axes[0]
    assert [text.get_text() for text in axes.texts] == ["1.5", "-3.0"]


FIGURES: dict[str, Callable[[], Figure]] = {
    "block_map": lambda: block_map([TIMM, TIMM], "title"),
    "target_against_retention": lambda: target_against_retention({"lora": [(0.5, 0.9)]}, 0.7, "title"),
    "curves": lambda: curves({"a": [([1], [2.0])], "b": [([1, 2], [0.1, 10.0])]}, "title", "loss", log=True),
    "bars": lambda: bars({"full": [1.0]}, "title", "points"),
    "gate_curves": lambda: gate_curves([1, 2], {"a.0.fc": [[0.15, 0.2]], "a.1.fc": [[0.15, 0.05]]}, 0.1, "title"),
}


@pytest.mark.parametrize("make", FIGURES.values(), ids=FIGURES)
def test_a_figure_becomes_a_png_and_leaves_global_settings_alone(make: Callable[[], Figure], tmp_path: Path) -> None:
    before = dict(matplotlib.rcParams)
    save_png(make(), tmp_path / "figure.png")
    assert dict(matplotlib.rcParams) == before
    assert (tmp_path / "figure.png").read_bytes().startswith(b"\x89PNG")


def test_a_png_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "figure.png").mkdir()
    with pytest.raises(CheckpointError, match=r"figure\.png could not be written"):
        save_png(FIGURES["bars"](), tmp_path / "figure.png")


@pytest.mark.parametrize("make", FIGURES.values(), ids=FIGURES)
def test_an_inline_figure_takes_colours_and_font_from_the_page(make: Callable[[], Figure]) -> None:
    svg = inline_svg(make(), 'what "it" shows', "f0")
    assert svg.startswith('<svg role="img" aria-label="what &#34;it&#34; shows"')
    assert not [colour for colour, _ in PALETTE.values() if colour in svg]
    assert "var(--ink)" in svg
    assert "var(--font)" in svg
    assert "DejaVu" not in svg
    assert "<text" in svg
    assert "<metadata" not in svg
    ids = re.findall(r'\bid="([^"]*)"', svg)
    assert all(name.startswith("f0-") for name in ids)
    assert set(re.findall(r'(?:href="#|url\(#)([^")]*)', svg)) <= set(ids)


def test_colours_on_white_are_told_apart_by_the_page() -> None:
    colours = [colour for colour, _ in PALETTE.values()]
    assert len(set(colours)) == len(colours)


def test_a_page_escapes_what_it_is_given_and_numbers_its_figures() -> None:
    pictures = [Picture(FIGURES["bars"](), "<alt>", "<caption>"), Picture(FIGURES["bars"](), "again")]
    table = Table(("a", "b"), [("<td>", "1")], "<note>")
    html = render("<title>", "<lead>", [Section("<heading>", ["<text>"], ["<point>"], table, pictures)], "<footer>")
    for word in ("title", "lead", "heading", "text", "point", "note", "alt", "caption", "footer"):
        assert f"&lt;{word}&gt;" in html
    assert "&lt;td&gt;" in html
    assert 'id="f0-' in html
    assert 'id="f1-' in html
    assert_self_contained(html)


def test_a_page_follows_dark_themes_and_small_screens() -> None:
    html = render("t", "l", [])
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert 'name="viewport"' in html
    for name, (light, dark) in PALETTE.items():
        assert f"--{name}: {light};" in html
        assert f"--{name}: {dark};" in html


@pytest.mark.parametrize(
    ("value", "text"), [(0, "0 "), (950, "950 "), (1230, "1.23 k"), (1.5e12, "1.5 T"), (2e16, "20 P")]
)
def test_large_numbers_get_a_prefix(value: float, text: str) -> None:
    assert scaled(value) == text


# Runs that are of no use, and the gates


def changed(run_dir: Path, *extra: dict[str, Any], **values: Any) -> str:
    """The page of the run with `values` in its last training record and further records."""
    path = run_dir / "metrics.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()[:-1]]
    [record for record in records if "loss" in record][-1].update(values)
    path.write_text("".join(json.dumps(record) + "\n" for record in [*records, *extra]))
    html = write_report(run_dir).read_text(encoding="utf-8")
    assert_self_contained(html)
    return html


def test_a_run_without_an_active_block_is_shown_in_red_with_cause_and_remedy(run_dir: Path) -> None:
    assert 'role="alert"' not in write_report(run_dir).read_text(encoding="utf-8")
    rates = "gate_init: 0.15\nthreshold: 0.1\ngate_lr: 0.5\npenalty: 1.0\n"
    (run_dir / "config.yaml").write_text("method: selective\n" + rates)
    html = changed(run_dir, active=0, penalty=1.0)
    alert = html[html.index('<p class="alert" role="alert">') : html.index('<p class="lead">')]
    assert "This run failed: no block is active: the model is the base model" in alert
    assert "= 1.8 steps to switch a block off, and acted for 28. Set penalty=0.1." in alert
    assert ".alert { color: var(--alert);" in html


def test_no_block_of_another_method_is_no_alarm(run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text("method: full\n")
    assert 'role="alert"' not in changed(run_dir, active=0)


def test_a_run_with_all_blocks_active_says_so_without_alarm(run_dir: Path) -> None:
    html = changed(run_dir, active=18)
    assert "18 of 18 blocks are active. All blocks are active: no gate is below the threshold" in html
    assert 'role="alert"' not in html


@pytest.mark.parametrize(
    "record",
    [{"step": 51, "error": "the loss is nan at step 51"}, {"step": 50, "eval_loss": None, "eval_accuracy": 0.1}],
    ids=["error", "evaluation"],
)
def test_a_run_that_was_not_finite_is_shown_in_red(run_dir: Path, record: dict[str, Any]) -> None:
    html = changed(run_dir, record)
    assert html.index('role="alert"') < html.index('class="lead"')
    assert f"at step {record['step']}. Lower lr or lengthen warmup" in html


def test_a_run_that_was_not_finite_before_its_first_record_gets_a_page_that_says_so(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 3, "error": "the loss is inf at step 3"}\n')
    html = write_report(tmp_path).read_text(encoding="utf-8")
    assert "This run failed: the loss is inf at step 3. Lower lr" in html
    assert '<p class="lead">3 steps.</p>' in html
    assert "Over the run" not in html


def with_gates(run_dir: Path, steps: int = 5) -> None:
    (run_dir / "config.yaml").write_text("method: selective\nthreshold: 0.1\n")
    lines = []
    for step in range(1, steps + 1):
        gates = {
            name: [0.15 + (0.01 if on else -0.06) * step / steps for on in blocks] for name, blocks in TIMM.items()
        }
        lines.append(json.dumps({"step": step, "loss": 1.0, "active": 6, "blocks": 18, "gates": gates}))
    (run_dir / "metrics.jsonl").write_text("\n".join(lines) + "\n")


def test_the_page_shows_every_gate_where_the_run_recorded_them(run_dir: Path) -> None:
    plain = write_report(run_dir).read_text(encoding="utf-8")
    assert "gates end" not in plain
    with_gates(run_dir)
    html = write_report(run_dir).read_text(encoding="utf-8")
    assert "6 of 18 gates end at or above the threshold" in html
    assert len(re.findall(r'<g id="f\d+-gate"', html)) == 18
    (run_dir / "config.yaml").unlink()
    assert "18 gates from 0.09 to 0.16 at the end" in write_report(run_dir).read_text(encoding="utf-8")


def test_blocks_that_were_off_from_the_first_step_are_not_drawn_as_active_before_it(run_dir: Path) -> None:
    with_gates(run_dir)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    shared = {"method": "selective", "threshold": 0.1, "gate_init": 0.15, "budget": 6}
    assert [record["active"] for record in run_page._from_start(records, shared)] == [18] + [6] * 5
    assert run_page._from_start(records, shared | {"strategy": "random"}) == records
    (run_dir / "config.yaml").write_text("method: selective\nstrategy: random\nbudget: 6\n")
    assert "selective, random: " in write_report(run_dir).read_text(encoding="utf-8")


def test_records_from_before_gates_were_recorded_are_left_out(run_dir: Path) -> None:
    with_gates(run_dir)
    path = run_dir / "metrics.jsonl"
    path.write_text('{"step": 0, "loss": 1.0, "active": 18, "blocks": 18}\n' + path.read_text())
    assert "6 of 18 gates end" in write_report(run_dir).read_text(encoding="utf-8")


def test_the_page_of_a_long_run_stays_small(run_dir: Path) -> None:
    with_gates(run_dir, 1000)
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    figure = run_page._gates(records, 0.1)[0].figure
    lines = [line for line in figure.axes[0].lines if line.get_gid() == "gate"]
    assert all(200 <= len(line.get_xdata()) <= 400 and line.get_xdata()[-1] == 1000 for line in lines)


@pytest.mark.parametrize("depth", [6, 24])
def test_gates_that_end_active_are_told_from_the_others(depth: int) -> None:
    gates = {f"blocks.{i}.{name}": [[0.15, 0.2 if i == 0 else 0.05]] for i in range(depth) for name in ("fc1", "fc2")}
    axes = gate_curves([0, 10], gates, 0.1, "title").axes[0]
    lines = {True: [], False: []}
    for line in axes.lines:
        if line.get_gid() == "gate":
            lines[line.get_ydata()[-1] >= 0.1].append(line)
    assert {on: len(some) for on, some in lines.items()} == {True: 2, False: 2 * depth - 2}
    assert all(line.get_alpha() == 1.0 for line in lines[True])
    assert all(line.get_alpha() < 0.6 and line.get_linewidth() < 1 for line in lines[False])
    assert len({line.get_color() for line in lines[True]}) == 2, "a colour for each kind of layer"
    assert sum(line.get_marker() == "o" for line in axes.lines) == 2
    assert any(set(line.get_ydata()) == {0.1} for line in axes.lines), "the threshold"
    (legend,) = axes.figure.legends
    assert [text.get_text() for text in legend.get_texts()] == ["fc1", "fc2", "threshold 0.1"]


def test_kinds_beyond_the_colours_differ_in_dashes() -> None:
    gates = {f"blocks.0.layer_{name}": [[0.2]] for name in "abcdefgh"}
    lines = [line for line in gate_curves([1], gates, None, "title").axes[0].lines if line.get_gid() == "gate"]
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 8


@pytest.mark.parametrize(("steps", "gates"), [([], {"a": [[]]}), ([1], {})], ids=["no step", "no gate"])
def test_no_gates_are_refused(steps: list[int], gates: dict[str, list[list[float]]]) -> None:
    with pytest.raises(ValueError, match="no gates to draw"):
        gate_curves(steps, gates, 0.1, "title")


def test_the_block_map_writes_ranks_into_the_cells_of_active_blocks() -> None:
    axes = block_map([{"blocks.0.qkv": [2, 0, 11]}], "title", numbers=True).axes[0]
    assert sorted(text.get_text() for text in axes.texts if text.get_text().isdigit()) == ["11", "2"]


def test_the_page_of_a_rank_wise_run_counts_its_ranks(run_dir: Path) -> None:
    path = run_dir / "adapter" / "selective.json"
    content = json.loads(path.read_text())
    content["layers"]["blocks.1.attn.qkv"]["ranks"] = [8, 1, 3]
    path.write_text(json.dumps(content))
    assert "6 of 18 blocks are active (33 %), with 36 ranks" in write_report(run_dir).read_text(encoding="utf-8")
    content["layers"]["blocks.1.attn.qkv"]["ranks"] = [9, 1, 3]
    path.write_text(json.dumps(content))
    with pytest.raises(CheckpointError, match=r"'blocks.1.attn.qkv' is damaged \(ranks=\[9, 1, 3\], but r=8"):
        write_report(run_dir)
