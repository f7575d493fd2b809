"""Gates trained by a rule that is not theirs: noticed before the first step, explained, once per model."""

from __future__ import annotations

import copy
import gc
import re
import warnings
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim.lr_scheduler import CosineAnnealingLR, LambdaLR, OneCycleLR

import slora
from slora.gates import optimizer_rules
from slora.gates.values import gates
from slora.layers import optimizer_hook
from tests.gates.gated_models import step

Make = Callable[[nn.Module], torch.optim.Optimizer]


class Lion(torch.optim.Optimizer):
    """Stands for any optimizer that slora has never heard of."""

    def __init__(self, params: Any, lr: float = 1e-3) -> None:
        super().__init__(params, {"lr": lr, "betas": (0.9, 0.99)})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.sub_(group["lr"] * p.grad.sign())


class Wrapper(torch.optim.Optimizer):
    """Holds the optimizer that does the work, as ZeroRedundancyOptimizer does."""

    def __init__(self, inner: torch.optim.Optimizer) -> None:
        super().__init__(inner.param_groups, {})
        self.optim = inner

    def step(self, closure: Any = None) -> None:
        self.optim.step()


def own(model: nn.Module, **settings: Any) -> list[dict[str, Any]]:
    """The groups of `parameter_groups` under names of someone else, with `settings` in that of the gates."""
    return [
        {**group, "name": f"group {i}", **(settings if group["name"] == "gates" else {})}
        for i, group in enumerate(slora.parameter_groups(model))
    ]


WRONG: dict[str, tuple[Make, str]] = {
    "AdamW": (lambda m: torch.optim.AdamW(m.parameters()), r"AdamW moves every gate by about lr=0.001 .* 50 for"),
    "Adam": (lambda m: torch.optim.Adam(m.parameters(), lr=1e-2), r"Adam moves every gate by about lr=0.01 .* 5 for"),
    "NAdam": (lambda m: torch.optim.NAdam(m.parameters()), "NAdam moves every gate by about lr=0.002"),
    "RMSprop": (lambda m: torch.optim.RMSprop(m.parameters()), "RMSprop moves every gate by about lr"),
    "a subclass": (lambda m: type("Mine", (torch.optim.AdamW,), {})(m.parameters()), "Mine moves every gate by about"),
    "capturable": (
        lambda m: torch.optim.AdamW(gates(m), lr=torch.tensor(1e-3), foreach=False), "AdamW moves every gate by about"
    ),
    "gates alone": (lambda m: torch.optim.AdamW(gates(m), lr=1e-2), "AdamW moves every gate by about lr"),
    "small eps": (lambda m: torch.optim.AdamW(own(m, eps=1e-8)), "AdamW moves every gate by about lr=0.01"),
    "SGD momentum": (
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9), "momentum 0.9 in SGD .* the last 10 steps"
    ),
    "Adam momentum": (lambda m: torch.optim.AdamW(own(m, betas=(0.9, 0.0))), r"momentum 0.9 in AdamW"),
    "weight decay": (
        lambda m: torch.optim.SGD(m.parameters(), lr=0.1, weight_decay=5e-4), r"weight_decay=0.0005 in SGD pulls"
    ),
    "own decay": (lambda m: torch.optim.AdamW(own(m, weight_decay=0.1)), r"weight_decay=0.1 in AdamW pulls"),
    "unknown": (lambda m: Lion(m.parameters()), "does not know the rule by which Lion moves gates"),
    "unknown with groups": (lambda m: Lion(slora.parameter_groups(m)), "does not know the rule by which Lion"),
    "Rprop": (lambda m: torch.optim.Rprop(slora.parameter_groups(m)), "does not know the rule by which Rprop"),
    "wrapped": (lambda m: Wrapper(torch.optim.AdamW(m.parameters())), "^AdamW moves every gate"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_a_rule_that_cannot_select_is_named_at_the_first_step_and_only_then(name: str, model: nn.Module) -> None:
    make, pattern = WRONG[name]
    optimizer = make(model)
    (text,) = step(model, optimizer)
    assert re.search(pattern, text), text
    assert "slora.selection.Budget(model, blocks, steps=...)" in text
    assert "slora.parameter_groups(model, lr=..., gate_lr=" in text
    assert step(model, optimizer) == []
    assert step(model, make(model)) == [], "one warning per model"


RIGHT: dict[str, Make] = {
    "AdamW": lambda m: torch.optim.AdamW(slora.parameter_groups(m, weight_decay=0.1), weight_decay=0.5),
    "Adam fused": lambda m: torch.optim.Adam(slora.parameter_groups(m), fused=True),
    "NAdam": lambda m: torch.optim.NAdam(slora.parameter_groups(m)),
    "RMSprop": lambda m: torch.optim.RMSprop(slora.parameter_groups(m), momentum=0.9),
    "SGD": lambda m: torch.optim.SGD(slora.parameter_groups(m), lr=0.1, momentum=0.9),
    "other names": lambda m: torch.optim.AdamW(own(m)),
    "plain SGD": lambda m: torch.optim.SGD(m.parameters(), lr=0.1),
    "ProximalGates": lambda m: slora.ProximalGates(gates(m), lr=0.1, penalty=1.0),
    "no gates": lambda m: Lion(slora.parameter_groups(m, gate_lr=None)),
    "wrapped": lambda m: Wrapper(torch.optim.AdamW(slora.parameter_groups(m))),
}


@pytest.mark.parametrize("name", RIGHT)
def test_a_rule_of_the_gates_own_is_left_in_peace(name: str, model: nn.Module) -> None:
    optimizer = RIGHT[name](model)
    assert [step(model, optimizer) for _ in range(3)] == [[], [], []]


def test_gates_that_a_strategy_holds_are_left_in_peace_until_they_move(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in gates(model):
        parameter.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error", slora.GateRuleWarning)
        for _ in range(2):
            model(torch.randn(3, 6)).sum().backward()
            optimizer.step()
        for parameter in gates(model):
            parameter.requires_grad_(True)
            parameter.grad = None
        optimizer.step()
    assert len(step(model, optimizer)) == 1


def test_of_two_optimizers_only_the_one_with_gates_is_asked(model: nn.Module) -> None:
    weights = torch.optim.AdamW(slora.parameter_groups(model, gate_lr=None), weight_decay=0.1)
    assert step(model, weights, slora.ProximalGates(gates(model))) == []
    assert len(step(model, weights, torch.optim.Adam(gates(model)))) == 1


def test_every_model_gets_a_warning_of_its_own(model: nn.Module) -> None:
    twin = copy.deepcopy(model)
    both = torch.optim.AdamW([*model.parameters(), *twin.parameters()])
    assert len(step(model, both)) == 1
    assert len(step(twin, both)) == 1
    assert step(model, both) == step(twin, both) == []
    assert len(step(copy.deepcopy(model), torch.optim.AdamW(model.parameters()))) == 0
    again = copy.deepcopy(model)
    assert len(step(again, torch.optim.AdamW(again.parameters()))) == 1


def test_groups_added_later_are_seen(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(slora.parameter_groups(model, gate_lr=None))
    assert step(model, optimizer) == []
    optimizer.add_param_group({"params": gates(model)})
    assert len(step(model, optimizer)) == 1


def test_a_schedule_that_scales_the_rate_of_the_gates_is_noticed_once_it_does(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(slora.parameter_groups(model))
    schedule = CosineAnnealingLR(optimizer, 4)
    assert step(model, optimizer) == []
    schedule.step()
    (text,) = step(model, optimizer)
    assert "a schedule has changed the rate of the gates in AdamW from 0.01 to 0.00854" in text
    assert "LambdaLR" in text
    assert "ProximalGates" in text
    schedule.step()
    assert step(model, optimizer) == []


def test_a_schedule_that_leaves_the_gates_alone_is_fine(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(slora.parameter_groups(model))
    factors = [(lambda _: 1.0) if group["name"] == "gates" else (lambda n: 0.5**n) for group in optimizer.param_groups]
    schedule = LambdaLR(optimizer, factors)
    for _ in range(3):
        assert step(model, optimizer) == []
        schedule.step()
    assert optimizer.param_groups[0]["lr"] < 2e-4
    assert optimizer.param_groups[-1]["lr"] == 1e-2


def test_a_schedule_beside_proximal_gates_is_fine(model: nn.Module) -> None:
    weights, own = torch.optim.AdamW(slora.parameter_groups(model, gate_lr=None)), slora.ProximalGates(gates(model))
    schedules = [CosineAnnealingLR(weights, 4), CosineAnnealingLR(own, 4)]
    for _ in range(3):
        assert step(model, weights, own) == []
        for schedule in schedules:
            schedule.step()


def test_a_schedule_that_cycles_momentum_is_noticed(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(slora.parameter_groups(model))
    OneCycleLR(optimizer, max_lr=0.1, total_steps=10)
    (text,) = step(model, optimizer)
    assert "momentum 0.95 in AdamW" in text


def test_the_first_step_of_a_warm_up_tells_the_rate_to_come(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    LambdaLR(optimizer, lambda n: n / 10)
    (text,) = step(model, optimizer)
    assert "lr=0.001 per step" in text


def test_after_the_first_step_a_right_group_is_read_and_a_wrong_one_not_even_that(
    model: nn.Module, monkeypatch: pytest.MonkeyPatch
) -> None:
    searched: list[Any] = []
    read: list[Any] = []
    find, rule_problem = optimizer_hook.find_gates, optimizer_rules.rule_problem
    monkeypatch.setattr(optimizer_hook, "find_gates", lambda groups: searched.append(groups) or find(groups))
    monkeypatch.setattr(optimizer_rules, "rule_problem", lambda *given: read.append(given) or rule_problem(*given))
    for make, times in ((RIGHT["AdamW"], 4), (WRONG["AdamW"][0], 1)):
        searched.clear()
        read.clear()
        optimizer = make(model)
        for _ in range(4):
            step(model, optimizer)
        assert len(searched) == 1
        assert len(read) == times, "groups without gates are not read"


def test_a_compiled_step_is_not_asked(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(model.parameters())
    for parameter in gates(model):
        parameter.grad = torch.ones_like(parameter)
    torch._dynamo.reset()
    compiled = torch.compile(optimizer.step, backend="eager")
    with warnings.catch_warnings():
        warnings.simplefilter("error", slora.GateRuleWarning)
        compiled()
        compiled()
    torch._dynamo.reset()


def test_an_optimizer_keeps_no_gates_alive_and_is_not_kept(model: nn.Module) -> None:
    optimizer = torch.optim.AdamW(slora.parameter_groups(model))
    step(model, optimizer)
    assert optimizer in optimizer_hook._gates_in
    alive = weakref.ref(optimizer)
    del optimizer
    gc.collect()
    assert alive() is None


class Adan(Lion):
    def __init__(self, params: Any) -> None:
        torch.optim.Optimizer.__init__(self, params, {"lr": 1e-3, "betas": (0.98, 0.92, 0.99)})


@pytest.mark.parametrize("make", [torch.optim.Adafactor, Adan], ids=["eps", "betas"])
def test_an_optimizer_that_cannot_read_the_group_of_the_gates_steps_by_its_own_settings_and_is_named(
    make: Any, model: nn.Module
) -> None:
    optimizer = make(slora.parameter_groups(model))
    (text,) = step(model, optimizer)
    assert f"does not know the rule by which {make.__name__} moves gates" in text
    (group,) = (group for group in optimizer.param_groups if group["name"] == "gates")
    assert {key: group[key] for key in ("betas", "eps") if key in optimizer.defaults} == {
        key: optimizer.defaults[key] for key in ("betas", "eps") if key in optimizer.defaults
    }
    assert step(model, optimizer) == []
