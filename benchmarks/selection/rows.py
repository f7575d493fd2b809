"""The compared configurations: every strategy at three shares of the blocks, and what they have to beat."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.selection.task import Configuration

SHARES = (0.04, 0.11, 0.25)
# Factors of plain LoRA's update: the curve to beat (WiSE-FT, arXiv 2109.01903).
SCALES = (0.25, 0.5, 0.75)


@dataclass(frozen=True)
class Strategy:
    """A way to choose.

    Attributes:
        label: its name on the page.
        settings: fields of `TrainSettings` beside the budget.
        of: what a share is of: "blocks" or "ranks".
        chooses: whether training or data decide, rather than a fixed rule.
    """

    label: str
    settings: Mapping[str, Any]
    of: str = "blocks"
    chooses: bool = True


STRATEGIES: dict[str, Strategy] = {
    # The paper's method has no budget: `tuning` chooses the penalty that ends nearest to a share.
    "gates": Strategy("gates", {"strategy": "gates", "gate_lr": 0.1}),
    "budget-solo": Strategy("budget, solo gain", {"strategy": "budget", "ranking": "solo"}),
    "budget-norm": Strategy("budget, norm", {"strategy": "budget", "ranking": "norm"}),
    "sensitivity": Strategy("sensitivity", {"strategy": "sensitivity"}),
    "random": Strategy("random", {"strategy": "random"}, chooses=False),
    "last": Strategy("last", {"strategy": "last"}, chooses=False),
    "first": Strategy("first", {"strategy": "first"}, chooses=False),
    "sora": Strategy("SoRA", {"strategy": "sora"}, "ranks"),
    "codyra": Strategy("CoDyRA", {"strategy": "codyra"}, "ranks"),
    "increlora": Strategy("IncreLoRA", {"strategy": "increlora"}, "ranks"),
    "adalora": Strategy("AdaLoRA", {"strategy": "adalora"}, "ranks"),
}


@dataclass(frozen=True)
class Row:
    """A row of the page.

    Attributes:
        strategy: a key of `STRATEGIES`, or "all" or "linear".
        share: of the blocks (or ranks) that it may keep; None where it has no choice.
        configuration: without what tuning chooses.
    """

    strategy: str
    share: float | None
    label: str
    configuration: Configuration

    @property
    def name(self) -> str:
        """The name of the configuration."""
        return self.configuration.name


# At 100 % every strategy trains all blocks: one run stands for all of them, and, scaled, for the curve.
ALL = Row("all", 1.0, "all (plain LoRA)", Configuration("all", {"method": "lora"}, SCALES))
LINEAR = Row("linear", None, "linear probe", Configuration("linear", {"method": "linear"}))


def rows(strategies: Sequence[str] | None = None, shares: Sequence[float] | None = None) -> list[Row]:
    """Return the rows, those to beat first; `strategies` and `shares` leave only some, and those to beat."""
    chosen = [ALL, LINEAR]
    for share in SHARES:
        for name, strategy in STRATEGIES.items():
            budget = {} if name == "gates" else {"budget": share}
            configuration = Configuration(f"{name} {percent(share)}", dict(strategy.settings) | budget)
            chosen.append(Row(name, share, strategy.label, configuration))
    chosen = [row for row in chosen if not shares or row.share in (1.0, None, *shares)]
    return [row for row in chosen if not strategies or row.strategy in strategies]


def configurations_on(configurations: Sequence[Configuration], probe: bool) -> list[Configuration]:
    """Return those that a task can run: without a head to train, the pretrained model stands for the linear probe."""
    if probe:
        return list(configurations)
    return [
        dataclasses.replace(each, scales=(0.0, *each.scales)) if each.name == ALL.name else each
        for each in configurations
        if each.name != LINEAR.name
    ]


def percent(share: float) -> str:
    """The share in words, such as "11 %"."""
    return f"{100 * share:g} %"
