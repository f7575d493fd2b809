"""The compared ways of keeping old knowledge: each with LoRA on all blocks, and with four that are selected."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from benchmarks.selection.rows import ALL, LINEAR, Row, rows
from benchmarks.selection.task import Configuration

# The rows that are trained with each variant.
BASES = {row.name: row for row in rows() if row.name in ("all", "budget-solo 11 %")}
_SELECTED = ("budget-solo 11 %",)
# Without distillation, so that another term alone holds the features.
_ALONE: dict[str, Any] = {"retain_weight": 0.0}
# Selection ranks by gain over drift of the features, not over depth.
_PRICED: dict[str, Any] = {"depth_price": 0.0, "retain_weight": 0.0}


@dataclass(frozen=True)
class Variant:
    """One way of keeping old knowledge.

    Attributes:
        label: its name in the table.
        retain: as in `Configuration`.
        weight: the field of `TrainSettings` that has its weight.
        weights: those to choose from.
        own: further settings.
        bases: the rows that it makes sense for.
    """

    label: str
    retain: str | None
    weight: str
    weights: tuple[float, ...]
    own: Mapping[str, Any] = field(default_factory=dict)
    bases: tuple[str, ...] = tuple(BASES)


VARIANTS: dict[str, Variant] = {
    "distil-old": Variant("distillation, old", "old", "retain_weight", (0.5, 2.0, 8.0)),
    "distil-generic": Variant("distillation, noise", "generic", "retain_weight", (0.5, 2.0, 8.0)),
    "distil-mixed": Variant("distillation, mixed", "mixed", "retain_weight", (0.1, 0.5, 2.0)),
    "distil-target": Variant("distillation, new (LwF)", "target", "retain_weight", (0.1, 0.5, 2.0)),
    "drift-target": Variant("local drift, new", "target", "drift_penalty", (0.01, 0.1, 1.0), _ALONE),
    "drift-old": Variant("local drift, old", "old", "drift_penalty", (0.01, 0.1, 1.0), _ALONE),
    "l2": Variant("L2 to the base", None, "l2_penalty", (0.001, 0.01, 0.1)),
    "ewc-old": Variant("EWC, old", "old", "ewc_penalty", (0.1, 1.0, 10.0), _ALONE),
    "ewc-generic": Variant("EWC, noise", "generic", "ewc_penalty", (0.1, 1.0, 10.0), _ALONE),
    "replay": Variant("replay, old with labels", "labelled", "replay_weight", (0.3, 1.0, 3.0), _ALONE),
    "price-old": Variant(
        "price on drift, old", "old", "drift_price", (0.5, 1.0, 2.0),
        {**_PRICED, "drift_data": "retained"}, _SELECTED,
    ),
    "price-generic": Variant(
        "price on drift, noise", None, "drift_price", (0.5, 1.0, 2.0), _PRICED, _SELECTED
    ),
}  # fmt: skip


def retention_rows() -> list[Row]:
    """Return the rows: those to beat first, and each base before its variants."""
    found = [ALL, LINEAR]
    for base in BASES.values():
        found += [] if base == ALL else [base]
        for name, variant in VARIANTS.items():
            if base.name in variant.bases:
                settings = {**base.configuration.settings, **variant.own}
                configuration = Configuration(f"{base.name} + {name}", settings, retain=variant.retain)
                found.append(Row(name, base.share, variant.label, configuration, variant.weight, variant.weights))
    return found
