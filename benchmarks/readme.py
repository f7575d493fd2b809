"""Fill the marked tables of README.md from JSON that runs wrote: `python -m benchmarks.readme`.

    <!-- demo-table -->        docs/demo.json, written by `slora demo`
    <!-- train-step-table -->  results/cpu/train_step.json and train_memory.json, written by
                               `python -m benchmarks.train_step` without and with `--memory`

A table whose file is missing says "not measured".
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from slora.files import write_text

ROOT = Path(__file__).parent.parent
NOT_MEASURED = "Not measured."


def demo_table(demo: dict[str, Any]) -> str:
    """One row per method: mean and standard deviation over seeds."""
    labels = {
        "full": "full fine-tuning",
        "linear": "linear probe",
        "lora": "LoRA on all blocks",
        "selective": "selective",
    }
    rows = []
    for method in dict.fromkeys(run["method"] for run in demo["runs"]):
        runs = [run for run in demo["runs"] if run["method"] == method]
        lost = [100 * (demo["source_before"] - run["source_after"]) for run in runs]
        blocks = f"{mean(runs, 'active'):.1f} of {runs[0]['blocks']}" if runs[0]["blocks"] else "none"
        rows.append(
            [
                labels[method],
                _mean_and_spread([100 * run["target_accuracy"] for run in runs]),
                _mean_and_spread(lost),
                blocks,
                f"{mean(runs, 'trainable'):,.0f}",
                f"{mean(runs, 'flops') / 1e12:.2f}",
                f"{mean(runs, 'seconds'):.1f}",
            ]
        )
    heads = [
        "method",
        "digits, accuracy %",
        "letters, k-NN points lost",
        "active blocks",
        "trained",
        "TFLOP",
        "seconds",
    ]
    seeds = len({run["seed"] for run in demo["runs"]})
    before = f"Letters before fine-tuning: {100 * demo['source_before']:.2f} % (k-NN). "
    return table(heads, rows) + f"\n\n{before}Mean and standard deviation over {seeds} seeds, from `docs/demo.json`."


def train_step_table(result: dict[str, Any], memory: dict[str, Any] | None) -> str:
    """One row per contender: seconds (and their ratio to PEFT on all layers) and peak memory at each precision."""
    precisions = list(result["results"])
    rows = []
    for name in result["results"][precisions[0]]:
        cells = [name]
        for precision in precisions:
            entries = result["results"][precision]
            median = entries[name]["seconds"]["median"]
            cells.append(f"{median:.2f} s ({median / entries['PEFT, all']['seconds']['median']:.2f})")
        for precision in precisions:
            peaks = {} if memory is None else memory["results"].get(precision, {})
            peak = peaks.get(name, {}).get("peak_memory_mib")
            cells.append("not measured" if peak is None else f"{peak:,.0f} MiB")
        rows.append(cells)
    environment, settings = result["environment"], result["settings"]
    packages = environment["packages"]
    note = (
        f"One training step of {settings['model']}, batch {settings['batch']}, r = {settings['r']}; in parentheses the "
        f"ratio to PEFT {packages['peft']} on all layers, in the same process. {environment['device']}, "
        f"torch {packages['torch']}. Peak memory is that of a process of its own, libraries included. "
        "'Few' is the attention and MLP output projections of the last two layers; 'frozen, dx everywhere' is the "
        "limit that no low-rank update on all layers can pass."
    )
    return note + "\n\n" + table(["", *precisions, *(f"{precision}, peak" for precision in precisions)], rows)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


def filled(readme: str, root: Path = ROOT) -> str:
    """Return the text of the README with every marked table made anew from the files under `root`."""
    results = root / "benchmarks" / "results" / "cpu"
    demo, step, memory = map(
        _read, (root / "docs" / "demo.json", results / "train_step.json", results / "train_memory.json")
    )
    tables = {
        "demo-table": NOT_MEASURED if demo is None else demo_table(demo),
        "train-step-table": NOT_MEASURED if step is None else train_step_table(step, memory),
    }
    for name, text in tables.items():
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        readme, count = re.subn(pattern, lambda match, text=text: f"{match[1]}{text}\n{match[2]}", readme, flags=re.S)
        if count != 1:
            raise SystemExit(f"README.md has {count} tables marked {name}; expected one")
    return readme


def _read(path: Path) -> dict[str, Any] | None:
    content: dict[str, Any] | None = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return content


def mean(runs: Sequence[dict[str, Any]], key: str) -> float:
    """Mean of one figure over runs."""
    return statistics.fmean(run[key] for run in runs)


def _mean_and_spread(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.2f} ± {spread:.2f}"


def main() -> None:
    """Rewrite README.md."""
    path = ROOT / "README.md"
    write_text(path, filled(path.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
