"""The micro cases under pytest-benchmark: `make bench`. One layer forward and backward, and the merge of its weight.

`make test` runs each once, untimed. The case `linear` of `python -m benchmarks` has the grid, the peers' ratios and the
result file; this is for a quick look while working on the operator.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

import slora
from benchmarks.contenders.layer import CONTENDERS, Problem, Shape, mistake
from benchmarks.results import Missing

pytest.importorskip("pytest_benchmark")
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# On a CPU the kernels would run in Triton's interpreter, minutes for a call; their correctness has tests of its own.
KERNELS = {name for name in CONTENDERS if name.startswith("slora, ") and name != "slora, torch"}
LEFT_OUT = {"PEFT, compiled"} if DEVICE == "cuda" else {"PEFT, compiled"} | KERNELS
MEASURED = [name for name in CONTENDERS if name not in LEFT_OUT]


@pytest.fixture
def problem(request: pytest.FixtureRequest) -> Problem:
    """A small layer, of which `request.param` of four blocks are active; "1" is one block, active."""
    active, blocks = request.param
    return Problem(Shape(192, 384, 788, 16, active, blocks, "fp32"), DEVICE, sets=2)


def _id(value: object) -> str | None:
    return f"{value[0]} of {value[1]} active" if isinstance(value, tuple) else None


@pytest.fixture
def quiet() -> Iterator[None]:
    """Wait for a GPU before and after."""
    if DEVICE == "cuda":
        torch.cuda.synchronize()
    yield
    if DEVICE == "cuda":
        torch.cuda.synchronize()


@pytest.mark.parametrize("problem", [(1, 1), (1, 4), (0, 1)], indirect=True, ids=_id)
@pytest.mark.parametrize("name", MEASURED)
def test_a_layer_forward_and_backward(name: str, problem: Problem, benchmark: Any, quiet: None) -> None:
    benchmark.group = f"layer, {problem.shape.active} of {problem.shape.blocks} active"
    try:
        layer = CONTENDERS[name](problem)
    except Missing as reason:
        pytest.skip(str(reason))
    (x, dy), wait = (problem.xs[0], problem.dys[0]), torch.cuda.synchronize if DEVICE == "cuda" else lambda: None
    assert mistake(layer.trained(x, dy), problem.exact(layer.updates), layer.wanted(problem.shape)) is None

    def call() -> None:
        layer.trained(x, dy)
        wait()

    benchmark(call)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_merging_one_weight(dtype: torch.dtype, benchmark: Any, quiet: None) -> None:
    benchmark.group = "merge"
    W = torch.randn(1024, 1024, device=DEVICE).to(dtype)
    A, B = torch.randn(16, 1024, device=DEVICE), torch.randn(1024, 16, device=DEVICE)
    merged = slora.merging.batched_merge([W], [A], [B], [0.5])[0]
    exact = W.double() + 0.5 * (B.double() @ A.double())
    torch.testing.assert_close(merged.double(), exact, rtol=torch.finfo(dtype).eps, atol=1e-4)
    benchmark(lambda: slora.merging.batched_merge_([W], [A], [B], [1e-6]))


def test_a_choice_of_blocks(benchmark: Any) -> None:
    """All that selection adds to a run that ranks by norm: a strategy, one ranking of 48 blocks, a choice."""
    layers = {"qkv": (384, 1152), "proj": (384, 384), "fc1": (384, 1536), "fc2": (1536, 384)}
    model = torch.nn.ModuleDict(
        {f"{i}_{name}": torch.nn.Linear(*shape) for name, shape in layers.items() for i in range(12)}
    )
    slora.inject(model, slora.SelectiveLoRAConfig(r=16, blocks=1)).to(DEVICE)
    for _, layer in slora.layers.adapted_layers(model):
        torch.nn.init.normal_(layer.lora_B)

    def choose() -> int:
        selection = slora.selection.Budget(model, 4, steps=1)
        selection.step()
        selection.finish()
        return sum(int(on.sum()) for on in slora.active_blocks(model).values())

    assert benchmark(choose) == 4
