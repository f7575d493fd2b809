"""The operator `torch.ops.slora.selective_linear`: values and every gradient against `slora.reference`."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slora import ops
from slora.errors import ConfigError
from slora.ops.backends.eager import base
from tests.ops.problem import (
    DEVICES,
    DTYPES,
    SCALING,
    THRESHOLD,
    active_of,
    compare,
    compare_all,
    eager,
    exact,
    leaves,
    make,
    name_of,
    ours,
    results,
)

pytestmark = pytest.mark.usefixtures("poisoned")


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("given", ["listed", "from gates"])
@pytest.mark.parametrize("active", ["none", "some", "all"])
@pytest.mark.parametrize("blocks", [1, 3, 4])
@pytest.mark.parametrize("M", [0, 1, 5, 123, 197])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_output_and_every_gradient_agree_with_the_reference(
    dtype: torch.dtype, M: int, blocks: int, active: str, given: str, device: str, assert_as_exact_as: Any
) -> None:
    t = make((M,), blocks=blocks, active=active, dtype=dtype, device=device)
    dy = torch.randn(M, 36, device=device).to(dtype)
    compare(assert_as_exact_as, t, dy, active=active_of(t) if given == "listed" else None)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=name_of)
@pytest.mark.parametrize("active", ["none", "some", "all"])
def test_fp32_lora_matrices_work_with_activations_of_another_dtype(
    dtype: torch.dtype, active: str, device: str, assert_as_exact_as: Any
) -> None:
    t = make((123,), dtype=dtype, lora_dtype=torch.float32, active=active, device=device)
    dy = torch.randn(123, 36, device=device).to(dtype)
    compare(assert_as_exact_as, t, dy)
    found = ours(t, dy)
    assert {found[name].dtype for name in ("lora_A", "lora_B", "gate")} == {torch.float32}
    assert {found[name].dtype for name in ("y", "x", "weight", "bias")} == {dtype}


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("rows", [(), (1,), (2, 3), (0, 4), (2, 1, 5), (2, 3, 2, 2)], ids=str)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_any_number_of_leading_dimensions(
    rows: tuple[int, ...], bias: bool, device: str, assert_as_exact_as: Any
) -> None:
    t = make(rows, bias=bias, device=device)
    compare(assert_as_exact_as, t, torch.randn(*rows, 36, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("backend", ["auto", "triton", "torch", "reference"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("rows", [(5,), (2, 3), (0,)], ids=str)
@pytest.mark.parametrize(("K", "N"), [(0, 36), (37, 0), (0, 0)])
def test_no_inputs_and_no_outputs_have_a_result(
    rows: tuple[int, ...], K: int, N: int, dropout: float, backend: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("SLORA_BACKEND", backend)
    t = make(rows, device=device)
    sizes = {"x": (*rows, K), "weight": (N, K), "bias": (N,), "lora_A": (3, 4, K), "lora_B": (3, N // 3, 4)}
    t.update({name: torch.randn(*size, device=device) for name, size in sizes.items()})
    dy = torch.randn(*rows, N, device=device)
    found = ours(t, dy, dropout=dropout, seed=torch.tensor(3, device=device) if dropout else None)
    # Every product is a sum of nothing.
    assert torch.equal(found["y"], t["bias"].expand(*rows, N))
    torch.testing.assert_close(found["bias"], dy.reshape(math.prod(rows), N).sum(0))
    for name in ("x", "weight", "lora_A", "lora_B", "gate"):
        assert torch.equal(found[name], torch.zeros_like(t[name])), name


LAYOUTS: dict[str, Callable[[], Tensor]] = {
    "transposed batch": lambda: torch.randn(7, 3, 37).transpose(0, 1),
    "features last but not stride 1": lambda: torch.randn(3, 37, 7).transpose(1, 2),
    "every second feature": lambda: torch.randn(3, 7, 74)[..., ::2],
    "expanded": lambda: torch.randn(1, 7, 37).expand(3, 7, 37),
    "slice of tokens": lambda: torch.randn(3, 9, 37)[:, 1:8],
    "column-major matrix": lambda: torch.randn(37, 21).T,
    "strided vector": lambda: torch.randn(74)[::2],
}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_inputs_of_any_strides(layout: str, bias: bool, assert_as_exact_as: Any) -> None:
    x = LAYOUTS[layout]()
    t = make(x.shape[:-1], bias=bias)
    dy = torch.randn(*x.shape[:-1], 36)
    t["x"] = x
    rounded, wanted = eager(t, dy), exact(t, dy)
    strided = {**leaves(t), "x": x.detach().requires_grad_()}
    found = results(lambda **t: ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING), strided, dy)
    compare_all(assert_as_exact_as, t, dy, found, rounded, wanted)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("dtype", DTYPES, ids=name_of)
def test_base_product_has_the_bits_of_a_linear_layer_with_trainable_weight(
    layout: str, bias: bool, dtype: torch.dtype
) -> None:
    x = LAYOUTS[layout]().to(dtype)
    weight = torch.randn(36, 37).to(dtype).requires_grad_()
    offset = torch.randn(36).to(dtype) if bias else None
    assert torch.equal(base(x, weight.detach(), offset), F.linear(x, weight, offset))


@pytest.mark.parametrize("shape", ["transposed", "expanded", "one number"])
def test_output_gradients_of_any_strides(shape: str, assert_as_exact_as: Any) -> None:
    t = make((6,))
    dy = {
        "transposed": torch.randn(36, 6).T,
        "expanded": torch.randn(36).expand(6, 36),
        "one number": torch.ones(()).expand(6, 36),
    }[shape]
    compare(assert_as_exact_as, t, dy)


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("active", ["none", "some", "all"])
def test_a_graph_that_reads_the_gates_on_the_device_computes_the_same(
    active: str, device: str, monkeypatch: pytest.MonkeyPatch, assert_as_exact_as: Any
) -> None:
    # What runs on CUDA where the host does not know the active blocks: every block, gated by a factor.
    monkeypatch.setattr("slora.ops.backends.eager._on_host", lambda on: False)
    t = make((123,), active=active, device=device)
    compare(assert_as_exact_as, t, torch.randn(123, 36, device=device))


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("given", ["listed", "from gates", "on the device"])
@pytest.mark.parametrize("backend", ["triton", "torch", "reference"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no dropout", "dropout"])
def test_what_inactive_blocks_hold_is_never_read(
    dropout: float, backend: str, given: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "triton":
        pytest.importorskip("triton")
    monkeypatch.setenv("SLORA_BACKEND", backend)
    if given == "on the device":
        monkeypatch.setattr("slora.ops.backends.eager._on_host", lambda on: False)
    t = make((17,), active="some", device=device)
    dy = torch.randn(17, 36, device=device)
    seed = torch.tensor(3, device=device) if dropout else None
    more = {"active": [0, 2] if given == "listed" else None, "dropout": dropout, "seed": seed}
    wanted = ours(t, dy, **more)
    for name, value in (("lora_A", math.nan), ("lora_B", math.inf)):
        t[name][1] = value
    for name, value in ours(t, dy, **more).items():
        assert torch.equal(value, wanted[name]), name
    assert not any(wanted[name][1].any() for name in ("lora_A", "lora_B", "gate"))
    # Nor is 0 times what is not finite in dy a gradient.
    found = ours(t, torch.full_like(dy, math.inf), **more)
    assert not any(found[name][1].any() for name in ("lora_A", "lora_B", "gate"))


@pytest.mark.parametrize("active", ["some", "all"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_reference_backend_computes_the_same(
    active: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch, assert_as_exact_as: Any
) -> None:
    monkeypatch.setenv("SLORA_BACKEND", "reference")
    t = make((123,), active=active, dtype=dtype, lora_dtype=torch.float32)
    compare(assert_as_exact_as, t, torch.randn(123, 36))


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_a_gate_just_below_the_threshold_is_inactive_in_every_dtype(
    backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # In bf16, 0.0999 and 0.1 are the same number.
    monkeypatch.setenv("SLORA_BACKEND", backend)
    t = make(dtype=torch.bfloat16, lora_dtype=torch.float32)
    t["gate"] = torch.tensor([0.0999, 0.0999, 0.0999])
    y = ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING)
    assert torch.equal(y, F.linear(t["x"], t["weight"], t["bias"]))


def test_an_unknown_backend_is_refused_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLORA_BACKEND", "fastest")
    with pytest.raises(ConfigError, match="SLORA_BACKEND='fastest' is unknown; use one of auto"):
        ops.selective_linear(**make(), threshold=THRESHOLD, scaling=SCALING)


def recovered_mask(t: dict[str, Tensor | None], p: float, seed: Tensor) -> Tensor:
    """The mask that the operator draws, read off the output: A = identity, B = identity, no base."""
    K = t["x"].shape[-1]
    M = math.prod(t["x"].shape[:-1])
    y = ops.selective_linear(
        torch.ones(M, K, device=t["x"].device), torch.zeros(K, K), None, torch.eye(K)[None], torch.eye(K)[None],
        torch.ones(1), THRESHOLD, 1.0, [0], p, seed,
    )  # fmt: skip
    return y.detach()


@pytest.mark.parametrize("active", ["some", "all"])
@pytest.mark.parametrize("given", ["listed", "from gates"])
@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_backward_drops_what_the_forward_dropped(
    active: str, given: str, backend: str, monkeypatch: pytest.MonkeyPatch, assert_as_exact_as: Any
) -> None:
    monkeypatch.setenv("SLORA_BACKEND", backend)
    t, p, seed = make((123,), active=active), 0.4, torch.tensor(77)
    mask = recovered_mask(t, p, seed)
    dy = torch.randn(123, 36)
    found = ours(t, dy, dropout=p, seed=seed, active=active_of(t) if given == "listed" else None)
    rounded = eager(t, dy, mask)
    wanted = exact(t, dy, lambda x: x * mask.double())
    compare_all(assert_as_exact_as, t, dy, found, rounded, wanted)


def test_dropout_keeps_elements_with_the_probability_asked_for_and_scales_them_up() -> None:
    t, p = make((2000,), K=50), 0.3
    mask = recovered_mask(t, p, torch.tensor(1))
    kept = mask != 0
    torch.testing.assert_close(mask[kept], torch.full_like(mask[kept], 1 / (1 - p)))
    # 100 000 independent elements: five standard errors of the share.
    assert abs(float(kept.float().mean()) - (1 - p)) < 5 * math.sqrt(p * (1 - p) / kept.numel())
    other = recovered_mask(t, p, torch.tensor(2)) != 0
    # Two seeds agree as often as independent masks do.
    agreement = p * p + (1 - p) * (1 - p)
    assert abs(float((kept == other).float().mean()) - agreement) < 5 * math.sqrt(0.25 / kept.numel())
