"""Merging that would write NaN or infinity, and merging from several threads."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slora
from slora.errors import StateError
from slora.layers import adapted_layers
from slora.merging import batched

DTYPES = [torch.float16, torch.bfloat16, torch.float32]


def adapted(make_mlp: Any, dtype: torch.dtype = torch.float16) -> nn.Module:
    """Three layers with an update."""
    model = slora.inject(make_mlp(12, 24, 16, 8, dtype=dtype), slora.SelectiveLoRAConfig(r=2, lora_alpha=2))
    with torch.no_grad():
        for _, layer in adapted_layers(model):
            layer.lora_B.normal_(std=0.1)
    return model


def bits(model: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_unchanged(model: nn.Module, before: dict[str, Tensor]) -> None:
    after = model.state_dict()
    assert after.keys() == before.keys()
    for name, value in before.items():
        assert torch.equal(after[name].nan_to_num(), value.nan_to_num()), name
    assert not any(layer.merged for _, layer in adapted_layers(model))


@pytest.mark.parametrize("call", [slora.merge, slora.merge_and_unload], ids=["merge", "merge_and_unload"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("part", ["lora_A", "lora_B"])
@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_a_matrix_that_is_not_finite_is_named_before_anything_is_written(
    value: float, part: str, dtype: torch.dtype, call: Callable[..., Any], make_mlp: Any
) -> None:
    model = adapted(make_mlp, dtype)
    with torch.no_grad():
        getattr(model.fc2, part)[0, -1, -1] = value
    before = bits(model)
    with pytest.raises(StateError, match=rf"{part} of 'fc2' holds NaN or infinity"):
        call(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("call", [slora.merge, slora.merge_and_unload], ids=["merge", "merge_and_unload"])
def test_a_gate_that_is_not_finite_is_named_though_its_block_counts_as_off(
    call: Callable[..., Any], make_mlp: Any
) -> None:
    model = adapted(make_mlp, torch.float32)
    with torch.no_grad():
        model.fc2.gate[0] = math.nan
    before = bits(model)
    with pytest.raises(StateError, match=r"the gates of 'fc2' are \[nan\]: training diverged"):
        call(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("name", ["1.weight", "1.running_var", "scale"])
def test_a_saved_part_that_is_not_finite_is_named_and_nothing_merged(name: str) -> None:
    class Model(nn.Sequential):
        def __init__(self) -> None:
            super().__init__(nn.Linear(4, 4), nn.BatchNorm1d(4))
            self.scale = nn.Parameter(torch.ones(3))

    config = slora.SelectiveLoRAConfig(r=2, target_modules=["0"], modules_to_save=["1", "scale"])
    model = slora.inject(Model(), config)
    model.state_dict()[name][-1] = math.nan
    before = bits(model)
    with pytest.raises(StateError, match=rf"'{name}' holds NaN or infinity: training diverged"):
        slora.merge_and_unload(model)
    assert_unchanged(model, before)


@pytest.mark.parametrize("call", [slora.merge, slora.merge_and_unload], ids=["merge", "merge_and_unload"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_an_overflow_of_the_dtype_is_named_before_anything_is_written(
    dtype: torch.dtype, call: Callable[..., Any], make_mlp: Any
) -> None:
    model = adapted(make_mlp, dtype)
    largest = torch.finfo(dtype).max
    with torch.no_grad():
        # Half of the largest number, and an update of three quarters of it.
        model.fc2.weight[3, 5] = largest / 2
        model.fc2.lora_A.zero_()[0, 0, 5] = math.sqrt(largest)
        model.fc2.lora_B.zero_()[0, 3, 0] = 0.75 * math.sqrt(largest)
    before = bits(model)
    with pytest.raises(StateError, match=rf"merging 'fc2' gives values that are not finite in {dtype}.*lower scale"):
        call(model)
    assert_unchanged(model, before)
    slora.merge(model, scale=0.5)
    assert model.fc2.weight.isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_below_the_bound_cannot_carry_the_largest_number_beyond_itself(dtype: torch.dtype) -> None:
    from slora.merging.overflow import _harmless

    largest, limit = torch.finfo(dtype).max, _harmless(dtype)
    # In twice the precision, then rounded to nearest.
    assert (torch.tensor(largest, dtype=torch.float64) + 1.99 * limit).to(dtype) == largest
    assert not (torch.tensor(largest, dtype=torch.float64) + 4 * limit).to(dtype).isfinite()


def test_large_updates_that_fit_are_merged(make_mlp: Any) -> None:
    model = adapted(make_mlp)
    with torch.no_grad():
        model.fc2.lora_A.fill_(10.0)
        model.fc2.lora_B.fill_(10.0)
        expected = (model.fc2.weight.double() + 200.0).to(torch.float16)
    slora.merge(model)
    assert torch.equal(model.fc2.weight, expected)


def test_no_weight_is_read_where_the_matrices_are_small(make_mlp: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("a pass over a weight")

    from slora.merging import overflow

    monkeypatch.setattr(overflow, "batched_merge", fail)
    slora.merge(adapted(make_mlp))


def test_fusing_a_layer_refuses_as_merging_does(make_mlp: Any) -> None:
    model = adapted(make_mlp)
    with torch.no_grad():
        model.fc0.lora_B[0, 0, 0] = math.nan
    with pytest.raises(StateError, match="not finite"):
        model.fc0.fuse()


# Threads


@pytest.fixture
def slow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the writing of weights take so long that another thread comes between any check and it."""
    real = batched.merge_terms_

    def wait(*args: Any, **kwargs: Any) -> None:
        time.sleep(0.1)
        real(*args, **kwargs)

    monkeypatch.setattr(batched, "merge_terms_", wait)


def together(*calls: Callable[[], Any]) -> list[BaseException | None]:
    """Run each call in a thread of its own, all at once; return what they raised."""
    start = threading.Barrier(len(calls))
    raised: list[BaseException | None] = [None] * len(calls)

    def run(i: int) -> None:
        start.wait()
        try:
            calls[i]()
        except BaseException as error:
            raised[i] = error

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(calls))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return raised


def test_of_two_threads_that_merge_one_merges_and_the_other_is_told(make_mlp: Any, slow: None) -> None:
    model = adapted(make_mlp, torch.float32)
    base = {name: layer.weight.clone() for name, layer in adapted_layers(model)}
    expected = {name: layer.merged_weight() for name, layer in adapted_layers(model)}
    raised = together(lambda: slora.merge(model), lambda: slora.merge(model))
    (error,) = [error for error in raised if error is not None]
    assert isinstance(error, StateError)
    assert "merged already" in str(error)
    for name, layer in adapted_layers(model):
        torch.testing.assert_close(layer.weight, expected[name])
    raised = together(lambda: slora.unmerge(model), lambda: slora.unmerge(model))
    assert [type(error) for error in raised if error is not None] == [StateError]
    for name, layer in adapted_layers(model):
        assert torch.equal(layer.weight, base[name])


def test_a_wrapper_and_a_part_of_a_model_are_under_the_same_lock(make_mlp: Any, slow: None) -> None:
    inner = adapted(make_mlp, torch.float32)
    outer = nn.Sequential(inner)
    base = {name: layer.weight.clone() for name, layer in adapted_layers(inner)}
    raised = together(lambda: slora.merge(inner), lambda: slora.merge(outer))
    assert [type(error) for error in raised if error is not None] == [StateError]
    slora.unmerge(outer)
    for name, layer in adapted_layers(inner):
        assert torch.equal(layer.weight, base[name])


def test_saving_and_loading_wait_for_a_merge(make_mlp: Any, slow: None, tmp_path: Path) -> None:
    model = adapted(make_mlp, torch.float32)
    slora.save_adapter(model, tmp_path / "old")
    base = {name: layer.weight.clone() for name, layer in adapted_layers(model)}
    raised = together(
        lambda: slora.merge(model),
        lambda: slora.load_adapter(model, tmp_path / "old"),
        lambda: slora.save_adapter(model, tmp_path / "new"),
    )
    assert raised[0] is None
    for error in raised[1:]:
        assert error is None or (isinstance(error, StateError) and "is merged" in str(error))
    if raised[2] is None:
        old, new = ((tmp_path / name / "selective.json").read_text() for name in ("old", "new"))
        assert old == new
    slora.unmerge(model)
    for name, layer in adapted_layers(model):
        assert torch.equal(layer.weight, base[name])


def test_of_two_threads_that_inject_one_injects(make_mlp: Any) -> None:
    for _ in range(5):
        model = make_mlp(64, 64, 64, 64)
        config = slora.SelectiveLoRAConfig(r=2)
        raised = together(lambda: slora.inject(model, config), lambda: slora.inject(model, config))  # noqa: B023
        assert [type(error) for error in raised if error is not None] == [StateError]
        assert sum(p.numel() for name, p in model.named_parameters() if "lora_A" in name) == 3 * 2 * 64
