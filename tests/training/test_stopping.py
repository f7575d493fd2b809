"""How a run stops: a loss that is not finite, and signals."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from slora import DataError, NonFiniteLossError
from slora.runs import checkpoint_folders
from slora.runs.metrics import read_metrics
from slora.sources.data import InputSpec, open_data
from slora.training import Interrupted, TrainSettings, prepare, train

Factory = Callable[[], nn.Module]
Pair = tuple[Tensor, Tensor]


def ready(make_model: Factory, settings: TrainSettings) -> nn.Module:
    torch.manual_seed(5)
    return prepare(make_model(), settings=settings)


def broken_at(step: int, value: float = float("nan")) -> Callable[[Tensor, Tensor], Tensor]:
    """Cross-entropy that turns into `value` at a step."""
    calls = 0

    def criterion(logits: Tensor, labels: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        loss = F.cross_entropy(logits, labels)
        return loss * value if calls == step else loss

    return criterion


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_stops_the_run_and_overwrites_nothing(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path, value: float
) -> None:
    settings = settings.replace(max_steps=40, save_every=4, log_every=5, lr=0.01, warmup=0.0)
    with pytest.raises(NonFiniteLossError) as caught:
        train(ready(make_model, settings), data, None, settings, tmp_path, criterion=broken_at(11, value))
    good = tmp_path / "checkpoints/step-00000008"
    what = f"the loss is {value} at step 11, though every layer is finite on its batch"
    for text in (what, f"check the criterion, then resume from {good}", "Nothing was overwritten"):
        assert text in str(caught.value)
    assert checkpoint_folders.newest(tmp_path) == good
    *steps, last = read_metrics(tmp_path / "metrics.jsonl")
    assert all(record["step"] <= 10 for record in steps)
    assert last == {"step": 11, "error": what}
    resumed = train(ready(make_model, settings), data, None, settings, tmp_path, resume=good)
    assert resumed.steps == 40
    assert not any("error" in record for record in resumed.history)


def test_a_checkpoint_due_right_after_the_loss_broke_is_not_written(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path
) -> None:
    settings = settings.replace(save_every=4, log_every=100)
    with pytest.raises(NonFiniteLossError, match=r"at step 8, .*step-00000004"):
        train(ready(make_model, settings), data, None, settings, tmp_path, criterion=broken_at(8))
    assert [path.name for path in checkpoint_folders.checkpoints(tmp_path / "checkpoints")] == ["step-00000004"]


def test_with_accumulation_the_step_of_a_broken_loss_is_the_optimizer_step(
    make_model: Factory, data: Pair, settings: TrainSettings
) -> None:
    settings = settings.replace(batch_size=4, gradient_accumulation=2, log_every=4)
    with pytest.raises(NonFiniteLossError, match=r"at step 3, .*no checkpoint was written before it"):
        train(ready(make_model, settings), data, None, settings, criterion=broken_at(6))


def test_weights_that_are_not_finite_are_never_saved(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path
) -> None:
    class Breaking(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> Tensor:
            return grads[0] * float("inf")

    settings = settings.replace(method="full", max_steps=1, clip_norm=0.0)
    apply: Any = Breaking.apply
    with pytest.raises(NonFiniteLossError, match=r"is not finite after step 1"):
        train(
            ready(make_model, settings), data, None, settings, tmp_path,
            criterion=lambda logits, labels: F.cross_entropy(apply(logits), labels),
        )  # fmt: skip
    assert checkpoint_folders.checkpoints(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_leaves_a_checkpoint_and_goes_on_from_it_bit_for_bit(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path, number: signal.Signals
) -> None:
    settings = settings.replace(save_every=0, keep_last=9)
    whole = ready(make_model, settings)
    train(whole, data, None, settings)
    handler = signal.getsignal(number)
    calls = 0

    def interrupting(logits: Tensor, labels: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        if calls == 5:
            signal.raise_signal(number)
        return F.cross_entropy(logits, labels)

    with pytest.raises(Interrupted) as caught:
        train(ready(make_model, settings), data, None, settings, tmp_path, criterion=interrupting)
    assert caught.value.checkpoint == checkpoint_folders.newest(tmp_path) == tmp_path / "checkpoints/step-00000005"
    assert signal.getsignal(number) is handler
    again = ready(make_model, settings)
    train(again, data, None, settings, tmp_path, resume=caught.value.checkpoint)
    assert all(torch.equal(p, q) for p, q in zip(whole.parameters(), again.parameters(), strict=True))


def test_an_ignored_ctrl_c_stays_ignored(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path
) -> None:
    def interrupting(logits: Tensor, labels: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        return F.cross_entropy(logits, labels)

    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        train(ready(make_model, settings), data, None, settings, tmp_path, criterion=interrupting)
        assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_second_ctrl_c_stops_at_once(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path
) -> None:
    def twice(logits: Tensor, labels: Tensor) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("unreachable")

    with pytest.raises(KeyboardInterrupt) as caught:
        train(ready(make_model, settings), data, None, settings, tmp_path, criterion=twice)
    assert not isinstance(caught.value, Interrupted)


def test_training_stops_where_more_than_one_percent_turn_out_damaged(
    image_tree: Callable[..., Path], settings: TrainSettings
) -> None:
    source = open_data(f"imagefolder:{image_tree(100, truncated=5)}")
    model = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(192, 2))
    with pytest.raises(DataError, match=r"at least \d of 100 images cannot be read, more than 1%"):
        train(model, source.data(InputSpec(3, 8), training=True), None, settings)
