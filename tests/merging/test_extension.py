"""The compiled extension: its operators pass `opcheck`, and where it is missing that is said with a remedy."""

from __future__ import annotations

import os
import re
import shutil
import warnings
from typing import Any

import pytest
import torch

from slora.merging import batched, batched_merge, extension_info
from tests.merging.calls import A0, B0, NARROW, W0, needs_extension


@needs_extension
@pytest.mark.parametrize("dtype", [*NARROW, torch.float64], ids=str)
def test_operators_pass_opcheck(dtype: torch.dtype) -> None:
    batched._extension()
    weights = [torch.randn(6, 10).to(dtype), torch.randn(7, 5).to(dtype)]
    flat = ([torch.randn(2, 10), torch.randn(3, 5)], [torch.randn(6, 2), torch.randn(4, 3)], [0.5, 1.0], [0, 1], [0, 3])
    torch.library.opcheck(torch.ops.slora.batched_merge, (weights, *flat))
    torch.library.opcheck(torch.ops.slora.batched_merge_, (weights, *flat, []))
    torch.library.opcheck(torch.ops.slora.batched_merge_, (weights, *flat, [torch.empty_like(W) for W in weights]))


def test_without_the_extension_there_is_one_warning_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> Any:
        raise ImportError("undefined symbol: _ZN3c106detail")

    monkeypatch.setattr(batched.importlib, "import_module", broken)
    batched._extension.cache_clear()
    batched._warn_once.cache_clear()
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = [batched_merge([W0], [A0], [B0], [1.0])[0] for _ in range(3)][-1]
        assert len(caught) == 1
        assert re.search(r"built for another torch.*pip install --no-build-isolation", str(caught[0].message))
        assert caught[0].filename == __file__
        torch.testing.assert_close(found, W0 + B0 @ A0)
        assert extension_info() == {"available": False, "reason": batched._extension()[1]}
    finally:
        batched._extension.cache_clear()
        batched._warn_once.cache_clear()


def test_asking_for_pytorch_warns_of_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLORA_BACKEND", "torch")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        batched_merge([W0], [A0], [B0], [1.0])


@pytest.mark.skipif(
    shutil.which(os.environ.get("CXX", "c++")) is None or bool(os.environ.get("SLORA_SKIP_EXT")),
    reason="there is no compiler, or SLORA_SKIP_EXT is set",
)
def test_where_there_is_a_compiler_the_extension_is_built_and_loads() -> None:
    # Otherwise every test that needs it would be skipped without a word.
    assert extension_info()["reason"] is None


@pytest.mark.parametrize(
    ("capability", "architectures", "expected"),
    [
        ((8, 6), "8.0;9.0", True),
        ((9, 0), "8.0;9.0;10.0+PTX", True),
        ((12, 0), "8.0;9.0;10.0+PTX", True),
        ((12, 0), "8.0;9.0", False),
        ((7, 5), "8.0;9.0+PTX", False),
        ((8, 0), "8.6", False),
        ((9, 0), "9.0a", True),
        ((10, 0), "8.0;9.0a", False),
        ((10, 3), "10.0a", False),
        ((10, 3), "10.0f", True),
        ((8, 0), "Ampere", True),
    ],
)
def test_a_gpu_for_which_nothing_was_built_is_recognised(
    capability: tuple[int, int], architectures: str, expected: bool
) -> None:
    assert batched.serves(capability, architectures) == expected


@needs_extension
def test_extension_tells_how_it_was_built() -> None:
    info = extension_info()
    assert info["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert info["compiler"].startswith(("gcc ", "clang "))
    assert info["cpu"] in ("AVX-512", "AVX2 and FMA", "portable")
    assert (info["cuda"] is None) == (info["architectures"] == [])
