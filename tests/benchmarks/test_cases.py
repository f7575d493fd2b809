"""Cases refuse what is wrong, and every one says what it measures."""

from __future__ import annotations

import importlib
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import slora
from benchmarks import counting, models, results, roofline, timing
from benchmarks.cases import inference, linear, scaling, train_step
from benchmarks.cases import merge as merging
from benchmarks.contenders import layer as layers
from benchmarks.contenders.step import Step
from benchmarks.results import CASES, GRIDS, BenchmarkError, Case, Settings, read_result
from slora.models.inject import unload

CEILINGS = {"gemm_flops_per_s": {"fp32": 1e9, "bf16": 1e9}, "copy_bytes_per_s": 1e9}


def test_every_file_of_cases_is_in_the_registry_and_says_what_it_measures() -> None:
    folder = Path(linear.__file__).parent
    assert {path.stem for path in folder.glob("[a-z]*.py")} == set(CASES)
    for name in CASES:
        module = importlib.import_module(f"benchmarks.cases.{name}")
        assert module.__doc__
        assert callable(module.run)


def test_the_grid_on_a_gpu_begins_with_the_bars_and_the_full_grid_is_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    points = [shape.point for shape in linear.grid(Settings("cuda"))]
    bars = [(K, N, active) for active in ("1", "0") for K, N in linear.BAR_SHAPES]
    assert [(p["K"], p["N"], p["active"]) for p in points[:12]] == bars
    assert all((p["M"], p["r"], p["dtype"]) == (50432, 16, "bf16") for p in points[:12])
    full = {tuple(shape.point.values()) for shape in linear.grid(Settings("cuda", "full"))}
    assert len(full) == 8 * 3 * 4 * 4 * 2
    for grid in GRIDS:
        for case in (linear, scaling, train_step, inference):
            assert case.grid(Settings("cuda", grid))


def test_a_step_is_compiled_on_the_cpu_too() -> None:
    *eager, compiled = train_step.grid(Settings("cpu"))
    assert {mode for _, _, _, mode, _ in eager} == {"eager"}
    assert compiled == (
        "vit-s", 16, "fp32", "compile", ["frozen, dx everywhere", "PEFT, all", "slora, all active"]
    )  # fmt: skip


def test_a_time_is_set_beside_the_floor_of_its_point() -> None:
    point = linear.shape(768, 768, 1000)
    extra = 2 * 2 * 768 * 1000 / 1e9 + 2 * 1000 * 16 * 3 * 2 * 768 / 1e9
    found = linear.beside_floor(point, 1.0 + 1.7 * extra, 1.0, 2, CEILINGS)
    assert found["floor_seconds"] == pytest.approx(1.0 + extra)
    assert found["over_floor"] == pytest.approx(1.7)
    assert found["of_floor"] == pytest.approx((1.0 + extra) / (1.0 + 1.7 * extra))


def test_fp32_is_exact_in_every_product_of_a_case(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str] = []

    def case(settings: Settings, limits: object) -> Iterator[dict[str, Any]]:
        seen.extend([torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision])
        # The older switch can still be read: PyTorch raises where the two contradict each other.
        assert not torch.backends.cudnn.allow_tf32
        yield {"point": {"i": 0}, "contender": "a"}

    monkeypatch.setattr(Case, "load", lambda self: case)
    monkeypatch.setattr(roofline, "measure", lambda *args: {})
    switches = torch.backends.cuda.matmul, torch.backends.cudnn.conv
    before = [switch.fp32_precision for switch in switches]
    try:
        for switch in switches:
            switch.fp32_precision = "tf32"
        results.run_case(Case("own", ""), Settings("cpu", "tiny"), tmp_path)
    finally:
        for switch, precision in zip(switches, before, strict=True):
            switch.fp32_precision = precision
    assert seen == ["ieee", "ieee"]


def test_where_an_adapted_model_computes_something_else_nothing_of_slora_is_timed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("timm")
    assert train_step.injection_mistake(models.find("tiny"), "cpu") is None
    project = slora.layers.LoRABlocks.project
    monkeypatch.setattr(slora.layers.LoRABlocks, "project", lambda self, x, *args: 1.001 * project(self, x, *args))
    settings = Settings("cpu", "tiny", only=("head only", "slora, all active"))
    rows = train_step.measure(settings, CEILINGS, "tiny", 2, "fp32", "eager", train_step.USUAL)
    assert "seconds" in rows[0]
    assert {row.get("refused") for row in rows[1:]} == {"the adapted model does not compute what its base does"}


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_an_update_that_a_merge_leaves_out_is_not_timed_in_any_dtype(
    dtype: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("peft")
    prepare, _ = inference.CONTENDERS["slora, merged"]
    monkeypatch.setitem(inference.CONTENDERS, "slora, merged", (prepare, unload))
    rows = {row["contender"]: row for row in inference.measure(
        Settings("cpu", "tiny"), CEILINGS, models.find("tiny"), 2, dtype
    )}  # fmt: skip
    assert "its output is off by" in rows.pop("slora, merged")["refused"]
    assert all("seconds" in row for row in rows.values())
    assert "PEFT, merged" in rows


def test_updates_that_rounding_hides_are_not_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(models, "UPDATE", 1e-4)
    row: dict[str, object] = {"contender": "slora, merged"}
    model = models.find("tiny")
    assert inference.ready(row, model, "bf16", model.inputs(2, "cpu", torch.bfloat16)) is None
    assert str(row["refused"]).endswith("whether they are there cannot be told")


def test_a_step_whose_loss_is_not_finite_is_not_timed_and_the_others_are(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")
    backward = Step.backward

    def diverges(self: Step, *arguments: object) -> torch.Tensor:
        loss = backward(self, *arguments)  # type: ignore[arg-type]
        return loss * float("nan") if slora.gates.gates(self.net) and len(self.losses) == 4 else loss

    monkeypatch.setattr(Step, "backward", diverges)
    settings = Settings("cpu", "tiny", only=("head only", "slora, none"))
    rows = train_step.measure(settings, CEILINGS, "tiny", 2, "fp32", "eager", train_step.USUAL)
    assert "seconds" in rows[0]
    assert rows[1]["refused"].startswith("the loss of 1 of ")
    assert "seconds" not in rows[1]


COUNTED = {"flops", "flops_per_s", "percent_of_gemm", "compulsory_bytes", "percent_of_copy", "input_sets"}


@pytest.mark.parametrize("precision", ["fp32", "amp"])
def test_a_step_is_counted_beside_its_time(precision: str) -> None:
    pytest.importorskip("timm")
    settings = Settings("cpu", "tiny", only=("head only", "slora, none"))
    rows = train_step.measure(settings, CEILINGS, "tiny", 2, precision, "eager", train_step.USUAL)
    assert [row["contender"] for row in rows] == ["head only", "slora, none active, frozen"]
    for row in rows:
        assert row.keys() >= COUNTED
        assert row["percent_of_gemm"] == pytest.approx(100 * row["flops"] / row["seconds"]["median"] / 1e9)
    # Without an active block nothing more is computed than without blocks.
    assert rows[0]["flops"] == rows[1]["flops"]


def test_a_forward_is_counted_beside_its_time() -> None:
    pytest.importorskip("timm")
    settings = Settings("cpu", "tiny", only=("base", "slora, all"))
    base, adapted = inference.measure(settings, CEILINGS, models.find("tiny"), 2, "fp32")
    assert base.keys() >= COUNTED
    assert base["percent_of_copy"] == pytest.approx(100 * base["compulsory_bytes"] / base["seconds"]["median"] / 1e9)
    assert base["flops"] < adapted["flops"]
    assert base["compulsory_bytes"] < adapted["compulsory_bytes"]


def test_a_step_that_cannot_be_counted_is_timed_all_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("timm")

    def refuses(call: object) -> int:
        raise AssertionError("no formula")

    monkeypatch.setattr(counting, "flops", refuses)
    settings = Settings("cpu", "tiny", only=("head only",))
    (row,) = train_step.measure(settings, CEILINGS, "tiny", 2, "fp32", "eager", train_step.USUAL)
    assert row["not_counted"] == "AssertionError: no formula"
    assert row["seconds"]["median"] > 0
    assert "percent_of_gemm" not in row


def test_a_contender_that_fails_while_it_is_timed_costs_the_others_nothing_and_the_run_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def fails_in_the_backward(problem: layers.Problem) -> layers.Layer:
        layer = layers.addmm_function(problem)
        trained, calls = layer.trained, iter(range(8))

        def failing(x: torch.Tensor, dy: torch.Tensor) -> dict[str, torch.Tensor]:
            if next(calls, None) is None:
                raise RuntimeError("out of memory")
            return trained(x, dy)

        layer.trained = failing  # type: ignore[method-assign]
        return layer

    monkeypatch.setitem(layers.CONTENDERS, "addmm function", fails_in_the_backward)
    monkeypatch.setattr(linear, "grid", lambda settings: [linear.shape(32, 48, 24, 4, dtype="fp32")])
    monkeypatch.setattr(roofline, "measure", lambda *args: CEILINGS)
    settings = Settings("cpu", "tiny", rounds=5, only=("frozen", "addmm"))
    with pytest.raises(BenchmarkError, match="an implementation failed: addmm function at"):
        results.run_case(CASES["linear"], settings, tmp_path)
    result = read_result(tmp_path / "linear.json")
    rows = {row["contender"]: row for row in result["rows"]}
    assert rows["frozen F.linear"].keys() >= {"forward", "forward_backward"}
    assert rows["addmm function"].keys() == {"point", "contender", "failed"}
    assert result["complete"] is True
    assert result["settings"]["order_seed"] == timing.ORDER_SEED


def test_scaling_gives_the_deviation_from_the_model_of_costs(monkeypatch: pytest.MonkeyPatch) -> None:
    # Round by round the update takes 0.3, 0.5 and 0.1, whatever the machine does.
    frozen = iter([[1.0, 1.1, 2.0], [1.2] * 3])

    def times(calls: dict[str, object], *args: object, **kwargs: object) -> dict[str, object]:
        contestant, limits = type("Contestant", (), {"clock": "wall", "reason": None})(), next(frozen)
        own = [limit + more for limit, more in zip(limits, (0.3, 0.5, 0.1), strict=True)]
        return {name: (limits if name == layers.FROZEN else own, contestant) for name in calls}

    monkeypatch.setattr(linear, "interleaved", times)
    settings = Settings("cpu", "tiny")
    shapes = [
        ("rank", layers.Shape(32, 48, 24, 4, 1, 1, "fp32")),
        ("active", layers.Shape(32, 48, 24, 4, 0, 16, "fp32")),
    ]
    monkeypatch.setattr(scaling, "grid", lambda settings: shapes)
    row, inactive = [row for row in scaling.run(settings, CEILINGS) if row["contender"] == "slora, torch"]
    # addmm moves 4 MK + 4 MN elements more, and there are six products of rank 4.
    update = 4 * 4 * 24 * (32 + 48) / 1e9 + 6 * 24 * 4 * (32 + 48) / 1e9
    assert row["predicted"] == pytest.approx(1.1 + update)
    assert row["deviation"] == pytest.approx(1.6 / (1.1 + update) - 1)
    assert row["update_seconds"]["median"] == pytest.approx(0.3)
    assert row["update_deviation"] == pytest.approx(0.3 / update - 1)
    assert row["point"]["curve"] == "rank"
    assert inactive["deviation"] == pytest.approx(1.5 / 1.2 - 1)
    assert "update_deviation" not in inactive


@pytest.mark.parametrize("name", ["tiny", "tiny-llama"])
def test_a_model_has_inputs_a_loss_and_few_layers(name: str) -> None:
    model = models.find(name)
    net = model.build("cpu")
    loss = model.loss(net, model.inputs(2, "cpu", torch.float32))
    assert loss.dim() == 0
    assert loss.isfinite()
    assert all(isinstance(net.get_submodule(layer), nn.Linear) for layer in model.few(net))


@pytest.mark.once
def test_clip_has_a_contrastive_loss_and_few_layers_in_both_towers() -> None:
    pytest.importorskip("open_clip")
    model = models.find("clip")
    net = model.build("cpu")
    assert all(isinstance(net.get_submodule(layer), nn.Linear) for layer in model.few(net))
    loss = model.loss(net, model.inputs(3, "cpu", torch.float32))
    loss.backward()
    for tower in ("visual.transformer", "transformer"):
        weight = net.get_parameter(f"{tower}.resblocks.11.mlp.c_fc.weight")
        assert weight.grad is not None
        assert weight.grad.abs().sum() > 0


def test_an_unknown_model_is_refused() -> None:
    with pytest.raises(BenchmarkError, match="model 'vit' is unknown"):
        models.find("vit")


def test_steps_in_bf16_are_left_out_where_bf16_is_imitated(monkeypatch: pytest.MonkeyPatch) -> None:
    measured = []
    monkeypatch.setattr(train_step, "measure", lambda *arguments: measured.append(arguments[4]) or [])
    rows = list(train_step.run(Settings(), {"gemm_flops_per_s": {"fp32": 250e9, "bf16": 50e9}}))
    assert set(measured) == {"fp32"}
    assert {row["point"]["precision"] for row in rows} == {"bf16", "amp"}
    assert all("at 50 GFLOP/s, in fp32 at 250" in row["skipped"] for row in rows)
    measured.clear()
    assert not list(train_step.run(Settings(), {"gemm_flops_per_s": {"fp32": 250e9, "bf16": 450e9}}))
    assert set(measured) == {"fp32", "bf16", "amp"}


@pytest.mark.parametrize("backward", [False, True])
def test_what_only_a_cuda_graph_would_compute_wrongly_is_refused(
    backward: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    right = slora.ops.apply

    def wrong_on_device(*arguments: Any) -> torch.Tensor:
        y = right(*arguments)
        # Where the host knows the active blocks, or else with a gradient that is not looked at, nothing is wrong.
        return y * 1.1 if arguments[3].active is None and torch.is_grad_enabled() == backward else y

    monkeypatch.setattr(slora.ops, "apply", wrong_on_device)
    settings = Settings("cpu", "tiny", only=("slora, torch",))
    (row,) = linear.measure(linear.shape(32, 48, 24, 4, dtype="fp32"), settings, CEILINGS, set(layers.CONTENDERS))
    assert row["refused"].startswith("with gates on the device y is off" if backward else "without gradients y is off")
    (row,) = inference.measure(Settings("cpu", "tiny", only=("slora, all",)), CEILINGS, models.find("tiny"), 2, "fp32")
    assert ("its output is off by" in row.get("refused", "")) == (not backward)


def _fails(*arguments: Any, **named: Any) -> Any:
    raise RuntimeError("CUDA out of memory")


def test_a_point_that_cannot_be_made_costs_no_other_point_anything(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = Settings("cpu", "tiny", only=("PEFT", "copy", "frozen"))
    monkeypatch.setattr(linear, "Problem", _fails)
    monkeypatch.setattr(train_step, "injection_mistake", _fails)
    monkeypatch.setattr(merging.merge, "Case", _fails)
    found = [
        linear.measure(linear.shape(32, 48, 24, 4, dtype="fp32"), settings, CEILINGS, set(layers.CONTENDERS)),
        train_step.measure(settings, CEILINGS, "tiny", 2, "fp32", "eager", train_step.USUAL),
        inference.measure(settings, CEILINGS, models.find("tiny"), 2, "fp32"),
        merging.measure(settings, CEILINGS, "vit_tiny_patch16_224", "fp32", 4),
    ]
    for rows in found:
        assert len(rows) >= 2
        for row in rows:
            assert row.keys() == {"point", "contender", "failed"}
            assert row["failed"] == "RuntimeError: CUDA out of memory"


def test_on_a_gpu_slora_is_checked_on_the_batch_that_is_timed_where_its_truth_fits() -> None:
    timed = (SimpleNamespace(device=torch.device("cuda")),)
    model = SimpleNamespace(inputs=lambda batch, device, dtype: f"{batch} on {device}")
    seen: list[Any] = []

    def check(inputs: Any) -> str | None:
        seen.append(inputs)
        return "y is off" if inputs is timed else None

    def found(contender: str, check: Any) -> tuple[str | None, dict[str, Any]]:
        row = {"contender": contender}
        seen.clear()
        return train_step.mistake_in(row, model, timed, torch.float32, check), row  # type: ignore[arg-type]

    assert found("slora, all active", check)[0] == "on the batch that is timed y is off"
    assert seen == ["2 on cuda", timed]
    assert found("PEFT, all", check)[0] is None
    assert seen == ["2 on cuda"]

    def too_large(inputs: Any) -> None:
        if inputs is timed:
            raise torch.cuda.OutOfMemoryError("no room")

    assert found("slora, all active", too_large) == (
        None, {"contender": "slora, all active", "checked_on_two": "OutOfMemoryError: no room"}
    )  # fmt: skip
