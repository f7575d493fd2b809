"""`Budget`: exactly what was asked for, whatever the length and the unit."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slora
from slora.gates.values import gates
from slora.layers import adapted_layers
from slora.selection import Budget, keep_blocks
from tests.selection.stepping import Batch, Make, N, count, flags, run


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


def test_a_gate_tells_the_rank_of_its_block(make: Make) -> None:
    model = make(trained=True)
    scores = torch.tensor([5.0, 1.0, 6.0, 2.0, 4.0, 3.0])
    keep_blocks(model, 2, ranking=lambda _: scores)
    values = torch.cat([gate.detach() for gate in gates(model)])
    assert torch.equal(values.argsort(descending=True), scores.argsort(descending=True))
    assert (values >= 0.1).tolist() == (scores > 4.5).tolist()


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


def test_numbers_of_numpy_are_numbers(make: Make) -> None:
    assert Budget(make(), np.int64(3), np.int64(30)).state_dict()["budget"] == 3
    selection = Budget(make(), np.float32(0.5), 30)
    assert json.loads(json.dumps(selection.state_dict()))["budget"] == 0.5


def test_a_strategy_reads_the_device_once_per_choice(make: Make, batch: Batch) -> None:
    model = make()
    (cache,) = {layer.gate_cache for _, layer in adapted_layers(model)}
    selection = Budget(model, 2, 12)
    copies = cache.copies
    optimizer = torch.optim.AdamW(slora.parameter_groups(model, lr=0.01))
    for _ in range(12):
        F.cross_entropy(model(batch[0]), batch[1]).backward()
        optimizer.step()
        selection.step()
    # What it wrote it need not read.
    assert cache.copies == copies
    assert count(model) == 2
