"""Merges that are cut off by an error, by a lack of memory or by a signal."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import slora
from slora.layers import adapted_layers
from slora.merging import batched, fallback
from tests.merging.calls import needs_extension
from tests.merging.merged_models import adapted, assert_restored, snapshot

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("keep", ["device", "cpu", None])
@pytest.mark.parametrize("error", [torch.OutOfMemoryError, KeyboardInterrupt])
def test_a_merge_that_fails_on_the_way_changes_nothing(
    keep: Any, error: type[BaseException], vit: nn.Module, randomise: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In plain PyTorch, which can fail between two weights; the extension's one call cannot.
    monkeypatch.setenv("SLORA_BACKEND", "torch")
    model = adapted(vit, randomise)
    x = torch.randn(2, 3, 16, 16)
    expected, before, kinds = model(x), snapshot(model), [type(m) for m in model.modules()]
    real, calls = fallback._add, []

    def fails(*args: Any) -> None:
        calls.append(args)
        real(*args)
        if len(calls) % 3 == 0:
            raise error("in the middle")

    monkeypatch.setattr(fallback, "_add", fails)
    for merge in (lambda model: slora.merge(model, keep=keep), slora.merge_and_unload):
        with pytest.raises(error):
            merge(model)
        assert_restored(model, before)
        assert [type(m) for m in model.modules()] == kinds
        assert torch.equal(model(x), expected)


def test_no_room_for_the_copy_leaves_the_model_as_it_was(
    vit: nn.Module, randomise: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(vit, randomise)
    before, real, calls = snapshot(model), torch.empty, []

    def fails(*args: Any, **kwargs: Any) -> Tensor:
        calls.append(args)
        if len(calls) == 3:
            raise torch.OutOfMemoryError("out of memory")
        return real(*args, **kwargs)

    monkeypatch.setattr(torch, "empty", fails)
    with pytest.raises(torch.OutOfMemoryError):
        slora.merge(model)
    monkeypatch.undo()
    assert_restored(model, before)


class Interrupted(BaseException):
    """What the handler of a signal raises here, as that of Ctrl-C raises KeyboardInterrupt."""


@pytest.fixture
def interrupting(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A signal arrives in the middle of every call of the operator, so Python sees it right after."""
    batched._extension()
    real = torch.ops.slora.batched_merge_

    def interrupted(*args: Any) -> None:
        real(*args)
        signal.raise_signal(signal.SIGALRM)

    def raises(*_: Any) -> None:
        raise Interrupted

    monkeypatch.setattr(torch.ops.slora, "batched_merge_", interrupted)
    before = signal.signal(signal.SIGALRM, raises)
    yield
    signal.signal(signal.SIGALRM, before)


@needs_extension
@pytest.mark.parametrize("keep", ["device", "cpu", None])
def test_ctrl_c_during_a_merge_leaves_a_model_that_knows_what_it_is(
    keep: Any, vit: nn.Module, randomise: Any, interrupting: None
) -> None:
    model = adapted(vit, randomise)
    x = torch.randn(2, 3, 16, 16)
    before, expected = snapshot(model), model(x)
    with slora.disabled(model):
        base = model(x)
    with pytest.raises(Interrupted):
        slora.merge(model, keep=keep)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    assert all(layer.merged for _, layer in adapted_layers(model))
    if keep is None:
        with pytest.raises(Interrupted):
            slora.unmerge(model)
    else:
        assert_restored(slora.unmerge(model), before)
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)
    with slora.disabled(model):
        torch.testing.assert_close(model(x), base, rtol=1e-4, atol=1e-5)


@needs_extension
def test_ctrl_c_during_merge_and_unload_leaves_a_plain_model(
    vit: nn.Module, randomise: Any, interrupting: None
) -> None:
    model = adapted(vit, randomise)
    x = torch.randn(2, 3, 16, 16)
    expected = model(x)
    with pytest.raises(Interrupted):
        slora.merge_and_unload(model)
    assert not list(adapted_layers(model))
    torch.testing.assert_close(model(x), expected, rtol=1e-4, atol=1e-5)


@needs_extension
@pytest.mark.parametrize("written", [False, True], ids=["before it has written", "after it has written"])
def test_an_operator_that_fails_leaves_every_bit_where_there_is_a_copy(
    written: bool, vit: nn.Module, randomise: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = adapted(vit, randomise)
    before = snapshot(model)
    batched._extension()
    real = torch.ops.slora.batched_merge_

    def fails(*args: Any) -> None:
        if written:
            real(*args)
        raise RuntimeError("the device is lost")

    monkeypatch.setattr(torch.ops.slora, "batched_merge_", fails)
    with pytest.raises(RuntimeError, match="the device is lost"):
        slora.merge(model)
    assert_restored(model, before)
