"""A run that breaks off says which layer is not finite first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slora import NonFiniteLossError, StateError
from slora.runs.metrics import read_metrics
from slora.runs.settings import Method
from slora.training import TrainSettings, prepare, train
from slora.training.nonfinite import origin
from slora.training.trainer import Trainer

Factory = Callable[[], nn.Module]
Pair = tuple[Tensor, Tensor]


class Log(nn.Module):
    """Its input's logarithm, which is NaN below 0."""

    def forward(self, x: Tensor) -> Tensor:
        return x.log()


def test_the_first_layer_in_the_order_of_the_forward_is_named() -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Tanh(), Log()), nn.Linear(4, 4), nn.Softmax(1))
    assert origin(model, torch.randn(3, 4)) == ("the first layer whose output is not finite is '1.1' (Log)", "")
    assert not any(module._forward_hooks for module in model.modules())


def test_a_parameter_a_batch_and_what_stands_between_layers_are_named(make_model: Factory, data: Pair) -> None:
    model = make_model()
    assert origin(model, data[0]) == ("", "")
    assert origin(model, data[0] / 0).what.startswith("the batch itself holds a value that is not finite, in item 0")
    with torch.no_grad():
        model.get_parameter("second.bias")[3] = float("inf")
    assert origin(model, data[0]).what.endswith("is 'second' (Linear), whose parameter 'bias' is not finite now")

    class Between(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 4), nn.Linear(4, 4)

        def forward(self, x: Tensor) -> dict[str, Tensor]:
            return {"logits": self.b(self.a(x) * float("nan"))}

    assert origin(Between(), torch.ones(2, 4)).what.endswith("is 'b' (Linear), whose input is already not finite")


def test_randomness_is_as_before() -> None:
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 4))
    before = torch.get_rng_state()
    origin(model, torch.ones(2, 4))
    assert torch.equal(torch.get_rng_state(), before)


class Overflowing(nn.Module):
    """Fine but for the image whose first pixel is the largest."""

    def __init__(self, model: nn.Module, largest: float) -> None:
        super().__init__()
        self.body, self.head = model, nn.Linear(4, 4)
        self.largest = largest
        self.scale = Scale(largest)

    def forward(self, images: Tensor) -> Tensor:
        return self.head(self.body(images) * self.scale(images))


class Scale(nn.Module):
    def __init__(self, largest: float) -> None:
        super().__init__()
        self.largest = largest

    def forward(self, images: Tensor) -> Tensor:
        return 1 / (images[:, 0, 0, :1] != self.largest)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("late", [False, True], ids=["at once", "when a record is due"])
@pytest.mark.parametrize("method", ["full", "selective"])
def test_the_layer_that_broke_is_named_and_the_weights_are_those_of_the_step_before(
    make_model: Factory,
    data: Pair,
    settings: TrainSettings,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    accumulation: int,
    late: bool,
    method: Method,
) -> None:
    if late:
        # As on a GPU, which is not to be waited for.
        never = property(lambda self: False, lambda self, value: None)
        monkeypatch.setattr(Trainer, "checks_each_loss", never, raising=False)
    settings = settings.replace(
        method=method, log_every=8, gradient_accumulation=accumulation, modules_to_save=["head"]
    )
    settings = settings.replace(
        batch_size=8 // accumulation, budget=1 if method == "selective" else None, ranking="norm"
    )
    model = prepare(Overflowing(make_model(), data[0][:, 0, 0, 0].max().item()), settings=settings)
    weights: list[dict[str, Tensor]] = []
    seen: list[bool] = []

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        if len(seen) % accumulation == 0:
            weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
        loss = F.cross_entropy(logits, labels)
        seen.append(bool(loss.isfinite()))
        return loss

    with pytest.raises(NonFiniteLossError) as caught:
        train(model, data, None, settings, tmp_path, criterion=criterion)
    step = seen.index(False) // accumulation + 1
    assert step > 1
    assert f"at step {step}: the first layer whose output is not finite is 'scale' (Scale)" in str(caught.value)
    assert "'scale' (Scale)" in read_metrics(tmp_path / "metrics.jsonl")[-1]["error"]
    assert not any(module._forward_hooks for module in model.modules())
    if not late:
        assert all(torch.equal(p, weights[step - 1][name]) for name, p in model.named_parameters())
    assert all(bool(p.isfinite().all()) for p in model.parameters())


def test_a_gradient_that_is_not_finite_does_not_reach_the_weights(
    make_model: Factory, data: Pair, settings: TrainSettings
) -> None:
    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels) + (0 * logits.sum()).sqrt()

    settings = settings.replace(method="full")
    model = prepare(make_model(), settings=settings)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    with pytest.raises(NonFiniteLossError, match="the gradient is not finite at or shortly before step 2"):
        train(model, data, None, settings, criterion=criterion)
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())


def test_a_loss_that_breaks_by_itself_says_that_the_layers_do_not(
    make_model: Factory, data: Pair, settings: TrainSettings
) -> None:
    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        return F.cross_entropy(logits, labels) * float("nan")

    with pytest.raises(
        NonFiniteLossError, match=r"is nan at step 1, though every layer is finite.*check the crit"
    ) as e:
        train(prepare(make_model(), settings=settings), data, None, settings, criterion=criterion)
    assert "lower lr" not in str(e.value)


def test_data_that_is_not_finite_is_named_by_its_item_and_no_learning_rate_is_recommended(
    make_model: Factory, data: Pair, settings: TrainSettings
) -> None:
    images = data[0].clone()
    images[:] = images.where(torch.arange(64).view(-1, 1, 1, 1) % 8 != 3, float("nan"))
    with pytest.raises(NonFiniteLossError, match=r"in item \d.* of 8; correct the data") as caught:
        train(prepare(make_model(), settings=settings), (images, data[1]), None, settings)
    assert "lower lr" not in str(caught.value)
    assert not caught.value.diverged


@pytest.mark.parametrize("method", ["selective", "linear"])
def test_a_frozen_weight_that_is_not_finite_is_the_base_models_fault(
    make_model: Factory, data: Pair, settings: TrainSettings, method: Method
) -> None:
    settings = settings.replace(method=method, modules_to_save=["head"])
    model = prepare(make_model(), settings=settings)
    with torch.no_grad():
        model.get_parameter("second.weight")[0, 0] = float("nan")
    match = "is 'second' .*whose parameter 'weight' is not finite; it is frozen.*load a base model"
    with pytest.raises(NonFiniteLossError, match=match) as caught:
        train(model, data, None, settings)
    assert "lower lr" not in str(caught.value)


def test_a_gate_that_is_not_finite_is_named_before_the_first_step_and_when_it_becomes_so(
    make_model: Factory, data: Pair, settings: TrainSettings
) -> None:
    model = prepare(make_model(), settings=settings)
    with torch.no_grad():
        model.get_parameter("third.gate")[0] = float("nan")
    with pytest.raises(StateError, match=r"'third\.gate' is not finite before the first step"):
        train(model, data, None, settings)

    model = prepare(make_model(), settings=settings)

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        model.get_parameter("second.gate").data[0] = float("nan")
        return F.cross_entropy(logits, labels)

    with pytest.raises(NonFiniteLossError, match="a gate of 'second' is not finite at or shortly before step 2"):
        train(model, data, None, settings, criterion=criterion)
