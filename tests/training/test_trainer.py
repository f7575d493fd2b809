"""The run itself: its arithmetic, its records, and how it stops."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from slora import ConfigError, NonFiniteLossError
from slora.gate import adapted_layers, gates
from slora.training import Interrupted, TrainSettings, checkpoint, prepare, train
from slora.training.optimizers import lr_scale
from slora.training.recorder import read_metrics

Factory = Callable[[], nn.Module]
Pair = tuple[Tensor, Tensor]


def ready(make_model: Factory, settings: TrainSettings) -> nn.Module:
    torch.manual_seed(5)
    return prepare(make_model(), settings=settings)


def difference(a: nn.Module, b: nn.Module) -> float:
    pairs = zip(a.parameters(), b.parameters(), strict=True)
    return float(torch.cat([(p - q).detach().abs().flatten() for p, q in pairs]).max())


@pytest.mark.parametrize("method", ["selective", "lora", "full", "linear"])
def test_training_lowers_the_loss_and_raises_the_accuracy(
    make_model: Factory, data: Pair, settings: TrainSettings, method: str
) -> None:
    settings = settings.replace(method=method, max_steps=60, batch_size=32, lr=0.03, penalty=0.1, eval_every=0)
    result = train(ready(make_model, settings), data, data, settings)
    losses = [record["loss"] for record in result.history if "loss" in record]
    # A head on random features learns less.
    factor, share = (0.99, 0.3) if method == "linear" else (0.8, 0.5)
    assert losses[-1] < factor * losses[0]
    assert result.accuracy is not None
    assert result.accuracy > share
    assert (result.steps, result.best_step) == (60, 60)
    assert result.seconds > 0


@pytest.mark.parametrize("kind", ["tuple", "tensors", "dataset"])
def test_tuples_tensor_data_sets_and_data_sets_train_alike(
    make_model: Factory, data: Pair, settings: TrainSettings, kind: str
) -> None:
    class Plain(Dataset[tuple[Tensor, int]]):
        def __len__(self) -> int:
            return len(data[0])

        def __getitem__(self, index: int) -> tuple[Tensor, int]:
            return data[0][index], int(data[1][index])

    reference, model = ready(make_model, settings), ready(make_model, settings)
    train(reference, data, None, settings)
    train(model, {"tuple": data, "tensors": TensorDataset(*data), "dataset": Plain()}[kind], None, settings)
    assert difference(reference, model) == 0.0


def test_gradient_accumulation_equals_the_big_batch(make_model: Factory, data: Pair, settings: TrainSettings) -> None:
    # SGD without clipping, so that a step is the gradient itself; the norm sees the batch, so it stays frozen.
    settings = settings.replace(
        method="selective", optimizer="sgd", lr=0.1, clip_norm=0.0, gate_rule="sgd", max_steps=6
    )
    big, small = settings.replace(batch_size=16), settings.replace(batch_size=4, gradient_accumulation=4)
    models = [ready(make_model, settings), ready(make_model, settings)]
    start = ready(make_model, settings)
    for model, each in zip(models, (big, small), strict=True):
        train(model, data, None, each)
    assert difference(models[0], start) > 1e-2
    # Sums of 16 terms in another order: a few units in the last place of numbers below 1.
    assert difference(*models) < 1e-6


def test_the_norm_of_the_gradient_is_clipped(make_model: Factory, data: Pair, settings: TrainSettings) -> None:
    settings = settings.replace(
        method="full", optimizer="sgd", momentum=0.0, weight_decay=0.0, lr=1.0, warmup=0.0, max_steps=1, log_every=1
    )
    change = {}
    for clip in (0.0, 1e-3):
        model, start = ready(make_model, settings), ready(make_model, settings)
        result = train(model, data, None, settings.replace(clip_norm=clip))
        change[clip] = torch.cat(
            [(p - q).detach().flatten() for p, q in zip(model.parameters(), start.parameters(), strict=True)]
        )
    assert change[1e-3].norm() == pytest.approx(1e-3, rel=1e-3)
    assert result.history[0]["grad_norm"] == pytest.approx(float(change[0.0].norm()), rel=1e-3)
    assert F.cosine_similarity(change[0.0], change[1e-3], 0) > 0.999


def test_large_gradients_of_the_gates_do_not_shrink_those_of_the_weights(
    make_model: Factory, data: Pair, settings: TrainSettings
) -> None:
    settings = settings.replace(
        optimizer="sgd", momentum=0.0, lr=1.0, warmup=0.0, max_steps=1, gate_lr=1.0, penalty=1e6, penalty_warmup=0.0,
        gate_rule="sgd",
    )  # fmt: skip
    model, start = ready(make_model, settings), ready(make_model, settings)
    train(model, data, None, settings)
    assert (model.get_parameter("head.weight") - start.get_parameter("head.weight")).norm() > 0.01
    moved = torch.cat([(p - q).detach() for p, q in zip(gates(model), gates(start), strict=True)]).norm()
    assert moved == pytest.approx(settings.clip_norm, rel=1e-3)


def test_the_learning_rate_follows_the_schedule(make_model: Factory, data: Pair, settings: TrainSettings) -> None:
    settings = settings.replace(max_steps=10, warmup=0.3, min_lr_ratio=0.1, lr=0.02, log_every=1)
    result = train(ready(make_model, settings), data, None, settings)
    assert [record["lr"] for record in result.history] == pytest.approx(
        [0.02 * lr_scale(step, 10, 3, 0.1) for step in range(10)]
    )


def test_the_penalty_starts_after_its_warm_up_and_ramps(
    make_model: Factory, data: Pair, settings: TrainSettings
) -> None:
    settings = settings.replace(max_steps=10, penalty=2.0, penalty_warmup=0.4, penalty_ramp=0.4, log_every=1)
    result = train(ready(make_model, settings), data, None, settings)
    assert [record["penalty"] for record in result.history] == [0, 0, 0, 0, 0.5, 1.0, 1.5, 2.0, 2.0, 2.0]


@pytest.mark.parametrize("gate_rule", ["proximal", "sgd"])
def test_both_gate_rules_move_a_gate_by_what_the_penalty_asks(
    make_model: Factory, data: Pair, settings: TrainSettings, gate_rule: str
) -> None:
    # B = 0 and A, B at rest: the task gives the gates no gradient, so the penalty alone moves them.
    settings = settings.replace(
        gate_rule=gate_rule, optimizer="sgd", momentum=0.0, lr=0.0, gate_lr=0.3, penalty=0.1, penalty_warmup=0.0,
        warmup=0.0, max_steps=4, min_lr_ratio=1.0,
    )  # fmt: skip
    model = ready(make_model, settings)
    train(model, data, None, settings)
    for gate in gates(model):
        assert gate.item() == pytest.approx(0.15 - 4 * 0.3 * 0.1 / 3, abs=1e-6)


def test_active_blocks_over_time_are_what_the_gates_said(
    make_model: Factory, data: Pair, settings: TrainSettings
) -> None:
    settings = settings.replace(
        lr=0.0, gate_lr=0.3, penalty=0.1, penalty_warmup=0.0, warmup=0.0, min_lr_ratio=1.0, max_steps=10, log_every=1
    )
    model = ready(make_model, settings)
    with torch.no_grad():
        model.get_submodule("second").gate.fill_(0.4)  # type: ignore[union-attr,operator]
    result = train(model, data, None, settings)
    layers = ("first", "second", "third")
    # Each step takes 0.01 from 0.15; below 0.1 from the sixth on.
    assert result.active_blocks == [
        (0, dict.fromkeys(layers, (0,))),
        (6, {"first": (), "second": (0,), "third": ()}),
    ]
    assert [record["active"] for record in result.history] == [3] * 5 + [1] * 5
    assert result.history[5]["active_blocks"] == {"first": [], "second": [0], "third": []}


def test_methods_without_blocks_report_none(make_model: Factory, data: Pair, settings: TrainSettings) -> None:
    settings = settings.replace(method="full")
    result = train(ready(make_model, settings), data, data, settings)
    assert result.active_blocks == []
    assert "active" not in result.history[0]


def test_freed_blocks_leave_the_optimizer_and_training_goes_on(
    make_model: Factory, data: Pair, settings: TrainSettings
) -> None:
    settings = settings.replace(inactive="frozen", gate_lr=0.5, penalty=0.3, penalty_warmup=0.0)
    model = ready(make_model, settings)
    result = train(model, data, data, settings)
    assert all(layer.released for _, layer in adapted_layers(model))
    assert result.steps == 12
    assert result.history[-1]["eval_loss"] > 0


def test_metrics_and_tensorboard_and_checkpoints_fill_the_run_directory(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path
) -> None:
    settings = settings.replace(tensorboard=True, count_flops=True)
    result = train(ready(make_model, settings), data, data, settings, tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["checkpoints", "metrics.jsonl", "tensorboard"]
    (events,) = (tmp_path / "tensorboard").iterdir()
    assert events.name.startswith("events.out.tfevents")
    assert events.stat().st_size > 500
    records = read_metrics(tmp_path / "metrics.jsonl")
    assert records == result.history
    assert [record["step"] for record in records if "loss" in record] == [2, 4, 6, 8, 10, 12]
    assert [record["step"] for record in records if "eval_accuracy" in record] == [8, 12]
    for key in ("epoch", "accuracy", "lr", "penalty", "grad_norm", "active", "blocks", "mean_gate", "flops", "seconds"):
        assert records[0][key] is not None


def test_without_a_run_directory_nothing_is_written(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    train(ready(make_model, settings), data, data, settings.replace(tensorboard=True))
    assert list(tmp_path.iterdir()) == []


def test_bf16_autocast_on_the_cpu_keeps_trained_weights_in_fp32(
    make_model: Factory, data: Pair, settings: TrainSettings
) -> None:
    seen: set[tuple[str, torch.dtype]] = set()
    runs = {}
    for precision in ("fp32", "bf16"):
        settings = settings.replace(precision=precision, max_steps=30, batch_size=32, lr=0.02)
        model = ready(make_model, settings)
        handle = model.get_submodule("second").register_forward_hook(
            lambda module, args, y, precision=precision: seen.add((precision, y.dtype))
        )
        runs[precision] = train(model, data, data, settings)
        handle.remove()
        assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}
        assert "forward" not in vars(model)
        assert model(data[0]).dtype == torch.float32
    assert seen == {("fp32", torch.float32), ("bf16", torch.bfloat16)}
    losses = {precision: result.history[-1]["eval_loss"] for precision, result in runs.items()}
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.05)
    assert losses["bf16"] != losses["fp32"]


def test_training_leaves_the_mode_of_the_model_as_it_was(
    make_model: Factory, data: Pair, settings: TrainSettings
) -> None:
    model = ready(make_model, settings).eval()
    train(model, data, data, settings)
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("method", ["selective", "full"])
def test_only_full_fine_tuning_moves_the_statistics_of_batch_norms(
    make_model: Factory, data: Pair, settings: TrainSettings, method: str
) -> None:
    settings = settings.replace(method=method)
    model = ready(make_model, settings)
    train(model, data, data, settings)
    moved = bool(model.get_buffer("norm.running_mean").any())
    assert moved == (method == "full")


@pytest.mark.parametrize("method", ["full", "linear", "lora"])
def test_counted_flops_are_those_of_the_matrix_products(
    make_model: Factory, data: Pair, settings: TrainSettings, method: str
) -> None:
    settings = settings.replace(method=method, count_flops=True, max_steps=5, r=2)
    result = train(ready(make_model, settings), data, None, settings)
    shapes = [(16, 24), (24, 24), (24, 16)]
    base = sum(2 * 8 * k * n for k, n in shapes)
    head = 2 * 8 * 16 * 4
    if method == "full":
        # Forward, dW and dx; the images need no gradient.
        expected = 3 * (base + head) - 2 * 8 * 16 * 24
    elif method == "linear":
        expected = base + 2 * head
    else:
        # Forward and dx of the frozen weights; S, its update, T, dx, dA and dB of the blocks, without the first dx.
        lora = sum(2 * 8 * 2 * (3 * k + 3 * n) for k, n in shapes)
        expected = (2 * base - 2 * 8 * 16 * 24) + 3 * head + lora - 2 * 8 * 2 * 16
    assert result.flops == 5 * expected


def test_counting_flops_changes_no_number_and_inactive_blocks_cost_nothing(
    make_model: Factory, data: Pair, settings: TrainSettings
) -> None:
    settings = settings.replace(
        gate_lr=0.3, penalty=0.2, penalty_warmup=0.0, max_steps=16, lora_dropout=0.1, log_every=1, inactive="frozen"
    )
    plain, counted = ready(make_model, settings), ready(make_model, settings)
    train(plain, data, None, settings)
    result = train(counted, data, None, settings.replace(count_flops=True))
    assert difference(plain, counted) == 0.0
    per_step = [b["flops"] - a["flops"] for a, b in zip(result.history, result.history[1:], strict=False)]
    base, head = sum(2 * 8 * k * n for k, n in [(16, 24), (24, 24), (24, 16)]), 2 * 8 * 16 * 4
    assert per_step[-1] == base + 2 * head < per_step[0]


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
    rate = 0.01 * lr_scale(10, 40, 0)
    for text in (f"the loss is {value} at step 11", f"learning rate {rate:.3g}", str(good), "Nothing was overwritten"):
        assert text in str(caught.value)
    assert checkpoint.newest(tmp_path) == good
    assert all(record["step"] <= 10 for record in read_metrics(tmp_path / "metrics.jsonl"))
    resumed = train(ready(make_model, settings), data, None, settings, tmp_path, resume=good)
    assert resumed.steps == 40


def test_a_checkpoint_due_right_after_the_loss_broke_is_not_written(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path
) -> None:
    settings = settings.replace(save_every=4, log_every=100)
    with pytest.raises(NonFiniteLossError, match=r"at step 8 .*step-00000004"):
        train(ready(make_model, settings), data, None, settings, tmp_path, criterion=broken_at(8))
    assert [path.name for path in checkpoint.checkpoints(tmp_path / "checkpoints")] == ["step-00000004"]


def test_with_accumulation_the_step_of_a_broken_loss_is_the_optimizer_step(
    make_model: Factory, data: Pair, settings: TrainSettings
) -> None:
    settings = settings.replace(batch_size=4, gradient_accumulation=2, log_every=4)
    with pytest.raises(NonFiniteLossError, match=r"at step 3 .*no checkpoint was written before it"):
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
    assert checkpoint.checkpoints(tmp_path / "checkpoints") == []


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
    assert caught.value.checkpoint == checkpoint.newest(tmp_path) == tmp_path / "checkpoints/step-00000005"
    assert signal.getsignal(number) is handler
    again = ready(make_model, settings)
    train(again, data, None, settings, tmp_path, resume=caught.value.checkpoint)
    assert difference(whole, again) == 0.0


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


def test_a_model_with_nothing_to_train_is_refused(make_model: Factory, data: Pair, settings: TrainSettings) -> None:
    with pytest.raises(ConfigError, match="no trainable parameter"):
        train(make_model().requires_grad_(False), data, None, settings)


def test_more_accumulation_than_there_are_images_is_refused(
    make_model: Factory, data: Pair, settings: TrainSettings
) -> None:
    settings = settings.replace(batch_size=32, gradient_accumulation=4)
    with pytest.raises(ConfigError, match="gradient_accumulation=4 times batch_size=32 exceeds the 64 training images"):
        train(ready(make_model, settings), data, None, settings)


def test_a_model_that_returns_an_object_with_logits_is_trained(
    make_model: Factory, data: Pair, settings: TrainSettings
) -> None:
    class Output:
        def __init__(self, logits: Tensor) -> None:
            self.logits = logits

    class Wrapped(nn.Module):
        def __init__(self, inner: nn.Module) -> None:
            super().__init__()
            self.inner = inner

        def forward(self, images: Tensor) -> Output:
            return Output(self.inner(images))

    settings = settings.replace(modules_to_save=["head"])
    assert train(ready(lambda: Wrapped(make_model()), settings), data, data, settings).accuracy is not None


@pytest.mark.gpu
def test_a_run_on_the_gpu_in_bf16_resumes_and_counts(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path
) -> None:
    settings = settings.replace(device="auto", precision="bf16", count_flops=True, save_every=6, keep_last=9)
    model = ready(make_model, settings)
    result = train(model, data, data, settings, tmp_path / "whole")
    assert next(model.parameters()).is_cuda
    assert result.flops > 0
    resumed = train(
        ready(make_model, settings), data, data, settings, tmp_path / "more",
        resume=tmp_path / "whole/checkpoints/step-00000006",
    )  # fmt: skip
    assert resumed.flops == result.flops
    assert resumed.history[-1]["eval_loss"] == pytest.approx(result.history[-1]["eval_loss"], rel=1e-2)
