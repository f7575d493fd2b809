"""`First`, `Last`, `Random` and `All` choose before the first step, and only what they chose ever trains."""

from __future__ import annotations

import itertools
import json
import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import slora
from slora import CheckpointError, ConfigError, StateError
from slora.gates.values import gates
from slora.layers import adapted_layers
from slora.selection import All, Budget, First, Last, Random
from slora.selection.strategy import end_strategy
from tests.selection.stepping import Batch, Make, N, count, flags, run

# Of a block of `Net`: r (in + out of the block) parameters, with r = 2; times two of the rows in FLOPs.
PARAMETERS = [2 * (16 + 16), *[2 * (16 + 16)] * 3, 2 * (48 + 16), 2 * (16 + 64)]
ORDERS = {First: list(range(N)), Last: list(range(N))[::-1]}


@pytest.mark.parametrize("kind", [First, Last])
@pytest.mark.parametrize("unit", ["blocks", "parameters", "flops"])
@pytest.mark.parametrize("share", [0.2, 0.3, 0.5, 0.8, 1.0])
def test_blocks_are_taken_in_order_while_they_fit(make: Make, batch: Batch, kind: Any, unit: Any, share: float) -> None:
    model = make()
    kind(model, share, 10, unit=unit, forward=lambda: model(batch[0]))
    costs = [1.0] * N if unit == "blocks" else [float(cost) for cost in PARAMETERS]
    limit = round(share * N) if unit == "blocks" else share * sum(costs)
    expected, spent = [False] * N, 0.0
    for i in ORDERS[kind]:
        if spent + costs[i] <= limit + 1e-9:
            expected[i], spent = True, spent + costs[i]
    assert flags(model) == expected


@pytest.mark.parametrize("budget", range(N + 1))
def test_a_number_of_blocks_is_kept_exactly(make: Make, budget: int) -> None:
    for kind in (First, Last, Random):
        model = make()
        kind(model, budget, 10)
        assert count(model) == budget
    model = make()
    All(model, 10)
    assert flags(model) == [True] * N


def test_a_share_of_the_flops_counts_the_rows_that_a_layer_has(batch: Batch) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(16, 16), nn.Linear(16, 16)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            result: torch.Tensor = self.b(self.a(x).mean(0, keepdim=True))
            return result

    model = slora.inject(Pooled(), slora.SelectiveLoRAConfig(r=2, target_modules=["a", "b"]))
    # `a` has 32 of the 33 rows, so that `b` alone fits a twentieth.
    First(model, 0.05, 10, unit="flops", forward=lambda: model(batch[0]))
    assert torch.cat(list(slora.active_blocks(model).values())).tolist() == [False, True]


def test_only_chosen_blocks_train_from_the_first_step_on(make: Make, batch: Batch) -> None:
    model = make()
    selection = Random(model, 2, 8)
    chosen = flags(model)
    assert run(model, selection, batch, 8) == [2] * 8
    trained = [bool(B.any()) for _, layer in adapted_layers(model) for B in layer.lora_B]
    assert trained == chosen == flags(model)
    assert not any(gate.requires_grad for gate in gates(model))
    selection.finish()
    assert slora.summary(model).asked == "budget=2"


@pytest.mark.parametrize(("n", "k"), [(36, 4), (72, 3), (40, 5)])
def test_few_random_blocks_are_a_sample_of_pythons(n: int, k: int) -> None:
    model = slora.inject(nn.Sequential(*[nn.Linear(4, 4) for _ in range(n)]), slora.SelectiveLoRAConfig(r=1))
    for seed in range(5):
        Random(model, k, 10, seed=seed)
        assert [i for i, on in enumerate(flags(model)) if on] == sorted(
            random.Random(f"blocks {seed}").sample(range(n), k)
        )


def test_a_larger_random_budget_keeps_what_a_smaller_one_keeps(make: Make) -> None:
    kept = []
    for budget in range(N + 1):
        model = make()
        Random(model, budget, 10, seed=3)
        kept.append({i for i, on in enumerate(flags(model)) if on})
    assert all(a < b for a, b in itertools.pairwise(kept))
    drawn = set()
    for seed in range(20):
        model = make()
        Random(model, 2, 10, seed=seed)
        drawn.add(tuple(flags(model)))
    assert len(drawn) > 5


KINDS: list[Callable[[nn.Module, int], Any]] = [
    lambda model, steps: First(model, 2, steps),
    lambda model, steps: Last(model, 0.5, steps, unit="parameters"),
    lambda model, steps: Random(model, 3, steps, seed=7),
    lambda model, steps: All(model, steps),
]


@settings(max_examples=20, deadline=None)
@given(make_strategy=st.sampled_from(KINDS), steps=st.integers(1, 6), at=st.integers(0, 6))
def test_a_resumed_strategy_ends_where_the_uninterrupted_one_ends(make_strategy: Any, steps: int, at: int) -> None:
    def started() -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        layers = [nn.Linear(4, 4 + 2 * (i % 2)) for i in range(N)]
        model = slora.inject(nn.ModuleList(layers), slora.SelectiveLoRAConfig(r=1))
        return model, make_strategy(model, steps)

    model, selection = started()
    for number in range(steps):
        if number == at:
            state = json.loads(json.dumps(selection.state_dict()))
        selection.step()
    selection.finish()
    if at < steps:
        other, resumed = started()
        resumed.load_state_dict(state)
        assert resumed.taken == at
        for _ in range(at, steps):
            resumed.step()
        resumed.finish()
        assert [gate.tolist() for gate in gates(other)] == [gate.tolist() for gate in gates(model)]


def test_a_resumed_strategy_keeps_its_choice_and_does_not_make_it_again(make: Make) -> None:
    first = make()
    selection = Random(first, 2, 10, seed=1)
    selection.step()
    other = make()
    later = Random(other, 2, 10, seed=1, now=False)
    later.order = lambda: pytest.fail("the choice was made again")  # type: ignore[method-assign]
    later.load_state_dict(selection.state_dict())
    later.begin()
    later.step()
    assert flags(other) == flags(first)
    with pytest.raises(ConfigError, match="has seed=1, this Random seed=2; resume with the first"):
        Random(make(), 2, 10, seed=2).load_state_dict(selection.state_dict())
    with pytest.raises(ConfigError, match="has strategy='budget', this Last strategy='last'"):
        Last(make(), 2, 10).load_state_dict(Budget(make(), 2, 10).state_dict())


@pytest.mark.parametrize(
    ("key", "value"),
    [("ranks", [0] * N), ("left", 3), ("left", None), ("begun", False), ("begun", None), ("last", 1), ("rows", [])],
)
def test_a_state_that_cannot_be_is_refused_by_name(make: Make, key: str, value: Any) -> None:
    state = Last(make(), 2, 10).state_dict()
    model = make()
    selection = Last(model, 2, 10)
    with pytest.raises(CheckpointError, match=f"damaged: '{key}' is"):
        selection.load_state_dict(state | {key: value})
    assert count(model) == 2


def test_a_choice_can_wait_until_the_head_is_trained(make: Make) -> None:
    model = make()
    selection = Last(model, 2, 10, now=False)
    assert count(model) == N
    assert "not made yet: begin() of Last makes it" in selection.unfinished()
    for call in (selection.step, selection.finish):
        with pytest.raises(StateError, match=r"a Last that has not chosen yet; call begin\(\)"):
            call()
    selection.begin()
    assert count(model) == 2
    assert selection.unfinished() == ""
    selection.step()


def test_a_choice_that_is_never_made_leaves_the_gates_as_they_were(make: Make) -> None:
    model = make()
    slora.keep_blocks(model, 3, ranking=lambda model: torch.arange(6.0))
    first = gates(model)[0].requires_grad_()
    before = [gate.tolist() for gate in gates(model)]
    Last(model, 2, 10, now=False)
    assert count(model) == N
    assert not first.requires_grad
    end_strategy(model)
    assert [gate.tolist() for gate in gates(model)] == before
    assert [gate.requires_grad for gate in gates(model)] == [True] + [False] * 3


def test_a_choice_that_something_undoes_is_restored_at_the_end(make: Make) -> None:
    model = make()
    selection = First(model, 2, 1)
    selection.step()
    with torch.no_grad():
        for gate in gates(model):
            gate.fill_(1.0)
    assert "since First made its choice: 6 blocks are active, 2 were chosen" in selection.unfinished()
    selection.finish()
    assert flags(model) == [True, True] + [False] * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 7}, "budget=7 blocks is out of range; use 0 to 6, the number of blocks"),
        ({"budget": 0.01}, "budget=0.01 of 6 blocks rounds to none"),
        ({"budget": 0.01, "unit": "parameters"}, "less than the smallest block takes; the smallest share that keeps"),
        ({"budget": 0.5, "unit": "flops"}, "unit='flops' needs the input rows of each layer; pass forward=lambda"),
        ({"budget": 0.5, "unit": "flops", "forward": 3}, "forward=3 is not a function; write lambda: model"),
        ({"budget": 2, "unit": "ranks?"}, "unit='ranks\\?' is unknown"),
        ({"budget": 2, "steps": 0}, "steps=0 is not a number of optimizer steps"),
    ],
)
def test_wrong_arguments_are_refused_and_change_nothing(make: Make, arguments: dict[str, Any], message: str) -> None:
    model = make()
    before = [gate.tolist() for gate in gates(model)]
    with pytest.raises(ConfigError, match=message):
        Last(model, **{"steps": 10, **arguments})
    assert [gate.tolist() for gate in gates(model)] == before
    with pytest.raises(ConfigError, match="seed='a' is not a seed"):
        Random(model, 2, 10, seed="a")  # type: ignore[arg-type]


def test_a_share_of_the_flops_needs_a_layer_that_runs(make: Make) -> None:
    with pytest.raises(StateError, match=r"forward\(\) ran no adapted layer"):
        Last(make(), 0.5, 10, unit="flops", forward=lambda: None)


def test_the_choice_does_not_begin_inside_another_strategy(make: Make) -> None:
    model = make()
    Budget(model, 2, 10)
    with pytest.raises(StateError, match="Budget is active on this model"):
        Last(model, 2, 10)
