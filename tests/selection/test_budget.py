"""`Budget`: exactly what was asked for, whatever the length, the unit and the interruptions."""

from __future__ import annotations

import copy
import json
import os
import socket
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import slora
from slora import ConfigError, StateError
from slora.gate import adapted_layers, gates
from slora.selection import Budget, SoloGain, freeze_gates, keep_blocks, update_norm

Make = Callable[..., nn.Module]
Batch = tuple[Tensor, Tensor]
N = 6
NAMES = ["first", "qkv", "qkv", "qkv", "last", "tall"]


def count(model: nn.Module) -> int:
    return sum(int(on.sum()) for on in slora.active_blocks(model).values())


def flags(model: nn.Module) -> list[bool]:
    return torch.cat(list(slora.active_blocks(model).values())).tolist()


def run(model: nn.Module, selection: Any, batch: Batch, steps: int, lr: float = 0.01) -> list[int]:
    """Train and return the number of active blocks after each step."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    counts = []
    for _ in range(steps):
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        optimizer.zero_grad()
        selection.step()
        counts.append(count(model))
    return counts


@pytest.mark.parametrize("budget", [0, 1, 4, N, 0.0, 0.1, 0.5, 1.0])
@pytest.mark.parametrize("steps", [1, 2, 3, 7, 30])
def test_any_run_ends_with_exactly_the_blocks_asked_for(make: Make, batch: Batch, budget: float, steps: int) -> None:
    model = make()
    selection = Budget(model, budget, steps)
    counts = run(model, selection, batch, steps)
    selection.finish()
    expected = {0: 0, 1: 1, 4: 4, N: N} if isinstance(budget, int) else {0.0: 0, 0.1: 1, 0.5: 3, 1.0: N}
    assert counts[-1] == expected[budget]
    assert sorted(counts, reverse=True) == counts


def test_the_cubic_schedule_runs_between_warm_up_and_settling(make: Make, batch: Batch) -> None:
    model = make()
    selection = Budget(model, 1, 30, warmup=0.4, settling=1 / 3)
    counts = run(model, selection, batch, 30)
    # Selection from step 12 to step 20.
    expected = [N] * 11 + [1 + round(5 * (1 - (step - 12) / 8) ** 3) for step in range(12, 21)] + [1] * 10
    assert counts == expected
    assert selection.phase == "settling"


def test_the_blocks_that_stay_go_on_learning_and_the_others_do_not(make: Make, batch: Batch) -> None:
    model = make()
    selection = Budget(model, 2, 30, warmup=0.4, settling=1 / 3)
    run(model, selection, batch, 20)
    before = copy.deepcopy(model.state_dict())
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    optimizer.step()
    selection.step()
    on = flags(model)
    moved = [
        not torch.equal(before[f"{name}.lora_B"][i], layer.lora_B[i])
        for name, layer in adapted_layers(model)
        for i in range(layer.blocks)
    ]
    assert moved == on
    assert all(gate.grad is None and not gate.requires_grad for gate in gates(model))


def test_the_largest_updates_stay(make: Make) -> None:
    model = make(trained=True)
    products = [layer.lora_B[i] @ layer.lora_A[i] for _, layer in adapted_layers(model) for i in range(layer.blocks)]
    norms = torch.stack([layer_product.norm() for layer_product in products]) * (16 / 2)
    torch.testing.assert_close(update_norm(model), norms, rtol=1e-5, atol=1e-6)
    keep_blocks(model, 3)
    best = set(norms.topk(3).indices.tolist())
    assert {i for i, on in enumerate(flags(model)) if on} == best


def test_solo_gains_are_losses_saved_by_one_block_alone(make: Make, batch: Batch) -> None:
    model = make(trained=True).train()
    rank = SoloGain(lambda: F.cross_entropy(model(batch[0]), batch[1]))
    before = [gate.clone() for gate in gates(model)]
    scores = rank(model)
    assert model.training
    assert all(torch.equal(a, b) for a, b in zip(before, gates(model), strict=True))
    with slora.disabled(model):
        base = F.cross_entropy(model(batch[0]), batch[1])
    expected = []
    for number in range(N):
        alone = make(trained=True)
        alone.load_state_dict(model.state_dict())
        with torch.no_grad():
            at = 0
            for _, layer in adapted_layers(alone):
                for i in range(layer.blocks):
                    layer.gate[i] = 1.0 if at == number else -1.0
                    at += 1
        expected.append(base - F.cross_entropy(alone(batch[0]), batch[1]))
    torch.testing.assert_close(scores, torch.stack(expected).detach(), rtol=1e-4, atol=1e-5)


def test_a_price_on_drift_divides_the_gains(make: Make, batch: Batch) -> None:
    model = make(trained=True)
    loss = lambda: F.cross_entropy(model(batch[0]), batch[1])  # noqa: E731
    plain = SoloGain(loss)(model)
    priced = SoloGain(loss, features=lambda: model(batch[0]), price=1.0)(model)
    positive = plain > 0
    assert positive.any()
    assert torch.equal(plain[~positive], priced[~positive])
    ratio = plain[positive] / priced[positive]
    assert (ratio > 0).all()
    assert len(ratio.unique()) == len(ratio)


def test_a_gate_tells_the_rank_of_its_block(make: Make) -> None:
    model = make(trained=True)
    scores = torch.tensor([5.0, 1.0, 6.0, 2.0, 4.0, 3.0])
    keep_blocks(model, 2, ranking=lambda _: scores)
    values = torch.cat([gate.detach() for gate in gates(model)])
    assert torch.equal(values.argsort(descending=True), scores.argsort(descending=True))
    assert (values >= 0.1).tolist() == (scores > 4.5).tolist()


def test_a_score_that_is_not_a_number_ranks_last(make: Make, batch: Batch) -> None:
    model = make()
    selection = Budget(model, 5, 3, ranking=lambda _: torch.tensor([1.0, 2.0, float("nan"), 3.0, 4.0, 5.0]))
    run(model, selection, batch, 3)
    assert flags(model) == [True, True, False, True, True, True]
    json.dumps(selection.state_dict(), allow_nan=False)


@pytest.mark.parametrize("unit", ["parameters", "flops"])
@pytest.mark.parametrize("share", [0.0, 0.2, 0.5, 1.0])
def test_a_share_of_the_cost_is_kept_below_and_filled(make: Make, batch: Batch, unit: Any, share: float) -> None:
    model = make()
    scores = torch.tensor([6.0, 5.0, 4.0, 3.0, 2.0, 1.0])
    selection = Budget(model, share, 9, unit=unit, ranking=lambda _: scores)
    run(model, selection, batch, 9)
    selection.finish()
    # r (K + n) of each block; all layers see the same rows, so FLOPs are proportional to it.
    costs = [2 * (16 + 16), 64, 64, 64, 2 * (48 + 16), 2 * (16 + 64)]
    left, expected = share * sum(costs), []
    for cost in costs:
        expected.append(cost <= left + 1e-9)
        left -= cost * expected[-1]
    assert flags(model) == expected


def test_flops_count_the_rows_that_a_layer_sees(batch: Batch) -> None:
    class Pooled(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.many, self.few, self.head = nn.Linear(16, 16), nn.Linear(16, 16), nn.Linear(16, 5)

        def forward(self, x: Tensor) -> Tensor:
            logits: Tensor = self.head(self.few(self.many(x.unflatten(0, (4, 8))).relu().mean(1)).repeat(8, 1))
            return logits

    model = slora.inject(Pooled(), slora.SelectiveLoRAConfig(r=2))
    selection = Budget(model, 0.2, 6, unit="flops", ranking=lambda _: torch.tensor([2.0, 1.0]))
    run(model, selection, batch, 6)
    # The first sees eight times as many rows: 8 / 9 of the FLOPs, above the share.
    assert selection.rows == [32, 4]
    assert flags(model) == [False, True]


@settings(max_examples=30, deadline=None)
@given(budget=st.integers(0, N) | st.floats(0.1, 1), steps=st.integers(1, 12), at=st.integers(0, 12))
def test_a_resumed_strategy_ends_where_the_uninterrupted_one_ends(budget: float, steps: int, at: int) -> None:
    def started() -> tuple[nn.Module, Budget]:
        torch.manual_seed(0)
        model = slora.inject(nn.Sequential(*[nn.Linear(4, 4) for _ in range(N)]), slora.SelectiveLoRAConfig(r=1))
        return model, Budget(model, budget, steps)

    def step(model: nn.Module, selection: Budget, number: int) -> None:
        with torch.no_grad():
            for i, (_, layer) in enumerate(adapted_layers(model)):
                layer.lora_B.fill_((number * 7 + i * 5) % 11)
        selection.step()

    model, selection = started()
    for number in range(steps):
        if number == at:
            state = json.loads(json.dumps(selection.state_dict()))
        step(model, selection, number)
    other, resumed = started()
    if at < steps:
        resumed.load_state_dict(state)
        for number in range(at, steps):
            step(other, resumed, number)
        assert flags(other) == flags(model)
        assert [gate.tolist() for gate in gates(other)] == [gate.tolist() for gate in gates(model)]


def test_a_run_made_shorter_by_a_resume_gets_its_choice_all_the_same(make: Make, batch: Batch) -> None:
    model = make()
    selection = Budget(model, 2, 100)
    run(model, selection, batch, 20)
    state = selection.state_dict()
    other = make()
    Budget(other, 2, 24).load_state_dict(state)
    assert count(other) == 2


def test_resuming_with_another_budget_is_refused(make: Make) -> None:
    state = Budget(make(), 4, 10).state_dict()
    with pytest.raises(ConfigError, match="has budget=4, this Budget budget=3; resume with the former"):
        Budget(make(), 3, 10).load_state_dict(state)
    with pytest.raises(ConfigError, match="has strategy='budget', this Gates strategy='gates'"):
        slora.selection.Gates(make(), 10).load_state_dict(state)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"budget": 7}, "budget=7 blocks is out of range; use 0 to 6"),
        ({"budget": -1}, "budget=-1 blocks is out of range; use 0 to 6"),
        ({"budget": 1.5}, "budget=1.5 is a share, so from 0.0 to 1.0; for a number of blocks write it without a point"),
        ({"budget": 4.0}, "budget=4.0 is a share.*without a point, such as 4"),
        ({"budget": float("nan")}, "budget=nan is a share"),
        ({"budget": True}, "budget=True is neither a number of blocks, such as 4, nor a share"),
        ({"budget": "4"}, "budget='4' is neither a number of blocks"),
        ({"budget": 0.05}, "budget=0.05 of 6 blocks rounds to none; the smallest share that keeps one is 0.08334"),
        ({"budget": 0.01, "unit": "parameters"}, "smallest share that keeps one is 0.1177"),
        ({"budget": 4, "unit": "parameters"}, "counts blocks, but unit='parameters' wants a share"),
        ({"unit": "bytes"}, "unit='bytes' is unknown; use one of blocks, parameters, flops"),
        ({"steps": 0}, "steps=0 is not a number of optimizer steps"),
        ({"steps": 2.0}, "steps=2.0 is not a number of optimizer steps"),
        ({"warmup": 1.5}, "warmup=1.5 is not a share"),
        ({"settling": 0.2}, "settling=0.2 is not a share from 1/3 to 1"),
        ({"settling": None}, "settling=None is not a share from 1/3 to 1"),
        ({"warmup": "a"}, "warmup='a' is not a share"),
        ({"warmup": 0.5}, "warmup=0.5 and settling=0.6 are more than the run"),
        ({"ranking": "norm"}, "ranking='norm' is not callable"),
    ],
)
def test_bad_input_is_refused_by_name_and_changes_nothing(make: Make, arguments: Any, message: str) -> None:
    model = make(trained=True, gate_init=0.12)
    with pytest.raises(ConfigError, match=message):
        Budget(model, **({"budget": 4, "steps": 10} | arguments))
    assert all(gate.requires_grad and (gate == 0.12).all() for gate in gates(model))
    Budget(model, 4, 10)


def test_the_smallest_share_of_the_error_keeps_a_block(make: Make) -> None:
    for share, unit in ((0.08334, "blocks"), (0.1177, "parameters")):
        model = make(trained=True)
        keep_blocks(model, share, unit=unit)  # type: ignore[arg-type]
        assert count(model) == 1


def test_a_ranking_of_another_shape_is_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match=r"the ranking returned shape \[2\]; expected .* each of 6 blocks"):
        keep_blocks(make(), 2, ranking=lambda _: torch.ones(2))


@pytest.mark.parametrize(("loss", "found"), [(lambda: torch.ones(3), r"a tensor \[3\]"), (lambda: 1.0, "float")])
def test_a_loss_that_is_no_scalar_is_refused_and_the_gates_are_left_as_they_were(
    make: Make, loss: Callable[[], Any], found: str
) -> None:
    model = make()
    with pytest.raises(ConfigError, match=f"the loss of SoloGain returned {found}; it has to be a scalar"):
        keep_blocks(model, 2, ranking=SoloGain(loss))
    assert all((gate == 0.15).all() for gate in gates(model))


def test_finish_before_the_choice_is_refused_with_the_remedy(make: Make, batch: Batch) -> None:
    model = make()
    selection = Budget(model, 2, 30, warmup=0.4, settling=1 / 3)
    for taken in (0, 10):
        run(model, selection, batch, taken)
        with pytest.raises(StateError, match=f"finish\\(\\) after {taken} of 30 steps.*by step 20: call step"):
            selection.finish()
    run(model, selection, batch, 10)
    selection.finish()
    assert count(model) == 2
    with pytest.raises(StateError, match="this Budget is over"):
        selection.step()


def test_a_choice_that_is_not_made_yet_shows_in_the_summary_and_when_it_is_saved(
    make: Make, batch: Batch, tmp_path: Path
) -> None:
    model = make()
    selection = Budget(model, 2, 30, warmup=0.4, settling=1 / 3)
    run(model, selection, batch, 14)
    what = "not made yet: Budget has taken 14 of 30 steps and completes it at step 20"
    assert str(slora.summary(model)).endswith(what)
    with pytest.warns(slora.UnfinishedSelectionWarning, match=rf"holds the 4 blocks that are active now, .*{what}"):
        slora.save_adapter(model, tmp_path)
    run(model, selection, batch, 6)
    assert "not made yet" not in str(slora.summary(model))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        slora.save_adapter(model, tmp_path)


def test_two_strategies_at_once_are_refused(make: Make, batch: Batch) -> None:
    model = make()
    selection = Budget(model, 2, 3)
    with pytest.raises(StateError, match=r"a Budget is at work on this model \(step 0 of 3\); one strategy at a time"):
        slora.selection.Gates(model, 3)
    run(model, selection, batch, 3)
    # The first has made its choice: another may go on from there.
    Budget(model, 1, 3)
    with pytest.raises(StateError, match="this Budget is over"):
        selection.step()
    freeze_gates(model)
    Budget(model, 1, 3)


def test_the_model_keeps_a_strategy_that_nobody_holds(make: Make, batch: Batch) -> None:
    model = make()

    def set_up() -> None:
        Budget(model, 2, 30)

    set_up()
    assert "not made yet: Budget has taken 0 of 30 steps" in str(slora.summary(model))
    with pytest.raises(StateError, match="a Budget is at work"):
        Budget(model, 2, 30)


def test_an_earlier_state_is_noticed_and_the_choice_put_back(make: Make, batch: Batch) -> None:
    model = make()
    selection = Budget(model, 2, 10)
    early = copy.deepcopy(model.state_dict())
    run(model, selection, batch, 10)
    chosen = flags(model)
    model.load_state_dict(early)
    assert count(model) == N
    assert "changed since Budget made its choice: 6 blocks are active, 2 were chosen" in str(slora.summary(model))
    selection.finish()
    assert flags(model) == chosen


@pytest.mark.parametrize("budget", [0, N])
def test_none_and_all_are_said_to_be_asked_for_and_a_loaded_choice_stands(
    make: Make, batch: Batch, budget: int, tmp_path: Path
) -> None:
    model = make()
    run(model, Budget(model, budget, 4), batch, 4)
    assert str(slora.summary(model)).endswith(f"as asked for by budget={budget}.")
    slora.save_adapter(model, tmp_path)
    loaded = slora.load_adapter(make(), tmp_path)
    assert str(slora.summary(loaded)).endswith(f"as asked for by budget={budget}.")
    assert not any(gate.requires_grad for gate in gates(loaded))
    file = tmp_path / "selective.json"
    file.write_text(file.read_text().replace(f"budget={budget}", "budget=few"))
    with pytest.raises(slora.CheckpointError, match=r"selective.json is incomplete or damaged .*budget=few"):
        slora.load_adapter(make(), tmp_path)


def test_a_budget_is_not_blamed_for_what_was_done_after_it(make: Make, batch: Batch) -> None:
    model = make()
    early = copy.deepcopy(model.state_dict())
    selection = Budget(model, 2, 4)
    run(model, selection, batch, 4)
    selection.finish()
    model.load_state_dict(early)
    assert "all blocks are active, though budget=2 was asked for. Something has changed" in str(slora.summary(model))


def test_merging_before_the_choice_warns_and_a_merged_model_is_not_chosen_from(make: Make, batch: Batch) -> None:
    model = make()
    selection = Budget(model, 2, 10, ranking=SoloGain(lambda: F.cross_entropy(model(batch[0]), batch[1])))
    run(model, selection, batch, 2)
    slora.merge(model)
    with pytest.raises(StateError, match=r"is merged, so its blocks cannot be chosen; call slora.unmerge"):
        selection.step()
    with pytest.raises(StateError, match="is merged, so no block can be measured alone"):
        selection.ranking(model)
    slora.unmerge(model)
    with pytest.warns(slora.UnfinishedSelectionWarning, match="the blocks that are active now are merged, but"):
        slora.merge_and_unload(model)


def test_gates_that_cannot_tell_ranks_apart_are_refused() -> None:
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(600)])
    slora.inject(model, slora.SelectiveLoRAConfig(r=1)).bfloat16()
    selection = Budget(model, 21, 1)
    with pytest.raises(StateError, match=r"gates in torch.bfloat16 cannot tell so many ranks apart"):
        selection.step()


def test_numbers_of_numpy_are_numbers(make: Make) -> None:
    assert Budget(make(), np.int64(3), np.int64(30)).state_dict()["budget"] == 3
    selection = Budget(make(), np.float32(0.5), 30)
    assert json.loads(json.dumps(selection.state_dict()))["budget"] == 0.5


def test_a_ranking_of_nothing_but_nan_is_refused(make: Make) -> None:
    with pytest.raises(ConfigError, match="gives no block a number"):
        keep_blocks(make(trained=True), 2, ranking=lambda _: torch.full((N,), float("nan")))


def test_a_model_without_blocks_or_merged_is_refused(make: Make) -> None:
    with pytest.raises(StateError, match=r"no adapted layer; call slora.inject"):
        Budget(nn.Linear(2, 2), 1, 3)
    model = slora.merge(make(trained=True))
    with pytest.raises(StateError, match=r"is merged.*call slora.unmerge"):
        keep_blocks(model, 1)


def test_freed_matrices_are_not_switched_on_again(make: Make) -> None:
    model = make(inactive="frozen")
    with torch.no_grad():
        gates(model)[0].fill_(0.0)
    assert slora.release_frozen(model) > 0
    with pytest.raises(StateError, match=r"1 layers, the first 'first', were freed by inactive='frozen'"):
        Budget(model, 2, 3)
    keep_blocks(model, 2)
    assert count(model) == 2


def test_no_more_blocks_can_be_kept_than_are_active(make: Make) -> None:
    model = make(trained=True)
    keep_blocks(model, 2)
    with pytest.raises(ConfigError, match="budget=3 is 3 blocks, but only 2 of 6 are active; ask for fewer"):
        keep_blocks(model, 3)
    keep_blocks(model, 1)
    assert count(model) == 1


def test_frozen_gates_stay_whatever_the_optimizer(make: Make, batch: Batch) -> None:
    model = make(trained=True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    F.cross_entropy(model(batch[0]), batch[1]).backward()
    freeze_gates(model)
    optimizer.step()
    assert all((gate == 0.15).all() for gate in gates(model))
    with pytest.raises(StateError, match="no adapted layer"):
        freeze_gates(nn.Linear(2, 2))


def test_a_strategy_reads_the_device_once_per_choice(make: Make, batch: Batch) -> None:
    model = make()
    (mirror,) = {layer._mirror for _, layer in adapted_layers(model)}
    selection = Budget(model, 2, 12)
    copies = mirror.copies
    optimizer = torch.optim.AdamW(slora.parameter_groups(model, lr=0.01))
    for _ in range(12):
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        selection.step()
    # What it wrote it need not read.
    assert mirror.copies == copies
    assert count(model) == 2


SCRIPT = """
import os, sys
import torch, torch.distributed as dist
from torch import nn
import slora
from slora.gate import adapted_layers

torch.set_num_threads(1)
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(0)
model = slora.inject(nn.Sequential(*[nn.Linear(4, 4) for _ in range(6)]), slora.SelectiveLoRAConfig(r=1))
# Each process would choose otherwise by itself: the mean of both scores decides.
scores = torch.tensor([[9.0, 1, 2, 3, 4, 5], [0.0, 1, 2, 3, 4, 5]])[rank]
selection = slora.selection.Budget(model, 2, 3, ranking=lambda _: scores)
for _ in range(3):
    selection.step()
print([layer.activity().active != () for _, layer in adapted_layers(model)])
"""


@pytest.mark.slow
def test_processes_make_the_same_choice(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    shared = {**os.environ, "OMP_NUM_THREADS": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": "2"}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", SCRIPT], env=shared | {"RANK": str(rank)}, stdout=subprocess.PIPE, text=True
        )
        for rank in (0, 1)
    ]
    outputs = [process.communicate(timeout=300)[0].strip() for process in processes]
    assert outputs == ["[True, False, False, False, False, True]"] * 2
