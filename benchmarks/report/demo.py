"""The demo's table in the project's README. It needs what `slora demo` needs, so no case imports it."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from typing import Any

from benchmarks.report.tables import table
from slora.demo.run import aims


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
                _mean_and_spread([run["seconds"] for run in runs]),
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
    about = demo["environment"]
    machine = f"{about['processor']} ({about['threads']} threads), slora {about['slora']}, torch {about['torch']}"
    note = (
        f"{before}Mean and standard deviation over {seeds} seeds, from `docs/demo.json`: {machine}. "
        "The aims that were set:"
    )
    return "\n\n".join([table(heads, rows), note, "\n".join(f"* {sentence}" for sentence in aims(demo))])


def mean(runs: Sequence[dict[str, Any]], key: str) -> float:
    """Mean of one figure over runs."""
    return statistics.fmean(run[key] for run in runs)


def _mean_and_spread(values: Sequence[float]) -> str:
    spread = statistics.stdev(values) if len(values) > 1 else 0.0
    return f"{statistics.fmean(values):.2f} ± {spread:.2f}"
