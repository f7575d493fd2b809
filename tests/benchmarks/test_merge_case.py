"""Merges are checked in every weight before they are timed, and what one of them does costs the others nothing."""

from __future__ import annotations

import sys

import pytest
import torch
from torch import nn

import slora
from benchmarks.cases import merge as merging
from benchmarks.contenders import merge
from benchmarks.results import Settings

CEILINGS = {"gemm_flops_per_s": {"fp32": 1e9, "bf16": 1e9}, "copy_bytes_per_s": 1e9}
VIT = "vit_tiny_patch16_224"
pytestmark = pytest.mark.skipif(not slora.merging.extension_info()["available"], reason="slora._C is not built")
pytest.importorskip("peft")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_every_contender_is_right(dtype: torch.dtype) -> None:
    case = merge.Case(VIT, dtype, 4, "cpu")
    assert len(case.weights) == 48
    assert {name: case.mistake(name) for name in case.contenders} == dict.fromkeys(case.contenders)


def _nudge(model: nn.Module) -> None:
    """Put one number of one weight off by a little."""
    with torch.no_grad():
        model.get_parameter("blocks.11.mlp.fc2.weight")[5, 7] += 1e-3


@pytest.mark.parametrize(
    ("name", "method"),
    [
        ("slora batched_merge_", "batched_merge"),
        ("slora merge_and_unload", "slora_unload"),
        ("slora merge, copy kept", "slora_merge"),
        ("PEFT merge_and_unload", "peft_unload"),
    ],
)
def test_one_wrong_number_in_one_weight_of_any_contender_is_found(
    name: str, method: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    case = merge.Case(VIT, torch.float32, 4, "cpu")
    right = getattr(case, method)
    monkeypatch.setattr(case, method, lambda: (right(), _nudge(case.model)))
    assert case.mistake(name) == "the weight of blocks.11.mlp.fc2 is wrong in 1 of 147456 numbers"


def test_a_kept_copy_that_does_not_give_the_bits_back_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    case, right = merge.Case(VIT, torch.bfloat16, 4, "cpu"), slora.unmerge

    def wrong(model: nn.Module) -> nn.Module:
        right(model)
        _nudge(model)
        return model

    monkeypatch.setattr(slora, "unmerge", wrong)
    assert case.mistake("slora merge, copy kept") == "unmerging does not give the weights back bit for bit"


def test_a_merge_that_is_wrong_or_fails_leaves_and_the_others_are_timed(monkeypatch: pytest.MonkeyPatch) -> None:
    right, calls = slora.merging.batched_merge_, iter(range(2))

    def wrong(Ws: list[torch.Tensor], As: list[torch.Tensor], Bs: list[torch.Tensor], scales: list[float]) -> None:
        right(Ws, As, Bs, [1.001] * len(Ws))

    def fails(model: nn.Module) -> nn.Module:
        if next(calls, None) is None:
            raise RuntimeError("no memory")
        return merged(model)

    merged = slora.merge
    monkeypatch.setattr(slora.merging, "batched_merge_", wrong)
    monkeypatch.setattr(slora, "merge", fails)
    monkeypatch.setattr(merging.memory, "in_a_process", lambda *arguments: 1.0)
    rows = {row["contender"]: row for row in merging.measure(Settings("cpu", "tiny"), CEILINGS, VIT, "fp32", 4)}
    assert "is wrong in" in rows["slora batched_merge_"]["refused"]
    assert rows["slora merge, copy kept"]["failed"] == "RuntimeError: no memory"
    for name in ("slora batched_merge_", "slora merge, copy kept"):
        assert "seconds" not in rows[name]
    for name in ("copy", "PEFT merge_and_unload", "slora merge_and_unload"):
        assert rows[name]["seconds"]["n"] == 3


def test_without_peft_slora_is_timed_and_peft_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(merging.memory, "in_a_process", lambda *arguments: 1.0)
    rows = {row["contender"]: row for row in merging.measure(Settings("cpu", "tiny"), CEILINGS, VIT, "fp32", 4)}
    assert "peft cannot be imported" in rows["PEFT merge_and_unload"]["skipped"]
    assert rows["slora merge_and_unload"]["seconds"]["n"] == 3
    assert "seconds" not in rows["PEFT merge_and_unload"]
