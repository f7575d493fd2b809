"""The results of the demo: the table, the aims, and the comparison with fixed rules at equal forgetting."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import fmean, stdev
from typing import Any

import numpy as np

from slora.demo.methods import BUDGET, HALF, METHODS

Result = Mapping[str, Any]
Run = Mapping[str, Any]

# Aim (a): four blocks and a few unlabelled letters against LoRA on all blocks after the same linear probe.
TARGET_POINTS, FORGETTING_SHARE = 1.0, 0.4

# Aim (b): without letters, better than each of these at equal forgetting.
FIXED = {
    "last": "the last 4",
    "random": "4 at random",
    "late-fc1": "fc1 of the last 4 layers",
    "head-first": "all, scaled",
    "rank-16": "all of rank 16, scaled",
}

HEADINGS = ("method", "blocks", "target %", "NLL", "k-NN lost", "head lost", "parameters", "TFLOP", "seconds")
SCALED_LABEL = f"the same, scaled by {HALF:g}"


def forgetting(run: Run) -> float:
    """Points of accuracy lost on letters: the mean of what k-NN on the features and the original head lose."""
    return 0.5 * (float(run["knn"]) + float(run["head"]))


def by_seed(result: Result, method: str, value: Callable[[Run], float], scale: float = 1.0) -> list[float]:
    """Return `value` of the runs of a method, one number per seed: the mean over the shifts."""
    runs = [run for run in result["runs"] if run["method"] == method]
    if scale != 1.0:
        runs = [run | entry for run in runs for entry in run["scaled"] if entry["scale"] == scale]
    seeds = sorted({run["seed"] for run in runs})
    return [fmean(value(run) for run in runs if run["seed"] == seed) for seed in seeds]


def flops(result: Result, method: str) -> float:
    """Return the training FLOPs of a method, the mean over the runs that counted them."""
    return fmean(run["flops"] for run in result["runs"] if run["method"] == method and run["flops"])


def rows(result: Result, shift: str | None = None) -> list[list[str]]:
    """Return the table's cells under `HEADINGS`: mean and standard deviation over seeds, over all shifts or of one."""
    chosen = dict(result)
    if shift is not None:
        chosen["runs"] = [run for run in result["runs"] if run["shift"] == shift]
    lines = []
    for method, entry in METHODS.items():
        if any(run["method"] == method for run in chosen["runs"]):
            lines.append(_row(chosen, method, entry.label))
            if method == "head-first" and any(run["scaled"] for run in chosen["runs"] if run["method"] == method):
                lines.append([*_row(chosen, method, SCALED_LABEL, HALF)[:6], "", "", ""])
    return lines


def _row(result: Result, method: str, label: str, scale: float = 1.0) -> list[str]:
    def mean(key: str) -> float:
        return fmean(by_seed(result, method, lambda run: float(run[key]), scale))

    def spread(key: str, form: str, factor: float = 1.0) -> str:
        return with_spread([factor * v for v in by_seed(result, method, lambda run: float(run[key]), scale)], form)

    return [
        label,
        f"{mean('active'):g}",
        spread("accuracy", ".2f", 100),
        spread("nll", ".3f"),
        spread("knn", ".2f"),
        spread("head", ".2f"),
        f"{mean('kept'):,.0f}",
        f"{flops(result, method) / 1e12:.2f}",
        f"{mean('seconds'):.1f}",
    ]


def with_spread(values: Sequence[float], form: str) -> str:
    """Return the mean of `values` and, of more than one, their standard deviation."""
    # Rounding may give "-0.00".
    mean = format(fmean(values), form)
    mean = mean.removeprefix("-") if not float(mean) else mean
    return f"{mean} ± {stdev(values):{form.lstrip('+')}}" if len(values) > 1 else mean


def aims(result: Result) -> list[str]:
    """Return a sentence for each aim: met or missed, with values paired over seeds."""
    return [_aim_with_letters(result), *_aims_without_letters(result)]


def _aim_with_letters(result: Result) -> str:
    target = [
        100 * (ours - all_)
        for ours, all_ in zip(
            by_seed(result, "selective-distilled", lambda run: float(run["accuracy"])),
            by_seed(result, "head-first", lambda run: float(run["accuracy"])),
            strict=True,
        )
    ]
    lost = {name: fmean(by_seed(result, name, forgetting)) for name in ("selective-distilled", "head-first")}
    within = fmean(target) >= -TARGET_POINTS
    share = lost["selective-distilled"] / lost["head-first"] if lost["head-first"] > 0 else math.inf
    of_its = f" ({100 * share:.0f} %)" if math.isfinite(share) else ""
    met = within and share <= FORGETTING_SHARE
    return (
        f"With 64 unlabelled letters, exactly {BUDGET} blocks: target within {TARGET_POINTS:g} point of LoRA on all, "
        f"and at most {100 * FORGETTING_SHARE:.0f} % of its forgetting: {'met' if met else 'missed'}. "
        f"{with_spread(target, '+.2f')} points on the target, and {lost['selective-distilled']:.2f} points of letters "
        f"lost where LoRA on all loses {lost['head-first']:.2f}{of_its}."
    )


def _aims_without_letters(result: Result) -> list[str]:
    compared = at_equal_forgetting(result)
    if not compared:
        return []
    better = [name for name, values in compared.items() if _clearly_below(values)]
    met = len(better) == len(compared)
    figures = ", ".join(f"{FIXED[name]} {with_spread(values, '+.3f')}" for name, values in compared.items())
    return [
        f"Without letters, {BUDGET} blocks chosen by solo gain: lower NLL than each fixed rule at equal forgetting: "
        f"{'met' if met else 'missed'}. Difference in NLL (negative: selection is better) to {figures}."
    ]


def at_equal_forgetting(result: Result) -> dict[str, list[float]]:
    """Return `{fixed rule: NLL of selective minus that of the rule, one number per seed}`; empty without scaled runs.

    Each method is a curve of NLL over forgetting, from the linear probe over the scaled updates to the whole update,
    each a mean over the shifts. Two curves are compared where the one that forgets less ends.
    """
    ours = [run for run in result["runs"] if run["method"] == "selective"]
    scales = sorted({entry["scale"] for run in ours for entry in run["scaled"]})
    if len(scales) < 2:
        return {}

    def curve(method: str, seed: int) -> list[tuple[float, float]]:
        points = [(0.0, by_seed(result, "linear", lambda run: float(run["nll"]))[seed])]
        for scale in (*scales, 1.0):
            lost = by_seed(result, method, forgetting, scale)[seed]
            points.append((lost, by_seed(result, method, lambda run: float(run["nll"]), scale)[seed]))
        return points

    count = len({run["seed"] for run in result["runs"]})
    differences: dict[str, list[float]] = {name: [] for name in FIXED}
    for seed in range(count):
        selective = curve("selective", seed)
        for name in FIXED:
            fixed = curve(name, seed)
            at = min(max(lost for lost, _ in selective), max(lost for lost, _ in fixed))
            differences[name].append(_read_off(selective, at) - _read_off(fixed, at))
    return differences


def _read_off(curve: Sequence[tuple[float, float]], at: float) -> float:
    """The lowest NLL of a curve at a forgetting of at most `at`, interpolated."""
    ordered = sorted(curve)
    best = np.minimum.accumulate([nll for _, nll in ordered])
    return float(np.interp(at, [lost for lost, _ in ordered], best))


def _clearly_below(values: Sequence[float]) -> bool:
    """Whether the mean is below 0 by more than two standard errors."""
    if len(values) < 2:
        return values[0] < 0
    return fmean(values) + 2 * stdev(values) / math.sqrt(len(values)) < 0
