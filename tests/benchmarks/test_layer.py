"""The ways to compute one layer agree with the reference, and one that does not is found out."""

from __future__ import annotations

import pytest
import torch

from benchmarks.contenders.layer import CONTENDERS, SCALING, Problem, Shape, mistake
from benchmarks.results import Missing

SHAPES = [Shape(12, 18, 7, 3, active, blocks, "fp32") for active, blocks in ((1, 1), (0, 1), (2, 3), (0, 3))]
SHAPES.append(Shape(12, 18, 7, 3, 1, 1, "bf16"))


@pytest.mark.parametrize("shape", SHAPES, ids=lambda shape: f"{shape.active} of {shape.blocks}, {shape.dtype}")
@pytest.mark.parametrize("name", [name for name in CONTENDERS if name != "PEFT, compiled"])
def test_every_way_is_right_or_says_why_it_cannot(name: str, shape: Shape) -> None:
    problem = Problem(shape, "cpu", sets=2)
    try:
        layer = CONTENDERS[name](problem)
    except Missing as reason:
        pytest.skip(str(reason))
    found = layer.trained(problem.xs[0], problem.dys[0])
    assert mistake(found, problem.exact(layer.updates), layer.wanted(shape)) is None
    torch.testing.assert_close(layer.inferred(problem.xs[0]), found["y"], rtol=0.02, atol=1e-2)
    # By hand, in fp64, for what is wrong in contender and reference alike.
    x, W, b = (t.detach().double() for t in (problem.xs[0], problem.W, problem.b))
    n = shape.N // shape.blocks
    for i in shape.chosen if layer.updates else ():
        W[i * n : (i + 1) * n] += SCALING * problem.B[i].double() @ problem.A[i].double()
    tolerance = 4 * torch.finfo(problem.dtype).eps
    torch.testing.assert_close(found["y"].double(), x @ W.T + b, rtol=tolerance, atol=20 * tolerance)
    torch.testing.assert_close(found["dx"].double(), problem.dys[0].double() @ W, rtol=tolerance, atol=20 * tolerance)


@pytest.mark.parametrize("name", ["y", "dx", "lora_A", "lora_B", "gate"])
def test_a_mistake_in_any_result_is_found(name: str) -> None:
    problem = Problem(SHAPES[0], "cpu", sets=1)
    layer = CONTENDERS["slora, torch"](problem)
    found = layer.trained(problem.xs[0], problem.dys[0])
    exact = problem.exact(layer.updates)
    wanted = layer.wanted(problem.shape)
    assert wanted == set(found)
    assert mistake(found, exact, wanted) is None
    found[name] = found[name] * 1.001 + 1e-3
    assert str(mistake(found, exact, wanted)).startswith(f"{name} is off by")
    found[name] = found[name] * float("nan")
    assert mistake(found, exact, wanted) is not None
    del found[name]
    assert mistake(found, exact, wanted) == f"{name} was not computed"


def test_a_layer_whose_update_is_not_trained_is_refused() -> None:
    from benchmarks.cases.linear import checked

    problem = Problem(SHAPES[0], "cpu", sets=1)
    layer = CONTENDERS["addmm function"](problem)
    assert "refused" not in checked(layer, problem)
    # The right output and dx, but A and B stand outside the graph.
    A, B = (t.detach() for t in layer.parameters.values())
    layer.forward = lambda x: torch.nn.functional.linear(x, problem.W, problem.b) + SCALING * (x @ A.T) @ B.T
    assert checked(layer, problem) == {"refused": "lora_A and lora_B were not computed"}


def test_a_contender_restores_the_backend_that_was_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    import os

    monkeypatch.setenv("SLORA_BACKEND", "reference")
    problem = Problem(SHAPES[0], "cpu", sets=1)
    CONTENDERS["slora, torch"](problem).trained(problem.xs[0], problem.dys[0])
    assert os.environ["SLORA_BACKEND"] == "reference"


@pytest.mark.parametrize(("first", "last", "form"), [("fused", "fused", "fused"), ("split", "cublas_after", None)])
def test_the_forms_that_a_call_takes_are_seen(
    first: str, last: str, form: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    from benchmarks.contenders import forms
    from slora.ops.backends import triton

    def call() -> None:
        for operation, name in (("forward", first), ("input gradient", last), ("weight gradients", "one_pass")):
            made = [triton.Form(name)]
            key, rows = (operation, 8, 8, 1, 1, 4, torch.float16, False, True), torch.zeros(1, 1)
            triton._run(SimpleNamespace(rows=rows, key=key, forms=lambda made=made: made, compute=lambda form: form))

    monkeypatch.setattr(triton, "_chosen", {})
    assert forms.taken_by(call, "cpu") == (form or f"{first}/{last}")
    assert forms.taken_by(lambda: None, "cpu") is None


def test_bytes_are_those_of_the_forms_that_were_chosen(monkeypatch: pytest.MonkeyPatch) -> None:
    from benchmarks import counting
    from benchmarks.cases.linear import measure
    from benchmarks.contenders import forms
    from benchmarks.results import Settings

    monkeypatch.setattr(forms, "taken_by", lambda call, device: "split/cublas_after")
    ceilings = {"gemm_flops_per_s": {"fp32": 1e9}, "copy_bytes_per_s": 1e8}
    (row,) = measure(SHAPES[0], Settings("cpu", "tiny"), ceilings, {"slora, torch"})
    assert row["form"] == "split/cublas_after"
    assert row["bytes"] == counting.bytes_moved("split/cublas_after", 7, 18, 12, 4)
    assert row["percent_of_copy"] == pytest.approx(100 * row["bytes"] / row["forward_backward"]["median"] / 1e8)


def test_active_blocks_are_spread_and_as_many_as_asked() -> None:
    assert Shape(8, 32, 4, 2, 4, 16, "fp32").chosen == [0, 4, 8, 12]
    assert Shape(8, 32, 4, 2, 0, 16, "fp32").chosen == []
    assert Shape(8, 32, 4, 2, 4, 16, "fp32").point["active"] == "4/16"
