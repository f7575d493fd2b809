"""Why a run ended with no block active, or with all, and what to change."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from slora.config import GATES_PHASES, phase_ends
from slora.models.summary import verdict
from slora.runs.settings import ALWAYS_ACTIVE
from slora.runs.strategies import asked_of

Records = Sequence[Mapping[str, Any]]

_SETTINGS = ("gate_init", "threshold", "gate_lr", "penalty")

_NO_RETURN = "Under inactive='frozen' no block comes back: try inactive='probe'. Or: "


def explained(active: int, blocks: int, settings: Mapping[str, Any], records: Records) -> str:
    """Return, for a run that ended with no block active or with all, what that means, the likely cause and the remedy.

    Empty for other runs and for methods without gates. With a budget it only says that this was asked for.

    Args:
        active: active blocks at the end, of `blocks`.
        settings: those of `config.yaml`; without them, or without records, no cause is given.
        records: those of `metrics.jsonl`.
    """
    asked = asked_of(settings)
    what, remedy = verdict(active, blocks, asked)
    # In an adapter only the threshold tells "lora" from "selective".
    selects = settings.get("method", "selective") == "selective" and settings.get("threshold", 0.0) > ALWAYS_ACTIVE
    if not what or not selects:
        return ""
    if asked:
        return f"{what} {remedy}".strip()
    if not records or not settings.keys() >= set(_SETTINGS):
        return f"{what} {remedy}"
    gate_init, threshold, gate_lr, penalty = (float(settings[name]) for name in _SETTINGS)
    acted = penalty_steps(settings, records)
    if not gate_lr * penalty * acted:
        return f"{what} gate_lr={gate_lr:g} and penalty={penalty:g} acted for {acted} steps. {remedy}"
    needed = (gate_init - threshold) * blocks / (gate_lr * penalty)
    shown = f"{needed:,.0f}" if needed >= 10 else f"{needed:.2g}"
    why = (
        f"The penalty alone takes (gate_init - threshold) * blocks / (gate_lr * penalty) = {shown} steps to switch a "
        f"block off, and acted for {acted:,}"
    )
    # The remedy aims at half of the steps: enough to switch blocks off, but not all before the task can keep some.
    factor = 2 * needed / acted
    if active and needed > acted:
        remedy = f"Train longer, or set gate_lr={_one_digit(gate_lr * factor, up=True)}."
    elif active:
        why, remedy = f"{why}: the task keeps every gate above the threshold", "Raise penalty."
    elif needed > acted:
        why, remedy = (
            f"{why}: the task itself lowered the gates, or the learning rates are too high",
            "Lower lr or gate_lr.",
        )
    else:
        remedy = f"Set penalty={_one_digit(penalty * factor, up=False)}." if factor < 1 else "Lower penalty."
        remedy += " Or end the selection earlier (settling)."
        if settings.get("inactive") == "frozen":
            remedy = _NO_RETURN + remedy
    return f"{what} {why}. {remedy}"


def penalty_steps(settings: Mapping[str, Any], records: Records) -> int:
    """Return for how many steps of a finished run the penalty acted."""
    steps = max((int(record["step"]) for record in records), default=0)
    if not steps or not settings["penalty"]:
        return 0
    warmup, settling = (
        default if settings.get(name) is None else float(settings[name])
        for name, default in zip(("selection_warmup", "settling"), GATES_PHASES, strict=True)
    )
    first, last = phase_ends(steps, warmup, settling)
    return last - first


def _one_digit(value: float, up: bool) -> str:
    """A positive number with one digit, rounded up or down so that it differs from the present value."""
    unit = 10.0 ** math.floor(math.log10(value))
    return f"{(math.ceil if up else math.floor)(round(value / unit, 6)) * unit:.1g}"


def not_finite(records: Records) -> str:
    """Return what was not finite in a run and at which step; empty if everything was finite."""
    for record in records:
        if "error" in record:
            return str(record["error"])
        for key, name in (("loss", "the loss"), ("eval_loss", "the loss on the evaluation data")):
            if key in record and record[key] is None:
                return f"{name} is not finite at step {record['step']}"
    return ""
