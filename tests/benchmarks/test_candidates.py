"""Every candidate of the kernels is checked: what is wrong is seen, and what fails costs the others nothing."""

from __future__ import annotations

import json
import os
from functools import partialmethod
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks import candidates
from slora.ops.backends.algorithms import Forward, InputGradient, WeightGradients

pytestmark = [
    pytest.mark.usefixtures("no_processes"),
    pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") != "1", reason="runs the kernels interpreted"),
]


def test_a_wrong_result_is_seen_and_a_candidate_that_raises_costs_the_others_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also what is wrong in the last row of a large result, or in a sum over its rows."""

    def forward(self: Forward, algorithm: Any, compute: Any = Forward.compute) -> Any:
        if algorithm.name == "precomputed":
            raise ValueError("of all things")
        y, S = compute(self, algorithm)
        if algorithm.name == "fused":
            y[-1, -1] *= 1.01
        if algorithm.name == "cublas_after":
            # As if it had not been written.
            y[0] = torch.empty_like(y[0])
        return y, S

    def last_number(self: Any, algorithm: Any, compute: Any) -> Any:
        first, *rest = compute(self, algorithm)
        first.view(-1)[-1] += 1 if "fused" in str(algorithm) or "one_pass" in str(algorithm) else 0
        return first, *rest

    monkeypatch.setattr(Forward, "compute", forward)
    for operation in (InputGradient, WeightGradients):
        monkeypatch.setattr(operation, "compute", partialmethod(last_number, compute=operation.compute))
    assert candidates.main([str(tmp_path), "--device", "cpu"]) == 1
    content = json.loads((tmp_path / "candidates.json").read_text())
    assert content["complete"]
    found = {
        (e["operation"], e["algorithm"].split()[0], e["reason"].partition(" by")[0], e.get("error") is None)
        for e in content["candidates"]
        if e["state"] != "right"
    }
    assert found == {
        ("forward", "fused", "y is off", False), ("forward", "cublas_after", "y is off", True),
        ("forward", "precomputed", "of all things", True), ("input gradient", "fused", "dx is off", False),
        ("weight gradients", "one_pass", "lora_A is off", False),
    }  # fmt: skip
