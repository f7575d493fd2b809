"""Every case runs end to end, and what computes something wrong or fails is not timed, while the others are."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from typing import Any

import pytest
import torch

import slora
from benchmarks import memory, models, results, roofline
from benchmarks.cases import linear, merge, model
from benchmarks.cases.rounds import measuring
from benchmarks.correctness import mismatch
from benchmarks.implementations import layer as layers
from benchmarks.implementations import training
from benchmarks.results import BenchmarkError, Row, Settings, read_result
from slora.ops.flops import count_flops

ROOFLINE = {"gemm_flops_per_s": {"fp32": 1e9, "bf16": 1e9}, "copy_bytes_per_s": 1e9}
SHAPES = [layers.Shape(12, 18, 7, 3, *active) for active in ((1, 1), (0, 1), (2, 3), (0, 3))]
SHAPES.append(layers.Shape(12, 18, 7, 3, dtype="bf16"))
POINTS = [model.Point("tiny", 2, precision) for precision in ("fp32", "bf16", "amp")]
FORWARD = model.Point("tiny", 2, "bf16", "forward")
# A point of every case: enough to see it run.
FEW = {"linear": "slora", "train_step": "head", "gates": "exact", "inference": "merged", "host": "slora"}


def _rows(case: str, only: str = "") -> dict[str, Row]:
    """The rows of the first point of a case, by implementation."""
    module = importlib.import_module(f"benchmarks.cases.{results.CASES[case].module}")
    settings = Settings("cpu", "tiny", (only,) if only else ())
    point, *_ = module.grid(settings, case)
    return {row["contender"]: row for row in module.measure(point, settings, ROOFLINE, case)}


@pytest.mark.parametrize("case", list(results.CASES))
def test_a_tiny_run_of_every_case_writes_a_file_with_times(
    case: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm")
    if case == "merge" and not slora.merging.extension_info()["available"]:
        pytest.skip("slora._C is not built")
    module = importlib.import_module(f"benchmarks.cases.{results.CASES[case].module}")
    points = module.grid(Settings("cpu", "tiny"), case)[:2]
    monkeypatch.setattr(module, "grid", lambda *_: points)
    settings = Settings("cpu", "tiny", only=(FEW[case],) if case in FEW else ())
    path = results.run_case(case, settings, tmp_path)
    rows = read_result(path)["rows"]
    assert all(row.keys() & {"seconds", "forward_backward", "skipped"} for row in rows)
    assert any("skipped" not in row for row in rows)


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.active} of {shape.blocks}, {shape.dtype}")
@pytest.mark.parametrize("name", [name for name in layers.IMPLEMENTATIONS if name != "PEFT, compiled"])
def test_every_way_to_compute_a_layer_is_right_or_says_why_it_cannot(name: str, shape: layers.Shape) -> None:
    problem = layers.Problem(shape, "cpu", sets=1)
    try:
        layer = layers.IMPLEMENTATIONS[name](problem)
    except results.Missing as reason:
        pytest.skip(str(reason))
    found = layer.trained(problem.xs[0], problem.dys[0])
    assert mismatch(found, problem.exact(layer.updates), layer.wanted(shape)) is None
    # By hand, in fp64, for what is wrong in implementation and reference alike.
    x, W, b = (t.detach().double() for t in (problem.xs[0], problem.W, problem.b))
    n = shape.N // shape.blocks
    for i in shape.chosen if layer.updates else ():
        W[i * n : (i + 1) * n] += layers.SCALING * problem.B[i].double() @ problem.A[i].double()
    tolerance = 4 * torch.finfo(problem.dtype).eps
    torch.testing.assert_close(found["y"].double(), x @ W.T + b, rtol=tolerance, atol=20 * tolerance)
    torch.testing.assert_close(found["dx"].double(), problem.dys[0].double() @ W, rtol=tolerance, atol=20 * tolerance)


@pytest.mark.parametrize("name", ["y", "dx", "lora_A", "lora_B", "gate"])
def test_a_mismatch_in_any_result_is_found(name: str) -> None:
    problem = layers.Problem(SHAPES[0], "cpu", sets=1)
    layer = layers.IMPLEMENTATIONS["slora, torch"](problem)
    found, exact, wanted = layer.trained(problem.xs[0], problem.dys[0]), problem.exact(True), layer.wanted(SHAPES[0])
    assert wanted == set(found)
    found[name] = found[name] * 1.001 + 1e-3
    assert str(mismatch(found, exact, wanted)).startswith(f"{name} is off by")
    found[name] = found[name] * float("nan")
    assert mismatch(found, exact, wanted) is not None
    del found[name]
    assert mismatch(found, exact, wanted) == f"{name} was not computed"


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.precision)
@pytest.mark.parametrize("name", list(training.TRAINING))
def test_every_way_to_train_is_right(name: str, point: model.Point) -> None:
    pytest.importorskip("timm")
    if name.startswith("PEFT"):
        pytest.importorskip("peft")
    run = model.checked(name, point, "cpu")
    # Nothing was trained by the check, and steps are finite.
    run(run.model.inputs(2, "cpu", run.dtype))
    assert all(loss.isfinite() for loss in run.losses)


@pytest.mark.parametrize("point", POINTS, ids=lambda point: point.precision)
def test_a_wrong_result_of_the_layer_is_refused_in_any_precision(
    point: model.Point, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("timm")
    right = slora.ops.apply

    def without_update(x: Any, weight: Any, bias: Any, *rest: Any) -> Any:
        y = right(x, weight, bias, *rest)
        # Only slora's reference, which judges, is left alone.
        return y if slora.ops.dispatch.setting() == "reference" else torch.nn.functional.linear(x, weight, bias) + 0 * y

    monkeypatch.setattr(slora.ops, "apply", without_update)
    with pytest.raises(results.Wrong, match="is off by"):
        model.checked("slora, all active", point, "cpu")


@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_what_only_a_cuda_graph_would_compute_wrongly_is_refused(
    backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = slora.ops.apply

    def wrong_on_device(*arguments: Any) -> torch.Tensor:
        # Where the host knows the active blocks, nothing is wrong.
        wrong = arguments[3].active is None and torch.is_grad_enabled() == backward
        return right(*arguments) * (1.1 if wrong else 1.0)

    monkeypatch.setattr(slora.ops, "apply", wrong_on_device)
    row = _rows("linear", "slora, torch")["slora, torch"]
    assert row["refused"].endswith("gates_on_device)")
    assert "forward_backward" not in row


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_update_that_a_merge_leaves_out_is_not_timed_in_any_dtype(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    way = training.INFERENCE["slora, merged"]
    monkeypatch.setitem(training.INFERENCE, "slora, merged", way._replace(finish=slora.models.inject.unload))
    with pytest.raises(results.Wrong, match="output is off by"):
        model.checked("slora, merged", FORWARD._replace(precision=dtype), "cpu")
    assert model.checked("PEFT, merged", FORWARD._replace(precision=dtype), "cpu")


def test_a_step_whose_loss_is_not_finite_is_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    backward = training.Run._backward
    monkeypatch.setattr(
        training.Run,
        "_backward",
        lambda self, *rest: backward(self, *rest) * (1 if len(self.losses) != 4 else math.nan),
    )
    row = _rows("gates", "head")["head only"]
    assert row["refused"] == "the loss of a step is not finite"
    assert "seconds" not in row


def test_flops_rates_and_memory_are_set_beside_a_time() -> None:
    pytest.importorskip("timm")
    rows = {**_rows("gates", "head"), **_rows("train_step", "none active")}
    for row in rows.values():
        assert row["percent_of_gemm"] == pytest.approx(100 * row["flops"] / row["seconds"]["median"] / 1e9)
        assert row["images_per_second"] == pytest.approx(2 / row["seconds"]["median"])
        assert row["peak_memory_mib"] >= 0
    # Without an active block nothing more is computed than without blocks.
    assert rows["head only"]["flops"] == rows["slora, none active, frozen"]["flops"]


def test_a_layer_is_set_beside_the_frozen_one_and_the_floor(monkeypatch: pytest.MonkeyPatch) -> None:
    point = layers.Shape(32, 48, 24, 4, 1, 2)
    times = {layers.FROZEN: 1.1, "slora, torch": 1.6}

    def take_times(rows: dict[str, Row], *arguments: Any, **options: Any) -> None:
        for name, row in rows.items():
            row["forward_backward"] = {"median": times[name]}

    monkeypatch.setattr(linear, "take_times", take_times)
    rows: dict[str, Row] = {name: {} for name in times}
    linear.fill(rows, point, Settings("cpu", "tiny"), ROOFLINE)
    # x and half of dy are read once more in fp32, and there are six products of rank 4 with the one block.
    update = 4 * 24 * (32 + 24) / 1e9 + 6 * 24 * 4 * (32 + 24) / 1e9
    row = rows["slora, torch"]
    assert row["over_floor"] == pytest.approx(0.5 / update)
    assert row["of_floor"] == pytest.approx((1.1 + update) / 1.6)
    assert "over_floor" not in rows[layers.FROZEN]


def test_flops_are_those_of_the_closed_forms() -> None:
    K, N, M, R = 24, 36, 10, 4
    base, wide, narrow = 2 * M * N * K, 2 * M * R * K, 2 * M * R * N
    # The addmm function saves x only and computes S again.
    for name, expected in ((layers.FROZEN, 2 * base), ("full", 3 * base), ("PEFT", 2 * base + 3 * wide + 3 * narrow),
                           ("slora, torch", 2 * base + 3 * wide + 3 * narrow),
                           ("addmm function", 2 * base + 4 * wide + 3 * narrow)):  # fmt: skip
        problem = layers.Problem(layers.Shape(K, N, M, R), "cpu", sets=1)
        layer = layers.IMPLEMENTATIONS[name](problem)
        assert count_flops(layer.counted, problem.xs[0], problem.dys[0]) == expected
    assert linear.lora_flops(layers.Shape(K, N, M, R)) == 3 * wide + 3 * narrow


def test_the_frozen_limit_computes_all_but_the_update() -> None:
    pytest.importorskip("timm")
    batch, tokens, width, depth, vit = 2, 5, 24, 3, models.MODELS["tiny"]
    flops, inputs = {}, vit.inputs(batch, "cpu", torch.float32)
    for name in ("frozen, dx everywhere", "slora, all active"):
        run = training.Run(training.TRAINING[name], vit, "fp32", "cpu", "eager")
        run(inputs)
        flops[name] = count_flops(run, inputs)
    sizes = [(width, 3 * width, 3), (width, width, 1), (width, 4 * width, 1), (4 * width, width, 1)]
    shapes = [layers.Shape(K, N, batch * tokens, training.RANK, blocks, blocks) for K, N, blocks in sizes]
    # The first layer's input needs no gradient.
    update = depth * sum(map(linear.lora_flops, shapes)) - 3 * 2 * batch * tokens * training.RANK * width
    assert flops["slora, all active"] - flops["frozen, dx everywhere"] == update


@pytest.mark.parametrize("state", ["refused", "failed"])
def test_one_implementation_that_is_wrong_or_fails_costs_the_others_nothing_and_the_run_says_so(
    state: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(problem: layers.Problem) -> layers.Layer:
        layer = layers.addmm_function(problem)
        trained, calls = layer.trained, iter(range(8))

        def failing(x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
            if state == "failed" and next(calls, None) is None:
                raise RuntimeError("out of memory")
            return {name: t * (1.1 if state == "refused" else 1) for name, t in trained(x, dy).items()}

        layer.trained = failing  # type: ignore[method-assign]
        return layer

    monkeypatch.setitem(layers.IMPLEMENTATIONS, "addmm function", broken)
    monkeypatch.setattr(linear, "grid", lambda *arguments: [layers.Shape(32, 48, 24, 4)])
    monkeypatch.setattr(roofline, "measure", lambda *arguments: ROOFLINE)
    said = {"refused": "a wrong result was not timed", "failed": "an implementation failed"}[state]
    with pytest.raises(BenchmarkError, match=f"{said}: addmm function at"):
        results.run_case("linear", Settings("cpu", "tiny", only=("frozen", "addmm")), tmp_path)
    result = read_result(tmp_path / "linear.json")
    rows = {row["contender"]: row for row in result["rows"]}
    assert rows["frozen F.linear"].keys() >= {"forward", "forward_backward"}
    assert rows["addmm function"].keys() == {"point", "contender", state}
    assert result["complete"] is True


def test_a_point_that_cannot_be_made_costs_no_other_point_anything() -> None:
    with measuring({"i": 0}, ("a", "b"), Settings("cpu", "tiny")) as rows:
        rows["a"]["seconds"] = 1.0
        raise RuntimeError("CUDA out of memory")
    assert rows["b"] == {"point": {"i": 0}, "contender": "b", "failed": "RuntimeError: CUDA out of memory"}
    assert "failed" not in rows["a"]


@pytest.mark.skipif(not slora.merging.extension_info()["available"], reason="slora._C is not built")
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_merge_without_its_update_is_refused_and_the_weights_are_restored(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    weights = merge.Weights("vit_tiny_patch16_224", dtype, 4, "cpu")
    for name in merge.IMPLEMENTATIONS:
        merge.check(weights, name)
    for name in list(merge.IMPLEMENTATIONS)[1:]:
        right = merge.IMPLEMENTATIONS[name]
        monkeypatch.setitem(merge.IMPLEMENTATIONS, name, lambda weights, right=right: (right(weights), lambda: None)[1])
        with pytest.raises(results.Wrong, match="is off by"):
            merge.check(weights, name)
        monkeypatch.setitem(merge.IMPLEMENTATIONS, name, right)
        merge.check(weights, name)


@pytest.mark.once
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory of a process is read on Linux only")
def test_memory_is_the_peak_since_it_was_begun_and_not_what_was_before() -> None:
    torch.zeros(256 * 2**18)
    before = memory.begin("cpu")
    torch.zeros(64 * 2**18)
    assert memory.peak("cpu") - before == pytest.approx(64, rel=0.05)
