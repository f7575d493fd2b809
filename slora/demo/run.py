"""`slora demo`: four ways of adapting the letter reader to handwritten digits, side by side.

Each method starts from the same pretrained weights and sees the same number of batches. Afterwards its features are
asked what they still know about letters, by weighted k-NN, which needs no head.
"""

from __future__ import annotations

import platform
import tempfile
import time
import webbrowser
from collections.abc import Iterable, Mapping, Sequence
from importlib.metadata import version
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, cast

import torch
from rich.console import Console
from rich.live import Live
from rich.table import Table as LiveTable
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import slora
from slora.demo.digits import digits
from slora.demo.letters import letters
from slora.demo.model import load_pretrained
from slora.errors import CheckpointError, ConfigError
from slora.evaluation.knn import features, knn_accuracy
from slora.files import write_json
from slora.gate import adapted_layers
from slora.model import active_blocks
from slora.report.page import Picture, Section, Table, write_page
from slora.report.plots import Line, bars, block_map, curves, save_png, target_against_retention
from slora.training import TrainSettings, prepare, train

# What all methods share: the same number of the same batches under the same schedule.
COMMON: dict[str, Any] = {
    "max_steps": 200,
    "batch_size": 64,
    "warmup": 0.1,
    "weight_decay": 0.0,
    "label_smoothing": 0.1,
    "eval_every": 0,
    "log_every": 5,
    "device": "cpu",
    "precision": "fp32",
}

# What differs. Chosen by four-fold cross-validation, twice, on the training digits with seeds that the demo does not
# use; the test digits took no part. Every method: what reads most digits; of two that read as many, what forgets less.
# full, linear: learning rates of 3e-4 to 3e-2. lora: learning rates of 2e-3 to 1e-2 and weight decays of 0 to 1; with a
# weight decay of 0.5 (and no label smoothing) it read 0.2 % less and lost 0.8 points of letters in place of 1.5.
# selective, of what leaves at most a quarter of the blocks active: learning rate (5e-3 to 1.5e-2), weight decay (0 to
# 2), penalty (0.12 to 0.6), the share of the steps in which gates move (0.3 to 1), r and lora_alpha (8 and 16).
RECIPES: dict[str, dict[str, Any]] = {
    "full": {"lr": 1e-3},
    "linear": {"lr": 1e-2},
    "lora": {"lr": 5e-3, "r": 8, "lora_alpha": 8},
    "selective": {
        "lr": 1e-2, "weight_decay": 0.6, "r": 8, "lora_alpha": 8,
        "gate_lr": 0.5, "penalty": 0.15, "selection": 0.5, "inactive": "exact",
    },
}  # fmt: skip

# `slora demo --quick`: shows that everything works; its figures mean nothing.
QUICK: dict[str, Any] = {"max_steps": 10, "batch_size": 32, "log_every": 2}

LABELS = {"full": "full", "linear": "linear probe", "lora": "LoRA", "selective": "selective"}

# Letters that pretraining never saw: (images per class, seed) of those that vote and of those to be named.
BANK, QUERIES = (50, 101), (40, 102)
QUICK_BANK, QUICK_QUERIES = (6, 101), (3, 102)
NEIGHBOURS, TEMPERATURE = 20, 0.07

# The aims of the selective method, set against LoRA on all blocks.
TARGET_POINTS, ACTIVE_SHARE, LOSS_SHARE = 1.0, 0.25, 0.5

# Columns of the table after the method; the last but two is left out where the terminal is narrow.
HEADINGS = (
    "target\naccuracy %", "source\nk-NN %", "points\nlost", "active\nblocks", "trainable\nparams", "params\nkept",
    "train\nTFLOP", "train\nseconds",
)  # fmt: skip
KEPT = HEADINGS.index("params\nkept") + 1

FORMAT = 1

Sets = tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]
Result = dict[str, Any]


def main(out: Path, seeds: int = 3, quick: bool = False, open_report: bool = False) -> None:
    """Run the demo, print its table, and write `demo.json`, `report.html`, `blocks.png` and `scatter.png`.

    Ctrl-C stops at once, writes nothing and exits with status 130.

    Args:
        out: folder for the files; made where it is missing.
        seeds: trainings per method, with seeds 0, 1, ...
        quick: a few steps only, to see that everything works.
        open_report: show the report in a browser.

    Raises:
        ConfigError: `seeds` is below 1.
        CheckpointError: `out` cannot be written, or the pretrained weights are missing.
    """
    if seeds < 1:
        raise ConfigError(f"seeds={seeds} trains nothing; use 1 or more")
    out = Path(out)
    _require_writable(out)
    console = Console()
    if not console.is_terminal:
        # The width of a pipe is unknown, and a table cut short is of no use in a log.
        console.width = max(console.width, 100)
    try:
        result = _run_all(console, seeds, quick)
    except KeyboardInterrupt:
        console.print("stopped; nothing was written")
        raise SystemExit(130) from None
    write_json(out / "demo.json", result)
    report = write_report(result, out)
    for sentence in aims(result):
        console.print(sentence, highlight=False, soft_wrap=True)
    if quick:
        console.print("This was a quick run: it shows that everything works, its figures mean nothing.")
    console.print(f"Report: {report}", soft_wrap=True, highlight=False)
    if open_report:
        webbrowser.open(report.resolve().as_uri())


def _run_all(console: Console, seeds: int, quick: bool) -> Result:
    """Train everything under a table that grows, and return what `demo.json` holds."""
    source = (letters(*(QUICK_BANK if quick else BANK)), letters(*(QUICK_QUERIES if quick else QUERIES)))
    result: Result = {
        "format": FORMAT,
        "quick": quick,
        "settings": {method: settings_of(method, quick=quick).to_dict() for method in RECIPES},
        "environment": _environment(),
        "source_before": source_accuracy(pretrained(), source),
        "runs": [],
    }
    order = [(method, seed) for seed in range(seeds) for method in RECIPES]
    start = time.monotonic()
    with Live(console=console, auto_refresh=False, transient=True) as live:
        for i, (method, seed) in enumerate(order):
            left = f", about {(time.monotonic() - start) * (len(order) / i - 1):.0f} s left" if i else ""
            caption = f"training {i + 1} of {len(order)}: {LABELS[method]}, seed {seed}{left}"
            if console.is_terminal:
                live.update(_live_table(result, console.width, caption), refresh=True)
            else:
                console.print(caption, highlight=False)
            result["runs"].append(run_method(method, seed, source, quick))
    console.print(_live_table(result, console.width))
    return result


def _live_table(result: Result, width: int, caption: str | None = None) -> LiveTable:
    wide = width >= 95
    table = LiveTable(
        box=None, padding=(0, 2 if wide else 1, 0, 0), header_style="bold", caption=caption, caption_justify="left"
    )
    for column, heading in enumerate(("\nmethod", *HEADINGS)):
        if wide or column != KEPT:
            table.add_column(heading, justify="right" if column else "left", no_wrap=True)
    rows = {row[0]: row for row in cells(result)}
    for label in LABELS.values():
        row = rows.get(label, [label, *["…"] * len(HEADINGS)])
        table.add_row(*(cell for column, cell in enumerate(row) if wide or column != KEPT))
    return table


def settings_of(method: str, seed: int = 0, quick: bool = False) -> TrainSettings:
    """Return the settings of one run."""
    own = {"method": method, "seed": seed}
    return TrainSettings.from_dict(COMMON | RECIPES[method] | (QUICK if quick else {}) | own)


def run_method(method: str, seed: int, source: Sets, quick: bool = False) -> Result:
    """Train once and return the run's entry of `demo.json`.

    `target_accuracy` and `source_after` are from 0 to 1, `trainable` counts the parameters that get gradients, and
    `kept` those that make up the result: without inactive blocks and gates. `flops` are those of all training steps,
    `seconds` their time without evaluations.
    """
    settings = settings_of(method, seed, quick)
    torch.manual_seed(seed)
    model = prepare(pretrained(), settings=settings)
    trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
    in_head = trainable - _in_blocks(model)
    training, test = digits(seed)
    outcome = train(model, TensorDataset(*training), TensorDataset(*test), settings)
    live = {name: on.tolist() for name, on in active_blocks(model).items()}
    return {
        "method": method,
        "seed": seed,
        "target_accuracy": outcome.accuracy,
        "source_after": source_accuracy(model, source),
        "active": sum(map(sum, live.values())),
        "blocks": sum(map(len, live.values())),
        "trainable": trainable,
        "kept": in_head + _in_active_blocks(model),
        "flops": outcome.flops,
        "seconds": outcome.seconds,
        "block_map": live,
        "history": [
            {"step": r["step"], "loss": r["loss"], "accuracy": r["accuracy"], "active": r.get("active")}
            for r in outcome.history
            if "loss" in r
        ],
    }


def pretrained() -> nn.Module:
    """Return the letter reader with a head of zeros for the ten digits."""
    model: Any = load_pretrained(10)
    for block in model.blocks:
        # On a CPU and 17 tokens the explicit softmax trains a quarter faster than the fused attention.
        block.attn.fused_attn = False
    return cast(nn.Module, model)


def source_accuracy(model: nn.Module, source: Sets) -> float:
    """Return the k-NN accuracy of the model's features on letters, 0 to 1; `source` is (bank, queries)."""
    bank, queries = (features(model, DataLoader(TensorDataset(*images), 512)) for images in source)
    return knn_accuracy(*bank, *queries, k=(NEIGHBOURS,), temperature=TEMPERATURE)[NEIGHBOURS]


def cells(result: Result) -> list[list[str]]:
    """Return the table's figures, one row per method: means over seeds, with standard deviations.

    Columns: method, target accuracy (%), source k-NN before -> after (%), points lost, active blocks, trainable
    parameters, parameters kept, training TFLOP, training seconds.
    """
    rows = []
    before = result["source_before"]
    for method, runs in by_method(result).items():
        active = _mean(runs, "active")
        rows.append([
            LABELS[method],
            _spread([100 * run["target_accuracy"] for run in runs]),
            f"{100 * before:.1f} → {100 * _mean(runs, 'source_after'):.1f}",
            _spread([100 * (before - run["source_after"]) for run in runs]),
            f"{active:.3g}/{runs[0]['blocks']}" if runs[0]["blocks"] else "none",
            f"{_mean(runs, 'trainable'):,.0f}",
            f"{_mean(runs, 'kept'):,.0f}",
            f"{_mean(runs, 'flops') / 1e12:.2f}",
            f"{_mean(runs, 'seconds'):.1f}",
        ])  # fmt: skip
    return rows


def aims(result: Result) -> list[str]:
    """Return one sentence for each of the three aims of the selective method: met or missed, with the figures."""
    runs = by_method(result)
    target = {method: 100 * _mean(runs[method], "target_accuracy") for method in ("lora", "selective")}
    lost = {
        method: 100 * (result["source_before"] - _mean(runs[method], "source_after"))
        for method in ("lora", "selective")
    }
    blocks = runs["selective"][0]["blocks"]
    active = [run["active"] for run in runs["selective"]]
    share = fmean(active) / blocks
    behind = target["lora"] - target["selective"]
    order = "below" if behind >= 0 else "above"
    kept = (
        f"{fmean(active):.3g} of {blocks} blocks active, {100 * share:.0f} % ({min(active)} to {max(active)} by seed)"
    )
    return [
        f"Target within {TARGET_POINTS:g} point of LoRA: {_verdict(behind <= TARGET_POINTS)}. Selective reaches "
        f"{target['selective']:.1f} %, {abs(behind):.1f} points {order} LoRA's {target['lora']:.1f} %.",
        f"At most a quarter of the blocks active: {_verdict(share <= ACTIVE_SHARE)}. Selective ends with {kept}.",
        f"At most half of LoRA's loss on the source: {_verdict(lost['selective'] <= LOSS_SHARE * lost['lora'])}. "
        f"Selective loses {lost['selective']:.1f} points of k-NN accuracy on letters, LoRA {lost['lora']:.1f}.",
    ]


def write_report(result: Result, out: Path) -> Path:
    """Write `report.html`, `blocks.png` and `scatter.png` into `out` and return the path of the page.

    Raises:
        CheckpointError: a file cannot be written; names it and the cause.
    """
    runs = by_method(result)
    blocks, scatter = _block_map(runs["selective"]), _scatter(runs, result["source_before"])
    save_png(blocks.figure, out / "blocks.png")
    save_png(scatter.figure, out / "scatter.png")
    environment = result["environment"]
    seeds = len(runs["selective"])
    lead = (
        f"A small vision transformer that reads rendered letters is fine-tuned on handwritten digits by four methods, "
        f"{seeds} {'seeds' if seeds > 1 else 'seed'} each. How much it still knows about letters is measured by "
        f"k-NN on its features: {100 * result['source_before']:.1f} % before fine-tuning."
    )
    if result["quick"]:
        lead += " This was a quick run: it shows that everything works, its figures mean nothing."
    columns = ["method", *(" ".join(heading.split()) for heading in HEADINGS)]
    note = (
        "Means over seeds ± standard deviation. Target: accuracy on the test digits. Source: weighted k-NN "
        f"(k = {NEIGHBOURS}, temperature {TEMPERATURE}) on letters that pretraining never saw. Kept: trainable "
        "parameters without those of blocks that are inactive at the end."
    )
    sections = [
        Section("What came out", points=aims(result), table=Table(columns, cells(result), note)),
        Section("Target, retention and blocks", pictures=[scatter, blocks]),
        Section("What it cost", pictures=_costs(runs, result["source_before"])),
        Section("Over the run", pictures=_curves(runs)),
        Section("Settings", table=_settings_table(result["settings"]), folded=True),
    ]
    footer = " · ".join(f"{name} {value}" for name, value in environment.items() if name != "slora")
    return write_page(out / "report.html", "Fine-tuning without forgetting: the demo", lead, sections, footer)


def by_method(result: Result) -> dict[str, list[Result]]:
    """Return the runs of each method that has any, in the order of `RECIPES`."""
    runs = {method: [run for run in result["runs"] if run["method"] == method] for method in RECIPES}
    return {method: of_method for method, of_method in runs.items() if of_method}


def _scatter(runs: Mapping[str, Sequence[Result]], before: float) -> Picture:
    points = {
        method: [(run["source_after"], run["target_accuracy"]) for run in of_method]
        for method, of_method in runs.items()
    }
    lost = {method: 100 * (before - _mean(runs[method], "source_after")) for method in ("selective", "lora")}
    reached = {method: 100 * _mean(runs[method], "target_accuracy") for method in lost}
    title = (
        f"Selective loses {lost['selective']:.1f} points of letters and reads {reached['selective']:.1f} % of digits; "
        f"LoRA loses {lost['lora']:.1f} and reads {reached['lora']:.1f} %"
    )
    caption = "Up is better at the new task, right remembers more. Small marks: single seeds; bars: standard deviation."
    return Picture(target_against_retention(points, before, title, LABELS), f"Scatter plot. {title}.", caption)


def _block_map(runs: Sequence[Result]) -> Picture:
    maps = [run["block_map"] for run in runs]
    blocks, active = runs[0]["blocks"], [run["active"] for run in runs]
    always = sum(all(run[name][i] for run in maps) for name in maps[0] for i in range(len(maps[0][name])))
    title = f"Selective keeps {fmean(active):.3g} of {blocks} blocks"
    if len(runs) > 1:
        title += f" on average, {always} of them with every seed"
    caption = "One cell per LoRA block. The number in a cell: with how many seeds the block is active at the end."
    return Picture(block_map(maps, title), f"Map of layers by projections. {title}.", caption)


def _costs(runs: Mapping[str, Sequence[Result]], before: float) -> list[Picture]:
    def values(key: str, scale: float = 1.0, offset: float = 0.0) -> dict[str, list[float]]:
        return {method: [offset + scale * run[key] for run in of_method] for method, of_method in runs.items()}

    def against(drawn: Mapping[str, Sequence[float]]) -> str:
        ratio = fmean(drawn["selective"]) / fmean(drawn["lora"])
        return f"{100 * ratio:.0f} % of LoRA's"

    lost = values("source_after", -100, 100 * before)
    kept, flops, seconds = values("kept", 1e-3), values("flops", 1e-12), values("seconds")
    panels = (
        (lost, f"Points of letters lost: selective {fmean(lost['selective']):.1f}, LoRA {fmean(lost['lora']):.1f}",
         "k-NN accuracy on letters lost (points)", "{:.1f}"),
        (kept, f"Selective keeps {against(kept)} parameters", "parameters kept (thousands)", "{:.1f}"),
        (flops, f"Selective trains with {against(flops)} FLOP", "training, forward and backward (TFLOP)", "{:.2f}"),
        (seconds, f"Selective trains in {against(seconds)} time", "training time (s)", "{:.1f}"),
    )  # fmt: skip
    return [Picture(bars(v, title, xlabel, LABELS, form), f"{title}. Bars.") for v, title, xlabel, form in panels]


def _curves(runs: Mapping[str, Sequence[Result]]) -> list[Picture]:
    def lines(key: str, methods: Iterable[str]) -> dict[str, list[Line]]:
        return {
            method: [([r["step"] for r in run["history"]], [r[key] for r in run["history"]]) for run in runs[method]]
            for method in methods
        }

    loss, active = lines("loss", runs), lines("active", ("lora", "selective"))
    ends = {method: fmean(y[-1] for _, y in drawn) for method, drawn in loss.items()}
    least = "Training loss at the end: " + ", ".join(f"{LABELS[method]} {ends[method]:.2g}" for method in ends)
    off = _mean(runs["selective"], "blocks") - _mean(runs["selective"], "active")
    fewer = f"Selective switches off {off:.3g} of {runs['selective'][0]['blocks']} blocks"
    return [
        Picture(curves(loss, least, "cross-entropy (nats)", labels=LABELS, log=True), f"{least}. Curves over steps."),
        Picture(curves(active, fewer, "active blocks", labels=LABELS, zero=True), f"{fewer}. Curves over steps."),
    ]


def _settings_table(settings: Mapping[str, Mapping[str, Any]]) -> Table:
    names = dict.fromkeys([*COMMON, *(name for recipe in RECIPES.values() for name in recipe)])
    rows = [
        [name, *(str(settings[method][name]) if name in COMMON | RECIPES[method] else "" for method in settings)]
        for name in names
    ]
    return Table(
        ["setting", *(LABELS[method] for method in settings)], rows, "All else: the defaults of TrainSettings."
    )


def _in_blocks(model: nn.Module) -> int:
    """Trainable parameters of the adapter: LoRA matrices and gates."""
    parameters = [p for _, layer in adapted_layers(model) for p in (layer.lora_A, layer.lora_B, layer.gate)]
    return sum(p.numel() for p in parameters if p.requires_grad)


def _in_active_blocks(model: nn.Module) -> int:
    """Parameters of the LoRA matrices of active blocks."""
    counts = {layer: len(layer.activity().active) for _, layer in adapted_layers(model)}
    return sum(n * (layer.lora_A[0].numel() + layer.lora_B[0].numel()) for layer, n in counts.items() if n)


def _environment() -> dict[str, Any]:
    packages = ("torch", "timm", "scikit-learn")
    return {
        "slora": slora.__version__,
        **{name: version(name) for name in packages},
        "python": platform.python_version(),
        "processor": _processor(),
        "threads": torch.get_num_threads(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _require_writable(out: Path) -> None:
    # Found out now rather than after the trainings.
    try:
        out.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=out):
            pass
    except OSError as error:
        raise CheckpointError(f"{out} cannot be written ({error.strerror}); choose another folder") from error


def _mean(runs: Sequence[Result], key: str) -> float:
    return fmean(run[key] for run in runs)


def _spread(values: Sequence[float]) -> str:
    # Rounding may leave a minus before a zero.
    mean = f"{fmean(values):.1f}".replace("-0.0", "0.0")
    return f"{mean} ± {stdev(values):.1f}" if len(values) > 1 else mean


def _verdict(met: bool) -> str:
    return "met" if met else "missed"
