"""The compared configurations: every strategy at three shares of the blocks, and what they have to beat."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.selection.task import Configuration, Task

SHARES = (0.04, 0.11, 0.25)
# Factors of plain LoRA's update: the curve to beat (WiSE-FT, arXiv 2109.01903). Interpolation between few of them would
# lie below the curve.
SCALES = (0.125, 0.25, 0.375, 0.5, 0.625, 0.75, 0.875)
# Of gates: with gate_lr 0.1 in 200 steps, from a few blocks switched off to nearly all.
PENALTIES = (0.0625, 0.125, 0.25, 0.5, 1.0, 2.0)


@dataclass(frozen=True)
class Strategy:
    """A way to choose.

    Attributes:
        label: its name on the page.
        settings: fields of `TrainSettings` beside the budget.
        chooses: whether training or data decide, rather than a fixed rule.
    """

    label: str
    settings: Mapping[str, Any]
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
    "sora": Strategy("SoRA", {"strategy": "sora"}),
    "codyra": Strategy("CoDyRA", {"strategy": "codyra"}),
    "increlora": Strategy("IncreLoRA", {"strategy": "increlora"}),
    "adalora": Strategy("AdaLoRA", {"strategy": "adalora"}),
}


@dataclass(frozen=True)
class Row:
    """A row of a page.

    Attributes:
        strategy: a key of `STRATEGIES` or of `retention.VARIANTS`, or "all" or "linear".
        share: of the blocks (or ranks) that it may keep; None where it has no choice.
        configuration: without what tuning chooses.
        weight: the setting that tuning chooses beside the learning rate, "" for none; `weights` are tried.
    """

    strategy: str
    share: float | None
    label: str
    configuration: Configuration
    weight: str = ""
    weights: tuple[float, ...] = ()

    @property
    def name(self) -> str:
        """The name of the configuration."""
        return self.configuration.name

    def fits(self, task: Task) -> bool:
        """Whether a task has what the row needs: a head to train, or samples to retain."""
        has_head = task.probe or self.configuration.settings.get("method") != "linear"
        return has_head and self.configuration.retain in (None, *task.retains)


# With a budget of 100 % every block-wise strategy is this run: it stands for them, and, scaled, for the curve. (Gates
# has its penalty, and rank-wise strategies train rank gates or factors of another form.)
ALL = Row("all", 1.0, "all (plain LoRA)", Configuration("all", {"method": "lora"}, SCALES))
LINEAR = Row("linear", None, "linear probe", Configuration("linear", {"method": "linear"}))


def rows() -> list[Row]:
    """Return the rows of the strategies, those to beat first."""
    found = [ALL, LINEAR]
    for share in SHARES:
        for name, strategy in STRATEGIES.items():
            gates = name == "gates"
            settings = dict(strategy.settings) | ({} if gates else {"budget": share})
            configuration = Configuration(f"{name} {percent(share)}", settings)
            tuned = ("penalty", PENALTIES) if gates else ("", ())
            found.append(Row(name, share, strategy.label, configuration, *tuned))
    return found


def some(
    rows: Iterable[Row], strategies: Sequence[str] | None = None, shares: Sequence[float] | None = None
) -> list[Row]:
    """Return the rows of some strategies and shares; rows at 100 % are of every share."""
    chosen = [row for row in rows if not shares or row.share in (1.0, None, *shares)]
    return [row for row in chosen if not strategies or row.strategy in strategies]


def configuration_on(configuration: Configuration, task: Task) -> Configuration:
    """Return a configuration for a task: without a linear probe the pretrained model begins the curve to beat."""
    if configuration.name == ALL.name and not task.probe:
        return dataclasses.replace(configuration, scales=(0.0, *configuration.scales))
    return configuration


def percent(share: float) -> str:
    """The share in words, such as "11 %"."""
    return f"{100 * share:g} %"
