"""The table of the stored runs: each variant against plain LoRA scaled to the same forgetting."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np

from benchmarks.retention.variants import BASES, SEEDS, SHIFTS, TUNED_ON, TUNING_SEEDS, VARIANTS
from slora.demo.judge import forgetting, with_spread

Run = Mapping[str, Any]
HEADINGS = (
    "kept by", "weight", "runs", "target %", "NLL", "k-NN lost", "head lost", "target against scaled",
    "NLL against scaled",
)  # fmt: skip
# Fewer paired runs tell nothing about the spread.
FEWEST = 3


def chosen_weight(runs: Sequence[Run], base: str, variant: str) -> float | None:
    """Return the weight with the lowest NLL against scaled LoRA at equal forgetting on validation; None before it ran.

    Without validation runs of `base` those of the first base decide.
    """
    if VARIANTS[variant].weights == (0.0,):
        return 0.0
    for whose in dict.fromkeys((base, BASES[0])):
        tried = [run for run in _of(runs, whose, variant) if run["validation"] and run["shift"] == TUNED_ON]
        scores: dict[float, list[float]] = {}
        for run in tried:
            plain = _plain(runs, run)
            if plain is not None and run["seed"] in TUNING_SEEDS:
                scores.setdefault(run["weight"], []).append(against(run, plain)[1])
        if scores:
            return min(scores, key=lambda weight: fmean(scores[weight]))
    return None


def results(runs: Sequence[Run], base: str, variant: str) -> list[Run]:
    """Return the runs of the table, on test images, with the chosen weight."""
    weight = chosen_weight(runs, base, variant)
    return [
        run
        for run in _of(runs, base, variant)
        if not run["validation"] and run["weight"] == weight and run["shift"] in SHIFTS and run["seed"] in SEEDS
    ]


def against(run: Run, plain: Run) -> tuple[float, float]:
    """Return the differences to plain LoRA, scaled to the same forgetting: points on the target, and NLL in nats.

    Scales are interpolated, which flatters a run between scales that are far apart. A run that forgets less than the
    smallest scale is compared with that.
    """
    curve = sorted((forgetting(point), point["accuracy"], point["nll"]) for point in [*plain["scaled"], plain])
    lost, accuracy, nll = zip(*curve, strict=True)
    at = forgetting(run)
    return 100 * (run["accuracy"] - float(np.interp(at, lost, accuracy))), run["nll"] - float(np.interp(at, lost, nll))


def differences(runs: Sequence[Run], base: str, variant: str) -> list[tuple[float, float]]:
    """Return `against` for each run of the table whose plain run of the same shift and seed is stored."""
    pairs = [(run, _plain(runs, run)) for run in results(runs, base, variant)]
    return [against(run, plain) for run, plain in pairs if plain is not None]


def rows(runs: Sequence[Run], base: str) -> list[list[str]]:
    """Return the cells under `HEADINGS` of the variants that ran with `base`."""
    lines = []
    for variant, entry in VARIANTS.items():
        found = results(runs, base, variant)
        if base not in entry.bases or not found:
            continue
        compared = differences(runs, base, variant) if variant != "none" else []
        lines.append(
            [
                entry.label,
                f"{found[0]['weight']:g}" if entry.weights != (0.0,) else "",
                str(len(found)),
                *(with_spread([100 * run["accuracy"] for run in found], ".2f"),),
                *(with_spread([run[key] for run in found], form) for key, form in (("nll", ".3f"),)),
                *(with_spread([run[key] for run in found], ".2f") for key in ("knn", "head")),
                with_spread([target for target, _ in compared], "+.2f") if compared else "",
                with_spread([nll for _, nll in compared], "+.3f") if compared else "",
            ]
        )
    return lines


def verdict(runs: Sequence[Run], base: str) -> dict[str, list[str]]:
    """Return the variants by what they are to scaled LoRA in NLL: off zero by more than two standard errors, or not."""
    found: dict[str, list[str]] = {"better": [], "not told apart": [], "worse": [], "too few runs": []}
    for variant, entry in VARIANTS.items():
        values = [nll for _, nll in differences(runs, base, variant)]
        if variant == "none" or not values:
            continue
        if len(values) < FEWEST:
            found["too few runs"].append(entry.label)
            continue
        mean, error = fmean(values), stdev(values) / math.sqrt(len(values))
        found["better" if mean < -2 * error else "worse" if mean > 2 * error else "not told apart"].append(entry.label)
    return found


def missing(runs: Sequence[Run], base: str) -> int:
    """Return how many runs of the table are not stored."""
    wanted = sum(base in entry.bases for entry in VARIANTS.values()) * len(SHIFTS) * len(SEEDS)
    return wanted - sum(len(results(runs, base, variant)) for variant in VARIANTS)


def page(runs: Sequence[Run]) -> str:
    """Return the page in Markdown."""
    text = [
        "# What keeps old knowledge",
        "",
        f"The demo's shifts {' and '.join(SHIFTS)}, seeds {SEEDS[0]} to {SEEDS[-1]}: mean and standard deviation over "
        "the runs. The old task are letters: points lost by k-NN on the features and by the original head. The last "
        "two columns compare each run with plain LoRA of the same shift and seed, its update scaled to the same "
        f"forgetting (WiSE-FT). Weights are those with the lowest last column on validation images ({TUNED_ON}, seed "
        f"{TUNING_SEEDS[0]}). Runs: `python -m benchmarks retention`.",
    ]
    for base in BASES:
        found = rows(runs, base)
        if not found:
            continue
        title = {"head-first": "LoRA on all blocks, head first", "selective": "Four selected blocks"}[base]
        text += ["", f"## {title}", "", f"| {' | '.join(HEADINGS)} |", "|---" * len(HEADINGS) + "|"]
        text += [f"| {' | '.join(cells)} |" for cells in found]
        text += [""]
        text += [f"* NLL {what}: {', '.join(names)}." for what, names in verdict(runs, base).items() if names]
        if gone := missing(runs, base):
            text += [f"* {gone} runs are missing."]
    return "\n".join(text) + "\n"


def _of(runs: Sequence[Run], base: str, variant: str) -> list[Run]:
    return [run for run in runs if run["base"] == base and run["variant"] == variant]


def _plain(runs: Sequence[Run], run: Run) -> Run | None:
    """The run of plain LoRA on all blocks to compare with."""
    same = ("shift", "seed", "validation")
    plain = [other for other in _of(runs, BASES[0], "none") if all(other[key] == run[key] for key in same)]
    return plain[0] if plain else None
