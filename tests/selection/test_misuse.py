"""What strategies refuse or point out: bad input, a wrong order of calls, a model changed behind their back."""

from __future__ import annotations

import copy
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import slora
from slora import ConfigError, StateError
from slora.gates.values import gates
from slora.selection import Budget, SoloGain, freeze_gates, keep_blocks
from tests.selection.stepping import Batch, Make, N, count, flags, run


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
        ({"warmup": 0.5}, "warmup=0.5 and settling=0.6 are longer than the run"),
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
    with pytest.raises(StateError, match="this Budget has ended"):
        selection.step()


def test_a_choice_that_is_not_made_yet_shows_in_the_summary_and_when_it_is_saved(
    make: Make, batch: Batch, tmp_path: Path
) -> None:
    model = make()
    selection = Budget(model, 2, 30, warmup=0.4, settling=1 / 3)
    run(model, selection, batch, 14)
    what = "not made yet: Budget has taken 14 of 30 steps and chooses up to step 20"
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
    with pytest.raises(
        StateError, match=r"Budget is active on this model \(step 0 of 3\), and a model has one strategy"
    ):
        slora.selection.Gates(model, 3)
    run(model, selection, batch, 3)
    # The first has made its choice: another may go on from there.
    Budget(model, 1, 3)
    with pytest.raises(StateError, match="this Budget has ended"):
        selection.step()
    freeze_gates(model)
    Budget(model, 1, 3)


def test_merging_before_the_choice_warns_and_a_merged_model_is_not_chosen_from(make: Make, batch: Batch) -> None:
    model = make()
    selection = Budget(model, 2, 10, ranking=SoloGain(lambda: F.cross_entropy(model(batch[0]), batch[1])))
    run(model, selection, batch, 2)
    slora.merge(model)
    with pytest.raises(StateError, match=r"is merged, so its blocks cannot be chosen; call slora.unmerge"):
        selection.step()
    with pytest.raises(StateError, match="is merged, so no block can be evaluated alone"):
        selection.ranking(model)
    slora.unmerge(model)
    with pytest.warns(slora.UnfinishedSelectionWarning, match="the blocks that are active now are merged, but"):
        slora.merge_and_unload(model)


def test_gates_that_cannot_tell_ranks_apart_are_refused() -> None:
    model = nn.Sequential(*[nn.Linear(4, 4) for _ in range(600)])
    slora.inject(model, slora.SelectiveLoRAConfig(r=1))
    for gate in slora.gates.gates(model):
        gate.data = gate.data.bfloat16()
    selection = Budget(model, 21, 1)
    with pytest.raises(StateError, match=r"torch.bfloat16 has too few digits"):
        selection.step()


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


def test_the_model_keeps_a_strategy_that_nobody_holds(make: Make, batch: Batch) -> None:
    model = make()

    def set_up() -> None:
        Budget(model, 2, 30)

    set_up()
    assert "not made yet: Budget has taken 0 of 30 steps" in str(slora.summary(model))
    with pytest.raises(StateError, match="Budget is active"):
        Budget(model, 2, 30)


def test_a_step_too_many_is_pointed_out_once(make: Make, batch: Batch) -> None:
    model = make()
    selection = Budget(model, 2, 4)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        run(model, selection, batch, 4)
    with pytest.warns(UserWarning, match=r"step\(\) was called more often than steps=4 of this Budget.*accumulated"):
        selection.step()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        selection.step()
    assert count(model) == 2


def test_a_ranking_that_tells_no_block_from_another_is_pointed_out(make: Make, batch: Batch) -> None:
    with pytest.warns(UserWarning, match=r"gives every block the same score, 0, .*rank after training \(B is zero"):
        keep_blocks(make(), 2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        keep_blocks(make(trained=True), 2)


def test_a_share_of_flops_can_be_checked_before_the_first_step(make: Make, batch: Batch) -> None:
    model = make()
    selection = Budget(model, 0.001, 10, unit="flops")
    with pytest.raises(StateError, match="no layer ran"):
        selection.check_rows()
    model = make()
    selection = Budget(model, 0.001, 10, unit="flops")
    model(batch[0])
    with pytest.raises(ConfigError, match=r"budget=0.001 of the flops is less than the smallest block takes"):
        selection.check_rows()
