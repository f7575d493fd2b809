"""The run itself: its arithmetic and its records."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from slora import ConfigError
from slora.gates.values import gates
from slora.layers import adapted_layers
from slora.runs.metrics import read_metrics
from slora.training import TrainSettings, prepare, train
from slora.training.schedule import lr_scale

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
        optimizer="sgd", momentum=0.0, lr=1.0, warmup=0.0, max_steps=1, gate_lr=1.0, penalty=1e6, selection_warmup=0.0,
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


def test_a_budget_holds_the_learning_rate_until_its_choice_is_made(
    make_model: Factory, data: Pair, settings: TrainSettings
) -> None:
    settings = settings.replace(max_steps=10, warmup=0.2, lr=0.02, log_every=1)
    rates = {}
    for name, changes in {
        "budget": {"budget": 1}, "gates": {}, "held": {"lr_hold": 0.7}, "not held": {"budget": 1, "lr_hold": 0.0}
    }.items():  # fmt: skip
        own = settings.replace(**changes)
        rates[name] = [record["lr"] / 0.02 for record in train(ready(make_model, own), data, None, own).history]
    cosine = [0.5 * (1 + math.cos(math.pi * step / 6)) for step in range(6)]
    assert rates["budget"] == pytest.approx([0.5, 1.0, 1.0, 1.0, *cosine])
    assert rates["held"] == pytest.approx([0.5, *[1.0] * 6, 1.0, 0.75, 0.25])
    assert rates["gates"] == rates["not held"] == pytest.approx([lr_scale(step, 10, 2) for step in range(10)])


def test_the_penalty_acts_in_the_selection_phase_alone(
    make_model: Factory, data: Pair, settings: TrainSettings
) -> None:
    settings = settings.replace(max_steps=10, penalty=2.0, selection_warmup=0.4, log_every=1)
    result = train(ready(make_model, settings), data, None, settings)
    assert [record["penalty"] for record in result.history] == [0, 0, 0, 0, 2, 2, 0, 0, 0, 0]


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
@pytest.mark.parametrize("gate_rule", ["proximal", "sgd"])
def test_after_the_selection_gates_stand_still_and_inactive_blocks_cost_nothing(
    make_model: Factory, data: Pair, settings: TrainSettings, gate_rule: str, optimizer: str
) -> None:
    settings = settings.replace(
        gate_rule=gate_rule, optimizer=optimizer, max_steps=10, settling=0.6, penalty=2.0, selection_warmup=0.0,
        gate_lr=0.05, inactive="exact", log_every=1, count_flops=True,
    )  # fmt: skip
    model = ready(make_model, settings)
    with torch.no_grad():
        gates(model)[0].fill_(0.05)
    result = train(model, data, None, settings)
    moving = [record["mean_gate"] for record in result.history]
    assert len(set(moving[:4])) == 4
    assert set(moving[4:]) == {moving[3]}
    assert [record["penalty"] for record in result.history] == [2.0] * 4 + [0.0] * 6
    assert not any(gate.requires_grad for gate in gates(model))
    steps = [later["flops"] - earlier["flops"] for earlier, later in itertools.pairwise(result.history)]
    assert steps[-1] < steps[0]


@pytest.mark.parametrize("gate_rule", ["proximal", "sgd"])
def test_both_gate_rules_move_a_gate_by_what_the_penalty_asks(
    make_model: Factory, data: Pair, settings: TrainSettings, gate_rule: str
) -> None:
    # B = 0 and A, B at rest: the task gives the gates no gradient, so the penalty alone moves them.
    settings = settings.replace(
        gate_rule=gate_rule, optimizer="sgd", momentum=0.0, lr=0.0, gate_lr=0.3, penalty=0.1, selection_warmup=0.0,
        warmup=0.0, max_steps=6,
    )  # fmt: skip
    model = ready(make_model, settings)
    train(model, data, None, settings)
    for gate in gates(model):
        assert gate.item() == pytest.approx(0.15 - 4 * 0.3 * 0.1 / 3, abs=1e-6)


def test_active_blocks_over_time_are_what_the_gates_said(
    make_model: Factory, data: Pair, settings: TrainSettings
) -> None:
    settings = settings.replace(
        lr=0.0, gate_lr=0.3, penalty=0.1, selection_warmup=0.0, warmup=0.0, max_steps=10, log_every=1
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
    settings = settings.replace(inactive="frozen", gate_lr=0.5, penalty=0.3, selection_warmup=0.0)
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
    tags = EventAccumulator(str(events.parent)).Reload().Tags()["scalars"]
    assert "training/mean_gate" in tags
    assert not any("gates" in tag for tag in tags)


def test_the_records_hold_every_gate_of_a_selective_run_and_those_of_no_other(
    make_model: Factory, data: Pair, settings: TrainSettings, tmp_path: Path
) -> None:
    for method in ("selective", "lora", "full"):
        settings = settings.replace(method=method)
        model = ready(make_model, settings)
        train(model, data, None, settings, tmp_path / method)
        records = [record for record in read_metrics(tmp_path / method / "metrics.jsonl") if "loss" in record]
        assert [("gates" in record) for record in records] == [method == "selective"] * len(records)
        if method == "selective":
            last = records[-1]["gates"]
            assert list(last) == [name for name, _ in adapted_layers(model)]
            for name, layer in adapted_layers(model):
                assert last[name] == pytest.approx(layer.gate.tolist(), abs=1e-7)
            values = [abs(value) for scores in last.values() for value in scores]
            assert records[-1]["mean_gate"] == pytest.approx(sum(values) / len(values), abs=1e-7)
            assert records[0]["gates"] != last


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
        gate_lr=0.3, penalty=0.2, selection_warmup=0.0, max_steps=16, lora_dropout=0.1, log_every=1, inactive="frozen"
    )
    plain, counted = ready(make_model, settings), ready(make_model, settings)
    train(plain, data, None, settings)
    result = train(counted, data, None, settings.replace(count_flops=True))
    assert difference(plain, counted) == 0.0
    per_step = [b["flops"] - a["flops"] for a, b in zip(result.history, result.history[1:], strict=False)]
    base, head = sum(2 * 8 * k * n for k, n in [(16, 24), (24, 24), (24, 16)]), 2 * 8 * 16 * 4
    assert per_step[-1] == base + 2 * head < per_step[0]


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


MOVING = {"gate_lr": 0.3, "penalty": 0.2, "selection_warmup": 0.0}


def run_of(rank: int, processes: int, folder: Path, chooses: dict[str, Any]) -> list[Any]:
    """The accuracy, FLOPs, blocks and sum of all parameters of a run with 16 images a step in all processes."""
    generator = torch.Generator().manual_seed(3)
    images, labels = torch.rand(64, 16, generator=generator), torch.randint(4, (64,), generator=generator)
    settings = TrainSettings(
        r=2, max_steps=10, batch_size=16 // processes, device="cpu", precision="fp32", optimizer="sgd", lr=0.1,
        clip_norm=0.0, tensorboard=False, modules_to_save=["2"], blocks=4, **chooses,
    )  # fmt: skip
    torch.manual_seed(7)
    model = prepare(nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 4)), settings=settings)
    result = train(model, (images, labels), (images, labels), settings, folder)
    total = sum(parameter.double().sum().item() for parameter in model.parameters())
    left = [i for blocks in result.active_blocks[-1][1].values() for i in blocks]
    # A rounded sum of a few hundred parameters.
    return [result.accuracy, result.flops, len(result.active_blocks), left, pytest.approx(total, rel=1e-6)]


@pytest.mark.parametrize(
    "chooses",
    [MOVING, {"strategy": "sensitivity", "budget": 2}, {"strategy": "random", "budget": 0.5, "budget_unit": "flops"}],
    ids=["gates", "sensitivity", "random"],
)
def test_two_processes_compute_what_one_does(
    two_processes: Callable[..., list[Any]], tmp_path: Path, chooses: dict[str, Any]
) -> None:
    first, second = two_processes(run_of, 2, tmp_path / "two", chooses)
    one = run_of(0, 1, tmp_path / "one", chooses)
    if chooses.get("strategy") == "sensitivity":
        # Each process measures on all samples.
        first[1] = second[1] = one[1]
    assert first == second
    assert first == one
    # Only one process writes.
    names = [[path.name for path in sorted((tmp_path / folder).rglob("*"))] for folder in ("one", "two")]
    assert names[0] == names[1]


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
