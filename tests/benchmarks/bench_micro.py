"""One layer forward and backward under pytest-benchmark: `pytest tests/benchmarks/bench_micro.py --benchmark-only`.

For a quick look; the case `linear` of `python -m benchmarks` has the grid, the peers' ratios and the result file.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch

from benchmarks.correctness import mismatch
from benchmarks.implementations.layer import IMPLEMENTATIONS, Problem, Shape
from benchmarks.results import Missing

pytest.importorskip("pytest_benchmark")
pytestmark = pytest.mark.once
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


@pytest.mark.parametrize("active", [(1, 1), (1, 4), (0, 1)], ids=lambda active: f"{active[0]} of {active[1]} active")
@pytest.mark.parametrize("name", [name for name in IMPLEMENTATIONS if name != "PEFT, compiled"])
def test_a_layer_forward_and_backward(name: str, active: tuple[int, int], benchmark: Any) -> None:
    benchmark.group = f"layer, {active[0]} of {active[1]} active"
    problem = Problem(Shape(192, 384, 788, 16, *active), DEVICE, sets=1)
    try:
        layer = IMPLEMENTATIONS[name](problem)
    except Missing as reason:
        pytest.skip(str(reason))
    x, dy = problem.xs[0], problem.dys[0]
    assert mismatch(layer.trained(x, dy), problem.exact(layer.updates), layer.wanted(problem.shape)) is None

    def call() -> None:
        layer.trained(x, dy)
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    benchmark(call)
