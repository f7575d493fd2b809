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
    found = set()
    for entry in content["candidates"]:
        reason = entry.get("reason", "").partition(" by")[0]
        found.add(
            (entry["operation"], entry["algorithm"].split()[0], entry["state"], reason, entry.get("error") is None)
        )
    assert found == {
        ("forward", "fused", "wrong", "y is off", False),
        ("forward", "split", "right", "", False),
        ("forward", "precomputed", "failed", "of all things", True),
        ("forward", "cublas_after", "wrong", "y is off", True),
        ("forward", "cublas_before", "right", "", False),
        ("input gradient", "fused", "wrong", "dx is off", False),
        ("input gradient", "split", "right", "", False),
        ("input gradient", "precomputed", "right", "", False),
        ("input gradient", "cublas_after", "right", "", False),
        ("input gradient", "cublas_before", "right", "", False),
        ("weight gradients", "one_pass", "wrong", "lora_A is off", False),
    }  # fmt: skip
