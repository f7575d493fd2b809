"""The ways to compute one layer agree with the reference, and one that does not is found out."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.contenders.layer import CONTENDERS, SCALING, Problem, Shape, mistake
from benchmarks.contenders.peers import Missing

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


@pytest.mark.parametrize(
    ("first", "last", "form"),
    [("fused", "fused", "fused"), ("concat", "addmm", "concat/addmm"), ("accumulate", "fused", "accumulate/fused")],
)
def test_bytes_are_those_of_the_forms_that_were_chosen(
    first: str, last: str, form: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As `auto` would have it on a GPU: the layer looks its forms up, and PyTorch calls stand in for them."""
    from benchmarks import counting
    from benchmarks.cases.linear import measure
    from benchmarks.settings import Settings
    from slora import addmm, forms, ops

    def runs(operation: str, name: str, compute: Any) -> Any:
        def run(rows: torch.Tensor, *args: Any) -> Any:
            shape = forms.Shape(operation, 12, 18, 1, 1, 3, rows.dtype, rows.dtype, None, ())
            return forms._run(shape, rows, lambda: [forms.Form(name)], lambda form: compute(rows, *args))

        return run

    monkeypatch.setattr(ops, "kernels_serve", lambda *args: True)
    monkeypatch.setattr(forms, "forward", runs("forward", first, addmm.gated_forward))
    monkeypatch.setattr(forms, "backward", runs("input gradient", last, addmm.gated_backward))
    monkeypatch.setattr(forms, "_chosen", {})
    settings = Settings("cpu", "tiny")
    ceilings = {"gemm_flops_per_s": {"fp32": 1e9}, "copy_bytes_per_s": 1e8}
    (row,) = measure(SHAPES[0], settings, ceilings, {"slora, torch"})
    assert row["form"] == form
    assert row["bytes"] == counting.bytes_moved(form, 7, 18, 12, 4)
    assert row["percent_of_copy"] == pytest.approx(100 * row["bytes"] / row["forward_backward"]["median"] / 1e8)


def test_active_blocks_are_spread_and_as_many_as_asked() -> None:
    assert Shape(8, 32, 4, 2, 4, 16, "fp32").chosen == [0, 4, 8, 12]
    assert Shape(8, 32, 4, 2, 0, 16, "fp32").chosen == []
    assert Shape(8, 32, 4, 2, 4, 16, "fp32").point["active"] == "4/16"
