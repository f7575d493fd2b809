"""Fill the marked tables of README.md from JSON that runs wrote: `python -m benchmarks.readme`.

    <!-- demo-table -->        docs/demo.json, written by `slora demo`
    <!-- train-step-table -->  results/cpu/train_step.json, written by `python -m benchmarks.train_step`

A table whose file is missing says "not measured".
"""

from __future__ import annotations

import json
import re
import statistics
from collections.abc import Callable, Sequence
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


def train_step_table(result: dict[str, Any]) -> str:
    """One row per contender: seconds at each precision, and as a ratio to PEFT on all layers."""
    precisions = list(result["results"])
    rows = []
    for name in result["results"][precisions[0]]:
        cells = [name]
        for precision in precisions:
            entries = result["results"][precision]
            median = entries[name]["seconds"]["median"]
            cells.append(f"{median:.2f} s ({median / entries['PEFT, all']['seconds']['median']:.2f})")
        memory = result["results"][precisions[0]][name].get("peak_memory_mib")
        rows.append([*cells, "not measured" if memory is None else f"{memory:,.0f} MiB"])
    environment, settings = result["environment"], result["settings"]
    packages = environment["packages"]
    note = (
        f"One training step of {settings['model']}, batch {settings['batch']}, r = {settings['r']}; in parentheses the "
        f"ratio to PEFT {packages['peft']} on all layers, in the same process. {environment['device']}, "
        f"torch {packages['torch']}. Peak memory is of the whole process, {precisions[0]}."
    )
    return note + "\n\n" + table(["", *precisions, "peak memory"], rows)


def table(heads: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table."""
    return "\n".join("| " + " | ".join(row) + " |" for row in [heads, ["---"] * len(heads), *rows])


def filled(readme: str, root: Path = ROOT) -> str:
    """Return the text of the README with every marked table made anew from the files under `root`."""
    sources: dict[str, tuple[Path, Callable[[dict[str, Any]], str]]] = {
        "demo-table": (root / "docs" / "demo.json", demo_table),
        "train-step-table": (root / "benchmarks" / "results" / "cpu" / "train_step.json", train_step_table),
    }
    for name, (path, make) in sources.items():
        text = make(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else NOT_MEASURED
        pattern = rf"(<!-- {name} -->\n).*?(<!-- /{name} -->)"
        readme, count = re.subn(pattern, lambda match, text=text: f"{match[1]}{text}\n{match[2]}", readme, flags=re.S)
        if count != 1:
            raise SystemExit(f"README.md has {count} tables marked {name}; expected one")
    return readme


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
