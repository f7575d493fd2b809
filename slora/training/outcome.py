"""What became of the blocks of a run, and why: for a run that ends with none of them active, or with all."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from typing import Any

from slora.model import verdict
from slora.training.settings import ALWAYS_ACTIVE

Records = Sequence[Mapping[str, Any]]

_SETTINGS = ("gate_init", "threshold", "gate_lr", "penalty")


def explained(active: int, blocks: int, settings: Mapping[str, Any], records: Records) -> str:
    """Return what a run without an active block, or with all, has made of its model, the likely cause and the remedy.

    Empty for other runs and for methods without gates. For a budget, which leaves what was asked for, it says that.

    Args:
        active: active blocks at the end, of `blocks`.
        settings: those of `config.yaml`; without them, or without records, the cause is left out.
        records: those of `metrics.jsonl`.
    """
    asked = settings.get("asked") or ("" if settings.get("budget") is None else f"budget={settings['budget']}")
    what, remedy = verdict(active, blocks, str(asked))
    # An adapter tells its method by the threshold alone.
    selects = settings.get("method", "selective") == "selective" and settings.get("threshold", 0.0) > ALWAYS_ACTIVE
    if not what or not selects:
        return ""
    if asked:
        return f"{what} {remedy}".strip()
    if not records or not settings.keys() >= set(_SETTINGS):
        return f"{what} {remedy}"
    gate_init, threshold, gate_lr, penalty = (float(settings[name]) for name in _SETTINGS)
    acted = penalty_steps(records)
    if not gate_lr * penalty * acted:
        return f"{what} gate_lr={gate_lr:g} and penalty={penalty:g} acted for {acted} steps. {remedy}"
    needed = (gate_init - threshold) * blocks / (gate_lr * penalty)
    shown = f"{needed:,.0f}" if needed >= 10 else f"{needed:.2g}"
    why = (
        f"The penalty alone takes (gate_init - threshold) * blocks / (gate_lr * penalty) = {shown} steps to switch a "
        f"block off, and acted for {acted:,}"
    )
    # The remedy makes it half of the steps: time to switch blocks off, and some left for the others to resist.
    factor = 2 * needed / acted
    if active and needed > acted:
        remedy = f"Train longer, or set gate_lr={gate_lr * factor:.1g}."
    elif active:
        why, remedy = f"{why}: the task holds every gate up", "Raise penalty."
    elif needed > acted:
        why, remedy = f"{why}: the task itself took the gates down, or steps too long", "Lower lr or gate_lr."
    else:
        remedy = f"Set penalty={penalty * factor:.1g}." if factor < 1 else "Lower penalty."
        remedy += " Or end the selection earlier (settling)."
    return f"{what} {why}. {remedy}"


def penalty_steps(records: Records) -> int:
    """Return for how many steps the penalty acted."""
    steps = [{"step": 0}, *(record for record in records if record.get("loss") is not None)]
    return sum(int(b["step"]) - int(a["step"]) for a, b in pairwise(steps) if b.get("penalty"))


def not_finite(records: Records) -> str:
    """Return what was not finite in a run and at which step; empty where everything was."""
    for record in records:
        if "error" in record:
            return str(record["error"])
        for key, name in (("loss", "the loss"), ("eval_loss", "the loss on the evaluation data")):
            if key in record and record[key] is None:
                return f"{name} is not finite at step {record['step']}"
    return ""
