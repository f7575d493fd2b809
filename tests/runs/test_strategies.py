"""Which settings a strategy takes, and what is refused before a run begins."""

from __future__ import annotations

from typing import Any, get_args

import pytest

from slora import ConfigError
from slora.runs.strategies import STRATEGIES, StrategyName, described
from slora.training import TrainSettings, make_strategy

pytestmark = pytest.mark.once


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"strategy": "gates", "budget": 4}, "budget=4 has no effect on strategy='gates', which takes none; leave it"),
        ({"strategy": "budget"}, "strategy='budget' needs a budget; add --blocks with a number such as 4 or a share"),
        ({"budget_unit": "flops"}, "budget_unit='flops' needs a budget; add a share such as --blocks 0.1"),
        (
            {"budget": 4, "penalty": 0.5},
            "penalty=0.5 has no effect on strategy='budget'; leave it out, or use strategy=",
        ),
        ({"budget": 4, "gate_lr": 0.5}, "gate_lr=0.5 has no effect on strategy='budget'"),
        (
            {"ranking": "norm"},
            "ranking='norm' has no effect on strategy='gates'; leave it out, or use strategy='budget'",
        ),
        ({"drift_price": 0.5}, "drift_price=0.5 has no effect on strategy='gates'"),
        ({"budget": 4, "ranking": "norm", "depth_price": 1}, "depth_price=1.0 has no effect on ranking='norm'"),
        (
            {"strategy": "gates", "method": "full"},
            "strategy='gates' needs method='selective'; method='full' trains all",
        ),
        ({"budget": 4, "method": "lora"}, "budget=4 needs method='selective'; method='lora' trains all"),
        ({"strategy": "gate"}, "strategy='gate' is unknown; near names are 'gates'"),
        ({"strategy": "random"}, "strategy='random' needs a budget; add --blocks"),
        ({"strategy": "all", "budget": 4}, "budget=4 has no effect on strategy='all', which takes none"),
        ({"strategy": "last", "budget": 4, "settling": 0.5}, "settling=0.5 has no effect on strategy='last'"),
        ({"strategy": "last", "budget": 4, "selection_warmup": 0.1}, "selection_warmup=0.1 has no effect on"),
        ({"strategy": "sensitivity", "budget": 4, "ranking": "norm"}, "ranking='norm' has no effect on strategy='sens"),
        ({"strategy": "sensitivity", "budget": 4, "penalty": 2.0}, "penalty=2.0 has no effect on strategy='sensit"),
        ({"strategy": "random", "budget": 1.5}, "budget=1.5 is a share, so from 0.0 to 1.0"),
        ({"budget": 4, "budget_unit": "parameters"}, "budget=4 counts blocks, but unit='parameters' wants a share"),
    ],
)
def test_conflicting_options_are_refused_by_name(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        TrainSettings(**settings)


def test_a_setting_at_its_default_conflicts_with_nothing() -> None:
    TrainSettings(budget=4, penalty=1.0, gate_lr=1e-2, gate_rule="proximal")
    TrainSettings(ranking="solo", drift_price=None)
    TrainSettings(method="lora", penalty=0.5, ranking="norm")


def test_without_a_name_a_budget_decides_which_strategy_it_is() -> None:
    assert TrainSettings().chosen_strategy == "gates"
    assert TrainSettings(budget=4).chosen_strategy == "budget"
    assert TrainSettings(budget=4, strategy="budget").unit == "blocks"


def test_a_run_says_its_strategy_with_its_budget() -> None:
    assert described({"strategy": None}) == "gates"
    assert described({"strategy": "all"}) == "all"
    assert described({"strategy": "random", "budget": 4}) == "random, 4 blocks"
    assert described({"budget": 0.1, "budget_unit": "flops"}) == "budget, 0.1 of the flops"


def test_every_name_has_its_entry_and_its_factory() -> None:
    assert set(get_args(StrategyName)) == STRATEGIES.keys() == make_strategy.FACTORIES.keys()
