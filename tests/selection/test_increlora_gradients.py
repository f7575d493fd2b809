"""IncreLoRA takes the gradients of base weights as they come: none stays, and a step not taken leaves no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slora
import slora.retention
from slora.layers import adapted_layers
from slora.selection import IncreLoRA, SoRA
from tests.selection.rank_runs import count, optimizer_of, train
from tests.selection.stepping import Batch, Make


@pytest.fixture
def net(make: Make) -> Any:
    """A factory of equal adapted models of six blocks of rank 4."""
    return lambda **config: make(r=4, **config)


def scores(selection: IncreLoRA) -> Tensor:
    return selection.scores.score("blocks").clone()


def backward(model: nn.Module, batch: Batch, selection: IncreLoRA) -> None:
    (F.cross_entropy(model(batch[0]), batch[1]) + selection.penalty()).backward()


def test_no_base_weight_has_a_gradient_after_the_backward_pass(net: Any, batch: Batch) -> None:
    with_it, without = net(), net()
    selection = IncreLoRA(with_it, 7, 12)
    backward(with_it, batch, selection)
    assert not any(layer.base_weight.grad is not None for _, layer in adapted_layers(with_it))
    optimizer = optimizer_of(with_it)
    optimizer.step()
    selection.step()
    assert bool((scores(selection) > 0).any())
    # The norm over all parameters is that of the trained ones.
    optimizer.zero_grad()
    backward(with_it, batch, selection)
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    expected = torch.linalg.vector_norm(torch.stack([p.grad.norm() for p in trained if p.grad is not None]))
    norm = nn.utils.clip_grad_norm_(with_it.parameters(), 1.0)
    torch.testing.assert_close(norm, expected)
    assert not any(p.grad is not None for p in without.parameters())


@pytest.mark.parametrize(
    ("set_to_none", "counted", "value"),
    [
        *((set_to_none, True, value) for set_to_none in (True, False) for value in (3.0, float("nan"))),
        # Without either, gradients of 0 look like those of a step that accumulates; NaN is left out all the same.
        *((True, False, value) for value in (3.0, float("nan"))),
        (False, False, float("nan")),
    ],
)
def test_a_step_that_is_not_taken_leaves_no_trace_in_the_scores(
    net: Any, batch: Batch, set_to_none: bool, counted: bool, value: float
) -> None:
    found = []
    for skips in (False, True):
        model = net()
        selection = IncreLoRA(model, 7, 30)
        optimizer = optimizer_of(model)
        for i in range(4):
            if skips and i == 2:
                backward(model, (batch[0] * value, batch[1]), selection)
                optimizer.zero_grad(set_to_none=set_to_none)
                if counted:
                    selection.step()
            backward(model, batch, selection)
            optimizer.step()
            optimizer.zero_grad(set_to_none=set_to_none)
            selection.step()
        found.append(scores(selection))
        assert not any(layer.base_weight.requires_grad for _, layer in adapted_layers(model))
    if counted or set_to_none:
        assert torch.equal(found[0], found[1])
    else:
        assert bool(found[1].isfinite().all())


def test_an_overflow_that_a_grad_scaler_skips_leaves_no_trace_in_the_scores(net: Any, batch: Batch) -> None:
    model = net()
    selection = IncreLoRA(model, 7, 30)
    optimizer = optimizer_of(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for i in range(4):
        before = scores(selection)
        scale = float("inf") if i == 1 else 1.0
        loss = F.cross_entropy(model(batch[0]), batch[1]) + selection.penalty()
        scaler.scale(loss * scale).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        selection.step()
        assert torch.equal(scores(selection), before) == (i == 1)
    state = selection.state_dict()
    selection.load_state_dict(state)


def test_gradients_that_accumulate_count_as_their_sum(net: Any, batch: Batch) -> None:
    found = []
    for parts in (1, 2):
        model = net()
        selection = IncreLoRA(model, 7, 30, orthogonality=0.0)
        optimizer = optimizer_of(model)
        for x, y in zip(batch[0].chunk(parts), batch[1].chunk(parts), strict=True):
            (F.cross_entropy(model(x), y) / parts).backward()
        optimizer.step()
        selection.step()
        found.append(scores(selection))
    torch.testing.assert_close(found[0], found[1], rtol=1e-3, atol=0)


@pytest.mark.parametrize("ran_before", [True, False])
def test_after_another_compiled_strategy_increlora_gets_its_gradients(batch: Batch, ran_before: bool) -> None:
    for kind in (SoRA, IncreLoRA):
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 5))
        slora.inject(model, slora.SelectiveLoRAConfig(r=4, target_modules=["0", "2"]))
        compiled = torch.compile(model, backend="aot_eager")
        if ran_before:
            compiled(batch[0])
        selection = kind(model, 5, 6)
        train(compiled, selection, optimizer_of(model), batch, 6)
        selection.finish()
        assert count(model) == 5


def test_ewc_made_between_forward_and_step_leaves_the_gradients_to_increlora(net: Any, batch: Batch) -> None:
    model = net()
    selection = IncreLoRA(model, 7, 12)
    optimizer = optimizer_of(model)
    loss = F.cross_entropy(model(batch[0]), batch[1])
    slora.retention.EWC(model, batch[0][:4], features=model)
    loss.backward()
    optimizer.step()
    selection.step()
    assert bool((scores(selection) > 0).any())
    assert not any(layer.base_weight.requires_grad for _, layer in adapted_layers(model))


def test_a_model_of_which_only_parts_are_called_is_named(batch: Batch) -> None:
    model = nn.Sequential(nn.Linear(16, 16), nn.Linear(16, 5))
    slora.inject(model, slora.SelectiveLoRAConfig(r=4, target_modules=["0", "1"]))
    selection = IncreLoRA(model, 5, 12)
    optimizer = optimizer_of(model)
    F.cross_entropy(model[1](model[0](batch[0])), batch[1]).backward()
    with pytest.raises(slora.StateError, match=r"only parts of it were called"):
        optimizer.step()
    assert selection.taken == 0
