"""What wins where: told by a rule from the lines of a table, so that a program can check the paragraph."""

from __future__ import annotations

import math
from collections.abc import Sequence
from statistics import fmean, stdev
from typing import Literal

from benchmarks.selection.lines import Line
from benchmarks.selection.rows import STRATEGIES, percent

Verdict = Literal["better", "worse", "not told apart", "too few seeds"]
Judged = dict[Verdict, list[Line]]
# Two seeds have no spread to speak of.
FEWEST = 3


def standard_error(values: Sequence[float]) -> float:
    """The standard error of a mean."""
    return stdev(values) / math.sqrt(len(values))


def verdict(line: Line, measure: str = "over") -> Verdict:
    """What a line is to scaled LoRA: "over" in target, "over nll" in NLL, of which less is better."""
    values = line.values.get(measure, [])
    return _verdict(values if measure == "over" else [-value for value in values])


def _verdict(differences: Sequence[float]) -> Verdict:
    """Whether the mean of paired differences is off zero by more than two standard errors."""
    if len(differences) < FEWEST:
        return "too few seeds"
    mean, error = fmean(differences), standard_error(differences)
    return "better" if mean > 2 * error else "worse" if mean < -2 * error else "not told apart"


def compared(lines: Sequence[Line], measure: str = "over") -> Judged:
    """Return the lines that have a difference from scaled LoRA, by verdict, the best first."""
    found: Judged = {"better": [], "worse": [], "not told apart": [], "too few seeds": []}
    sign = -1 if measure == "over" else 1
    for line in sorted(_with(lines, measure), key=lambda line: sign * fmean(line.values[measure])):
        found[verdict(line, measure)].append(line)
    return found


def best_fixed(lines: Sequence[Line], share: float) -> Line | None:
    """Return the fixed rule (random, last or first) of a share that is furthest above scaled LoRA."""
    fixed = [line for line in _with(lines, "over") if line.row.share == share and not _chooses(line)]
    return max(fixed, key=lambda line: fmean(line.values["over"]), default=None)


def against_fixed(lines: Sequence[Line], share: float) -> Judged:
    """Return the strategies of a share by what they are to the best fixed rule, paired over their common seeds."""
    rule = best_fixed(lines, share)
    found: Judged = {"better": [], "worse": [], "not told apart": [], "too few seeds": []}
    for line in _with(lines, "over") if rule else ():
        if line.row.share == share and _chooses(line):
            assert rule is not None
            found[_verdict(paired(line, rule))].append(line)
    return found


def paired(line: Line, other: Line) -> list[float]:
    """The difference of two lines in points over scaled LoRA, one per common seed."""
    theirs = dict(zip(other.seeds, other.values["over"], strict=True))
    return [own - theirs[seed] for seed, own in zip(line.seeds, line.values["over"], strict=True) if seed in theirs]


def paragraph(lines: Sequence[Line]) -> str:
    """Return what wins in a table, with every number as the table has it."""
    by_target, by_nll = compared(lines), compared(lines, "over nll")
    told = [line for name in ("better", "worse", "not told apart") for line in by_target[name]]
    if not told:
        return f"Too few seeds to tell what wins: {FEWEST} are needed."
    worse = by_target["worse"]
    extremes = f", from {_named(worse[:1], 'over')} to {_named(worse[-1:], 'over')}" if len(worse) > 1 else ""
    said = [
        f"Of {len(told)} rows {len(by_target['better'])} have more of the target than scaled LoRA at equal retention, "
        f"by more than two standard errors: {_named(by_target['better'], 'over')}.",
        f"{len(worse)} have less{extremes}.",
        f"{len(by_target['not told apart'])} are not told apart from it.",
        f"A lower NLL have {len(by_nll['better'])}: {_named(by_nll['better'], 'over nll', '+.3f')}.",
    ]
    for share in sorted({line.row.share for line in told if line.row.share is not None}):
        rule, found = best_fixed(lines, share), against_fixed(lines, share)
        if rule is not None and any(found[name] for name in ("better", "worse", "not told apart")):
            better = ", ".join(f"{line.label} ({fmean(paired(line, rule)):+.2f})" for line in found["better"])
            worse_than = ", ".join(line.label for line in found["worse"])
            said.append(
                f"At {percent(share)}, better than the best fixed rule ({rule.label}): {better or 'none'}; worse: "
                f"{worse_than or 'none'}."
            )
    return " ".join(said)


def _named(lines: Sequence[Line], measure: str, form: str = "+.2f") -> str:
    return (
        ", ".join(
            f"{line.label} {percent(line.row.share or 0.0)} ({fmean(line.values[measure]):{form}} ± "
            f"{standard_error(line.values[measure]):{form[1:]}})"
            for line in lines
        )
        or "none"
    )


def _with(lines: Sequence[Line], measure: str) -> list[Line]:
    return [line for line in lines if line.values.get(measure)]


def _chooses(line: Line) -> bool:
    return line.row.strategy not in STRATEGIES or STRATEGIES[line.row.strategy].chooses
