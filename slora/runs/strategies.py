"""The strategies that `--strategy` names: which budget each takes, and which other settings. Imports no torch.

What a name stands for is in `slora.selection`; `slora.training.make_strategy` makes it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, NamedTuple

from slora.config import (
    ADALORA_PHASES,
    BUDGET_PHASES,
    CODYRA_PHASES,
    GATES_PHASES,
    INCRELORA_PHASES,
    LEAST_SETTLING,
    SORA_PHASES,
    Unit,
    check_budget,
)
from slora.errors import ConfigError
from slora.io.plain import shown

StrategyName = Literal[
    "gates", "budget", "sora", "codyra", "increlora", "adalora", "sensitivity", "random", "first", "last", "all"
]


class Takes(NamedTuple):
    """What a strategy takes.

    Attributes:
        units: what its budget may count or be a share of, the default first; empty if it takes no budget.
        settings: those of `OWN` that it uses, separated by spaces.
        phases: default shares of the steps (before the first block is switched off, after the choice is final); None if
            it chooses before the first step.
        alone: whether it also runs without the budget that it takes, by its own rule.
    """

    units: tuple[Unit, ...] = ()
    settings: str = ""
    phases: tuple[float, float] | None = None
    alone: bool = False


_BLOCKS: tuple[Unit, ...] = ("blocks", "parameters", "flops")
_RANKS: tuple[Unit, ...] = ("ranks",)
_PHASES = "selection_warmup settling"

STRATEGIES: dict[str, Takes] = {
    "gates": Takes((), f"penalty gate_rule gate_lr {_PHASES}", GATES_PHASES),
    "budget": Takes(_BLOCKS, f"ranking drift_price drift_data depth_price {_PHASES}", BUDGET_PHASES),
    "sora": Takes(_RANKS, _PHASES, SORA_PHASES, alone=True),
    "codyra": Takes(_RANKS, _PHASES, CODYRA_PHASES, alone=True),
    "increlora": Takes(_RANKS, _PHASES, INCRELORA_PHASES),
    "adalora": Takes(_RANKS, _PHASES, ADALORA_PHASES),
    "sensitivity": Takes(_BLOCKS, "depth_price"),
    "random": Takes(_BLOCKS),
    "first": Takes(_BLOCKS),
    "last": Takes(_BLOCKS),
    "all": Takes(),
}

# Settings that only some strategies use. Set to other than its default, such a setting needs one of them.
OWN = tuple(dict.fromkeys(name for takes in STRATEGIES.values() for name in takes.settings.split()))


def strategy_of(settings: Mapping[str, Any]) -> str:
    """Return the name of the strategy of a run of method selective: by default budget with a budget, else gates."""
    named: str | None = settings.get("strategy")
    return named or ("gates" if settings.get("budget") is None else "budget")


def unit_of(settings: Mapping[str, Any]) -> Unit:
    """Return what the budget of a run counts or is a share of: by default the first unit of its strategy."""
    units = STRATEGIES[strategy_of(settings)].units
    asked: Unit | None = settings.get("budget_unit")
    return asked or (units[0] if units else "blocks")


def described(settings: Mapping[str, Any]) -> str:
    """Return the strategy of a run with its budget, such as "random, 0.1 of the parameters"."""
    name, budget = strategy_of(settings), settings.get("budget")
    if budget is None:
        return name
    return f"{name}, {budget}{' of the' if isinstance(budget, float) else ''} {unit_of(settings)}"


def asked_of(settings: Mapping[str, Any]) -> str:
    """Return what a run asks for, as `slora.models.summary.verdict` takes it; empty where the gates decide."""
    if settings.get("asked"):
        return str(settings["asked"])
    name, budget = strategy_of(settings), settings.get("budget")
    ranks = STRATEGIES[name].units == _RANKS
    if budget is None:
        return name if ranks else "strategy all" if name == "all" else ""
    return f"budget={budget}{' ranks' if ranks else ''}"


def chooses_ranks(settings: Mapping[str, Any]) -> bool:
    """Whether single ranks of blocks were chosen in a run, or what an adapter was "asked"."""
    asked = asked_of(settings)
    return asked.endswith(" ranks") or (asked in STRATEGIES and STRATEGIES[asked].units == _RANKS)


def check_strategy(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Check that the strategy of `settings` takes the settings that are given with it.

    Raises:
        ConfigError: names the setting, its value and the remedy.
    """
    method, name, budget = settings["method"], strategy_of(settings), settings["budget"]
    if method != "selective":
        for given in ("strategy", "budget"):
            if settings[given] is not None:
                raise ConfigError(
                    f"{given}={shown(settings[given])} needs method='selective'; method={method!r} trains all of its "
                    f"parameters"
                )
        return
    takes = STRATEGIES[name]
    if budget is not None and not takes.units:
        raise ConfigError(
            f"budget={shown(budget)} has no effect on strategy={name!r}, which takes none; leave it out, or use "
            f"{_one_of(other for other, its in STRATEGIES.items() if its.units)}"
        )
    if budget is None and takes.units and not takes.alone:
        raise ConfigError(
            f"strategy={name!r} needs a budget; add --blocks with a number such as 4 or a share such as 0.1"
        )
    if budget is None and settings["budget_unit"] is not None:
        raise ConfigError(f"budget_unit={settings['budget_unit']!r} needs a budget; add a share such as --blocks 0.1")
    if budget is not None:
        unit = unit_of(settings)
        if unit not in takes.units:
            raise ConfigError(
                f"budget_unit={unit!r} is not of strategy={name!r}; use {', '.join(map(repr, takes.units))}"
            )
        check_budget(budget, unit)
    used = takes.settings.split()
    for own in OWN:
        if own not in used and settings[own] != defaults[own]:
            users = _one_of(other for other, its in STRATEGIES.items() if own in its.settings.split())
            raise ConfigError(
                f"{own}={shown(settings[own])} has no effect on strategy={name!r}; leave it out, or use {users}"
            )
    for price in ("drift_price", "depth_price"):
        if settings["ranking"] == "norm" and settings[price] is not None:
            raise ConfigError(
                f"{price}={shown(settings[price])} has no effect on ranking='norm'; leave it out, or use ranking='solo'"
            )
    if takes.phases is not None:
        _check_phases(settings, takes.phases)


def _check_phases(settings: Mapping[str, Any], default: tuple[float, float]) -> None:
    warmup, settling = settings["selection_warmup"] or 0.0, settings["settling"]
    settling = default[1] if settling is None else settling
    if not LEAST_SETTLING - 1e-9 <= settling <= 1:
        raise ConfigError(
            f"settling={shown(settling)} is out of range; use a share from 1/3 to 1: the remaining blocks train on "
            f"in it"
        )
    if warmup + settling > 1 + 1e-9:
        raise ConfigError(
            f"selection_warmup={warmup:g} and settling={settling:.3g} are longer than the run; lower one of them"
        )


def _one_of(names: Any) -> str:
    *first, last = map(repr, names)
    return f"strategy={', '.join(first)} or {last}" if first else f"strategy={last}"
