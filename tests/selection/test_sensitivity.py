"""Sensitivities are the squared gradients of the base weights, and measuring them leaves no trace."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import slora
from slora import ConfigError, StateError
from slora.layers import adapted_layers
from slora.selection import Budget, Sensitivity
from slora.selection.sensitivity import sensitivity
from tests.selection.stepping import Batch, Make, N, count, flags, run


def few(batch: Batch) -> list[Batch]:
    """Three batches of different sizes."""
    return list(zip(batch[0].split([16, 8, 8]), batch[1].split([16, 8, 8]), strict=True))


def loss_of(model: nn.Module) -> Callable[[Tensor, Tensor], Tensor]:
    return lambda x, y: F.cross_entropy(model(x), y)


def test_sensitivities_are_those_of_a_backward_written_by_hand(batch: Batch) -> None:
    generator = torch.Generator().manual_seed(5)
    W, V, H = (torch.randn(shape, generator=generator, dtype=torch.float64) for shape in ((12, 16), (6, 12), (5, 6)))
    model = nn.Sequential(nn.Linear(16, 12, False), nn.ReLU(), nn.Linear(12, 6, False), nn.Linear(6, 5, False)).double()
    with torch.no_grad():
        for layer, weight in zip((model[0], model[2], model[3]), (W, V, H), strict=True):
            layer.weight.copy_(weight)
    config = slora.SelectiveLoRAConfig(r=2, target_modules=["0", "2"], blocks=3, modules_to_save=["3"])
    model = slora.inject(model, config)
    with torch.no_grad():
        for _, adapted in adapted_layers(model):
            # The base model is what counts, whatever the blocks add.
            adapted.lora_B.normal_()

    expected = torch.zeros(6, dtype=torch.float64)
    batches = [(x.double(), y) for x, y in few(batch)]
    for x, y in batches:
        before = x @ W.T
        hidden = before.clamp(min=0)
        logits = hidden @ V.T @ H.T
        # d mean cross-entropy / d logits = (softmax - one-hot) / rows
        p = logits.exp() / logits.exp().sum(1, keepdim=True)
        d = (p - torch.eye(5, dtype=torch.float64)[y]) / len(x)
        dV = (d @ H).T @ hidden
        dW = ((d @ H @ V) * (before > 0)).T @ x
        expected += torch.stack([rows.square().sum() for dM in (dW, dV) for rows in dM.split(len(dM) // 3)])
    found = sensitivity(model, batches, loss_of(model))
    # The scores are rounded to fp32 at the end.
    torch.testing.assert_close(found.double(), expected, rtol=2**-23, atol=0.0)
    for budget in range(7):
        Sensitivity(model, budget, 10, batches=batches, loss=loss_of(model))
        kept = {i for i, on in enumerate(flags(model)) if on}
        assert kept == set(expected.argsort(descending=True)[:budget].tolist())


def test_query_key_and_value_of_an_attention_have_sensitivities_of_their_own() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.attention = nn.MultiheadAttention(8, 2, batch_first=True)
            self.head = nn.Linear(8, 3)

        def forward(self, x: Tensor, memory: Tensor) -> Tensor:
            logits: Tensor = self.head(self.attention(x, memory, memory, need_weights=False)[0].mean(1))
            return logits

    torch.manual_seed(2)
    plain = Net()
    adapted = slora.inject(Net(), slora.SelectiveLoRAConfig(r=2, modules_to_save=["head"]))
    adapted.load_state_dict(plain.state_dict(), strict=False)
    x, memory, y = torch.randn(4, 5, 8), torch.randn(4, 7, 8), torch.tensor([0, 1, 2, 0])
    F.cross_entropy(plain(x, memory), y).backward()
    weights = [*plain.attention.in_proj_weight.grad.chunk(3), plain.attention.out_proj.weight.grad]
    expected = torch.stack([weight.square().sum() for weight in weights])
    found = sensitivity(adapted, [(x, memory, y)], lambda x, memory, y: F.cross_entropy(adapted(x, memory), y))
    # Both round a sum of about 50 products per element.
    torch.testing.assert_close(found, expected, rtol=50 * 2**-23, atol=0.0)


@pytest.mark.parametrize("price", [0.0, 0.5, 3.0])
def test_a_price_on_depth_divides_the_scores(make: Make, batch: Batch, price: float) -> None:
    scores = sensitivity(model := make(), few(batch), loss_of(model)).tolist()
    # `qkv` has three blocks, in the second of four layers.
    depth = [0, 1 / 3, 1 / 3, 1 / 3, 2 / 3, 1]
    priced = [score / (200 ** (1 - d)) ** price for score, d in zip(scores, depth, strict=True)]
    for budget in range(1, N):
        model = make()
        selection = Sensitivity(model, budget, 10, batches=few(batch), loss=loss_of(model), depth_price=price)
        kept = {i for i, on in enumerate(flags(model)) if on}
        assert kept == set(sorted(range(N), key=lambda i: -priced[i])[:budget])
    if price:
        with pytest.raises(ConfigError, match=f"has depth_price={price}, this Sensitivity depth_price=0.0"):
            Sensitivity(make(), 5, 10, batches=[], loss=len, now=False).load_state_dict(selection.state_dict())
    with pytest.raises(ConfigError, match="depth_price=-1 is negative or not a finite number; use 0 or more"):
        Sensitivity(make(), 5, 10, batches=few(batch), loss=loss_of(model), depth_price=-1)


def test_measuring_leaves_no_trace(make: Make, batch: Batch) -> None:
    model = make(trained=True, lora_dropout=0.3)
    model.add_module("norm", nn.BatchNorm1d(5))
    loss_of(model)(*batch).backward()
    weight = dict(adapted_layers(model))["last"].base_weight
    weight.grad = torch.ones_like(weight)

    def everything() -> dict[str, Any]:
        parameters = dict(model.named_parameters())
        grads = {f"{name}.grad": p.grad for name, p in parameters.items()}
        return {**model.state_dict(), **grads, **{f"{name}?": p.requires_grad for name, p in parameters.items()}}

    before = {k: v.clone() if isinstance(v, Tensor) else v for k, v in everything().items()}
    random = torch.get_rng_state()

    def loss(x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(model.norm(model(x)), y)  # type: ignore[operator]

    with torch.no_grad():
        sensitivity(model, few(batch), loss)
    after = everything()
    assert before.keys() == after.keys()
    for name, value in before.items():
        same = torch.equal(value, after[name]) if isinstance(value, Tensor) else value == after[name]
        assert same, name
    assert torch.equal(random, torch.get_rng_state())
    assert model.training
    assert not any(weight._post_accumulate_grad_hooks or () for weight in model.parameters())  # type: ignore[attr-defined]


def test_one_weight_gradient_is_in_memory_at_a_time(make: Make, batch: Batch) -> None:
    model = make()
    weights = [layer.base_weight for _, layer in adapted_layers(model)]
    held = []

    class Watch(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, dy: Tensor) -> Tensor:
            held.append(sum(weight.grad is not None for weight in weights))
            return dy

    for layer in dict(adapted_layers(model)).values():
        layer.register_forward_hook(lambda layer, args, y: Watch.apply(y))
    sensitivity(model, [batch], loss_of(model))
    assert held == [0] * 4


def test_a_budget_of_flops_needs_nothing_but_the_batches(make: Make, batch: Batch) -> None:
    # Every layer has as many rows, so that FLOPs are shares of the parameters.
    chosen = []
    for unit in ("flops", "parameters"):
        model = make()
        Sensitivity(model, 0.5, 10, batches=few(batch), loss=loss_of(model), unit=unit)  # type: ignore[arg-type]
        chosen.append(flags(model))
    assert chosen[0] == chosen[1]
    assert 0 < sum(chosen[0]) < N


def test_it_trains_with_a_plain_loop_and_resumes_without_its_data(make: Make, batch: Batch) -> None:
    model = make()
    selection = Sensitivity(model, 2, 8, batches=few(batch), loss=loss_of(model))
    chosen = flags(model)
    assert run(model, selection, batch, 8) == [2] * 8
    assert [bool(B.any()) for _, layer in adapted_layers(model) for B in layer.lora_B] == chosen
    other = make()
    resumed = Sensitivity(other, 2, 8, batches=[], loss=loss_of(other), now=False)
    resumed.load_state_dict(selection.state_dict())
    resumed.finish()
    assert flags(other) == chosen


@pytest.mark.parametrize(
    ("batches", "loss", "error", "message"),
    [
        ([], None, ConfigError, "batches is empty, so no gradient can be computed; pass a few training batches"),
        (torch.ones(2, 16), None, ConfigError, "batches is a Tensor; pass a list of batches"),
        (None, 3, ConfigError, "loss=3 is not a function; write lambda x, y"),
        (None, lambda x, y: x.sum() * float("nan"), StateError, "the loss of batch 0 does not depend on an adapted"),
        (None, lambda x, y: 1.0, ConfigError, "the loss of batch 0 is float; expected a finite scalar"),
    ],
)
def test_data_that_say_nothing_are_refused_and_change_nothing(
    make: Make, batch: Batch, batches: Any, loss: Any, error: Any, message: str
) -> None:
    model = make()
    with pytest.raises(error, match=message):
        Sensitivity(
            model,
            2,
            10,
            batches=few(batch) if batches is None else batches,
            loss=loss_of(model) if loss is None else loss,
        )
    assert count(model) == N
    assert all(layer.gate.requires_grad for _, layer in adapted_layers(model))


def test_a_loss_that_is_no_finite_scalar_is_named(make: Make, batch: Batch) -> None:
    model = make()
    wrong: dict[str, Callable[..., Tensor]] = {
        "the loss of batch 0 is nan": lambda x, y: model(x).sum() * float("nan"),
        r"the loss of batch 0 is a tensor \[16, 5\]": lambda x, y: model(x),
    }
    for message, loss in wrong.items():
        with pytest.raises(ConfigError, match=message):
            Sensitivity(model, 2, 10, batches=few(batch), loss=loss)


def test_a_head_of_zeros_is_refused_since_it_passes_no_gradient_on(make: Make, batch: Batch) -> None:
    model = make()
    with torch.no_grad():
        model.get_parameter("head.weight").zero_()
    selection = Sensitivity(model, 2, 10, batches=few(batch), loss=loss_of(model), now=False)
    with pytest.raises(StateError, match="every base weight is zero: train the head first"):
        selection.begin()
    with torch.no_grad():
        model.get_parameter("head.weight").normal_()
    selection.begin()
    assert count(model) == 2


def test_batches_may_be_a_generator_that_is_read_when_the_choice_is_made(make: Make, batch: Batch) -> None:
    read = []

    def batches() -> Iterator[Batch]:
        for pair in few(batch):
            read.append(1)
            yield pair

    model = make()
    selection = Sensitivity(model, 2, 10, batches=batches(), loss=loss_of(model), now=False)
    assert read == []
    selection.begin()
    assert len(read) == 3


def averaged(rank: int) -> tuple[list[bool], list[float], int]:
    torch.distributed.init_process_group("gloo")
    torch.manual_seed(0)
    model = slora.inject(
        nn.Sequential(*[nn.Linear(4, 4) for _ in range(4)]), slora.SelectiveLoRAConfig(r=1, target_modules=r"\d")
    )
    wrapped = nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    x = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1))
    selection = Sensitivity(wrapped, 2, 3, batches=[(x[rank],)], loss=lambda x: wrapped(x).square().mean())
    each = [sensitivity(model, [(x[i],)], lambda x: model(x).square().mean()) for i in range(2)]
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.1)
    for _ in range(3):
        wrapped(x[rank]).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad()
        selection.step()
    selection.finish()
    return flags(model), (sum(each) / 2).tolist(), count(model)  # type: ignore[union-attr]


def test_processes_average_their_sensitivities_and_make_the_same_choice(
    two_processes: Callable[..., list[Any]],
) -> None:
    first, second = two_processes(averaged)
    assert first == second
    on, scores, left = first
    assert left == 2
    assert {i for i in range(4) if on[i]} == set(sorted(range(4), key=lambda i: -scores[i])[:2])


def test_a_model_with_another_active_strategy_is_left_alone(make: Make, batch: Batch) -> None:
    model = make()
    Budget(model, 2, 10)
    with pytest.raises(StateError, match="Budget is active on this model"):
        Sensitivity(model, 2, 10, batches=few(batch), loss=loss_of(model))
