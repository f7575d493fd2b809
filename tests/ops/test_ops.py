"""The operator `torch.ops.slora.selective_linear`: values and every gradient against `slora.reference`."""

from __future__ import annotations

import contextlib
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from slora import ops, reference
from slora.errors import ConfigError, ShapeError, StateError
from slora.ops import flops, operator
from slora.ops.backends import Needs
from slora.ops.backends.eager import EAGER, base
from slora.ops.operands import LoRAOperands

pytestmark = pytest.mark.usefixtures("poisoned")

THRESHOLD, SCALING = 0.1, 1.7
NAMES = ("x", "weight", "bias", "lora_A", "lora_B", "gate")
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)]


def name_of(value: object) -> str:
    return str(value).removeprefix("torch.")


def make(
    rows: tuple[int, ...] = (5,),
    K: int = 37,
    N: int = 36,
    blocks: int = 3,
    r: int = 4,
    active: str = "some",
    dtype: torch.dtype = torch.float32,
    lora_dtype: torch.dtype | None = None,
    bias: bool = True,
    device: str = "cpu",
) -> dict[str, Tensor | None]:
    """Random arguments; weights scaled so that outputs are of order 1, as in a trained model."""
    lora_dtype = lora_dtype or dtype
    on = {"none": [], "all": range(blocks), "some": range(0, blocks, 2)}[active]
    gate = torch.tensor([0.15 if i in on else 0.05 for i in range(blocks)])
    made = {
        "x": torch.randn(*rows, K).to(dtype),
        "weight": (torch.randn(N, K) / math.sqrt(K)).to(dtype),
        "bias": torch.randn(N).to(dtype) if bias else None,
        "lora_A": (torch.randn(blocks, r, K) / math.sqrt(K)).to(lora_dtype),
        "lora_B": (torch.randn(blocks, N // blocks, r) / math.sqrt(r)).to(lora_dtype),
        "gate": gate,
    }
    return {name: None if t is None else t.to(device) for name, t in made.items()}


def leaves(t: dict[str, Tensor | None], dtype: torch.dtype | None = None) -> dict[str, Tensor | None]:
    """Detached copies that require gradients, in `dtype` if it is given (the gate stays what it is)."""
    return {
        name: None
        if value is None
        else (value if dtype is None or name == "gate" else value.to(dtype)).detach().clone().requires_grad_()
        for name, value in t.items()
    }


def active_of(t: dict[str, Tensor | None]) -> list[int]:
    return [i for i, g in enumerate(t["gate"].tolist()) if g >= THRESHOLD]


def results(f: Callable[..., Tensor], t: dict[str, Tensor | None], dy: Tensor) -> dict[str, Tensor]:
    """Output and every gradient of `f`."""
    y = f(**t)
    y.backward(dy.to(y.dtype))
    return {"y": y.detach(), **{name: value.grad for name, value in t.items() if value is not None}}


def exact(
    t: dict[str, Tensor | None], dy: Tensor, x_lora_of: Callable[[Tensor], Tensor] | None = None
) -> dict[str, Tensor]:
    """The reference in fp64; the operator leaves the gates of inactive blocks to `slora.gate`."""
    wide = leaves(t, torch.float64)

    def f(**t: Tensor) -> Tensor:
        x_lora = None if x_lora_of is None else x_lora_of(t["x"])
        gate = t.pop("gate").double()
        return reference.selective_lora_linear(**t, gate=gate, threshold=THRESHOLD, scaling=SCALING, x_lora=x_lora)

    found = results(f, wide, dy)
    found["gate"] = found["gate"] * (t["gate"] >= THRESHOLD)
    return found


def eager(t: dict[str, Tensor | None], dy: Tensor, mask: Tensor | None = None) -> dict[str, Tensor]:
    """The same mathematics in PyTorch calls in the dtype of `x`, LoRA matrices cast to it as autocast would."""

    def f(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, gate: Tensor) -> Tensor:
        x_lora = x if mask is None else x * mask.view(x.shape)
        y = F.linear(x, weight, bias)
        on = (gate.detach() >= THRESHOLD).to(gate.dtype) * (1 + gate - gate.detach())
        updates = [
            F.linear(F.linear(x_lora, A.to(x.dtype)), B.to(x.dtype)) * (SCALING * g).to(x.dtype)
            for A, B, g in zip(lora_A, lora_B, on, strict=True)
        ]
        return y + torch.cat(updates, -1)

    return results(f, leaves(t), dy)


def ours(t: dict[str, Tensor | None], dy: Tensor, **more: Any) -> dict[str, Tensor]:
    def f(**t: Tensor) -> Tensor:
        return ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING, **more)

    return results(f, leaves(t), dy)


def compare(assert_as_exact_as: Callable[..., None], t: dict[str, Tensor | None], dy: Tensor, **more: Any) -> None:
    compare_all(assert_as_exact_as, t, dy, ours(t, dy, **more), eager(t, dy), exact(t, dy))


def compare_all(
    assert_as_exact_as: Callable[..., None],
    t: dict[str, Tensor | None],
    dy: Tensor,
    found: dict[str, Tensor],
    rounded: dict[str, Tensor],
    wanted: dict[str, Tensor],
) -> None:
    for name, value in found.items():
        if name == "gate":
            longest = max(t["x"].shape[-1], t["lora_B"].shape[1], t["x"].shape[:-1].numel())
            terms = longest if t["x"].dtype == t["gate"].dtype else 0
            assert_as_exact_as(value, rounded[name], wanted[name], name, gate_magnitude(t, dy, wanted), terms)
        else:
            assert_as_exact_as(value, rounded[name], wanted[name], name)


def gate_magnitude(t: dict[str, Tensor | None], dy: Tensor, wanted: dict[str, Tensor]) -> float:
    """What to multiply by eps for the error of a gate's gradient, a single sum that cancels.

    `dgate = <dB, B> = <dA, A> = c <S, T>` where A, S and dB (in eager PyTorch: A, B, S, T) are rounded to the dtype
    of x. To first order these change it by `sum d * (dA * A)`, `sum d * (dB * B)` and `c sum d * (S * T)`, with as
    many independent `|d| <= eps / 2`, of standard deviation at most `eps / (2 sqrt(3))`. Five of them for the
    2-norm of all terms.
    """
    x, A, B = (t[name].double() for name in ("x", "lora_A", "lora_B"))
    rows = x.reshape(-1, x.shape[-1])
    S = torch.einsum("mk,brk->bmr", rows, A)
    T = torch.einsum("mbn,bnr->bmr", dy.double().reshape(rows.shape[0], *B.shape[:2]), B)
    terms = (wanted["lora_A"] * A, wanted["lora_B"] * B, SCALING * S * T)
    norm = sum(term.square().sum((1, 2)) for term in terms).sqrt().max()
    low, own = torch.finfo(t["x"].dtype).eps, torch.finfo(t["gate"].dtype).eps
    return 5 / (2 * math.sqrt(3)) * max(low / own, 1.0) * float(norm)


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


@pytest.mark.parametrize("blocks", [1, 3])
def test_gradients_agree_with_finite_differences(blocks: int) -> None:
    t = leaves(make((4,), 5, 6, blocks, 2, dtype=torch.float64))
    gate = t.pop("gate").detach()
    names = list(t)

    def f(*values: Tensor) -> Tensor:
        return ops.selective_linear(
            **dict(zip(names, values, strict=True)), gate=gate, threshold=THRESHOLD, scaling=SCALING
        )

    assert torch.autograd.gradcheck(f, tuple(t.values()))


def test_a_second_derivative_is_refused_and_the_reference_backend_gives_it(monkeypatch: pytest.MonkeyPatch) -> None:
    t = leaves(make((4,)))

    def twice() -> Tensor:
        y = ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING)
        (dx,) = torch.autograd.grad(y.square().sum(), t["x"], create_graph=True)
        return torch.autograd.grad(dx.square().sum(), t["lora_A"])[0]

    with pytest.raises(StateError, match=r"differentiable once; set SLORA_BACKEND=reference"):
        twice()
    monkeypatch.setenv("SLORA_BACKEND", "reference")
    assert twice().isfinite().all()


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


# Dropout


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


# What is computed and kept


class Allocations(TorchDispatchMode):
    """Shapes of the tensors that operators below this mode allocate."""

    def __init__(self, *known: Tensor | None) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []
        # Held, so that no address is used twice.
        self.held = {t.untyped_storage().data_ptr(): t for t in known if t is not None}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for t in result if isinstance(result, (tuple, list)) else (result,):
            if isinstance(t, Tensor) and t.untyped_storage().data_ptr() not in self.held:
                self.held[t.untyped_storage().data_ptr()] = t
                self.shapes.append(tuple(t.shape))
        return result


def kept_by(f: Callable[[], Tensor]) -> tuple[Tensor, list[Tensor]]:
    kept: list[Tensor] = []

    def pack(t: Tensor) -> Tensor:
        kept.append(t)
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        y = f()
    return y, kept


FROZEN = ("weight", "bias")


def trainable(names: tuple[str, ...], t: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if value is None else value.detach().requires_grad_(name in names) for name, value in t.items()}


def test_the_graph_keeps_only_x_and_S_besides_the_parameters() -> None:
    M, K, N, r = 123, 37, 36, 4
    t = trainable(("x", "lora_A", "lora_B", "gate"), make((M,), active="some"))
    _, kept = kept_by(lambda: ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING, active=[0, 2]))
    parameters = {t[name].data_ptr() for name in NAMES if t[name] is not None and name != "x"}
    activations = [k for k in kept if k.data_ptr() not in parameters]
    assert sorted(tuple(k.shape) for k in activations) == sorted([(M, K), (M, 2 * r)])
    assert any(k.data_ptr() == t["x"].data_ptr() for k in activations), "x is kept as it is, not as a copy"
    assert not any(k.shape[-1:] == (N,) and k.shape[:-1] == (M,) for k in kept)


class Watching(TorchDispatchMode):
    """Names of the operators of slora that are seen."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func.namespace == "slora":
            self.seen.append(func.name())
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("lora", [None, torch.float32], ids=["lora of x", "lora fp32"])
@pytest.mark.parametrize("active", ["some", "all"])
@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no dropout", "dropout"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=name_of)
def test_eager_mode_and_the_operator_give_the_same_bits(
    dtype: torch.dtype, dropout: float, active: str, lora: torch.dtype | None
) -> None:
    t, dy = make((2, 7), active=active, dtype=dtype, lora_dtype=lora), torch.randn(2, 7, 36)
    more = {"active": active_of(t), "dropout": dropout, "seed": torch.tensor(3) if dropout else None}
    eager_mode = ours(t, dy, **more)
    with Watching() as watching:
        watched = ours(t, dy, **more)
    assert set(watching.seen) == {"slora::selective_linear", "slora::selective_linear_backward"}
    assert eager_mode.keys() == watched.keys() == {"y", *NAMES}
    assert all(torch.equal(eager_mode[name], watched[name]) for name in watched)


@pytest.mark.parametrize("trained", [("x",), ("lora_A", "lora_B"), ("x", "gate")], ids="-".join)
def test_a_second_derivative_of_cast_matrices_is_refused(trained: tuple[str, ...]) -> None:
    t = trainable(trained, make((7,), dtype=torch.bfloat16, lora_dtype=torch.float32))
    y = ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING)
    (gradient, *_) = torch.autograd.grad(y.float().sum(), [t[trained[0]]], create_graph=True)
    if gradient.requires_grad:
        with pytest.raises(StateError, match="differentiable once"):
            gradient.float().square().sum().backward()
    else:
        # The gradient of a sum by x alone has no parameter in it that could be differentiated.
        assert trained == ("x",)


@pytest.mark.parametrize("around", ["forward", "backward"])
@pytest.mark.parametrize("names", [("x", "lora_A"), ("x", "lora_A", "lora_B", "gate")], ids="-".join)
def test_checkpointed_layers_may_be_watched_in_one_direction_only(names: tuple[str, ...], around: str) -> None:
    from torch.utils.checkpoint import checkpoint

    t = trainable(names, make((7,), dtype=torch.bfloat16, lora_dtype=torch.float32, active="all"))

    def call(x: Tensor) -> Tensor:
        return ops.selective_linear(**(t | {"x": x}), threshold=THRESHOLD, scaling=SCALING)

    with Watching() if around == "forward" else contextlib.nullcontext():
        y = checkpoint(call, t["x"], use_reentrant=False)
    with Watching() if around == "backward" else contextlib.nullcontext():
        y.float().sum().backward()
    assert all(t[name].grad is not None for name in names)


def test_a_forward_mode_derivative_is_that_of_a_linear_map() -> None:
    t = make((5,), dtype=torch.float64)

    def f(x: Tensor) -> Tensor:
        return ops.selective_linear(**(t | {"x": x}), threshold=THRESHOLD, scaling=SCALING)

    y, dy = torch.func.jvp(f, (t["x"],), (t["x"],))
    torch.testing.assert_close(y, f(t["x"]))
    torch.testing.assert_close(dy, y - f(0 * t["x"]))


def test_a_backward_inside_autocast_is_that_of_the_forward_outside() -> None:
    t, dy = make((5,)), torch.randn(5, 36)
    found = []
    for inside in (False, True):
        leaf = leaves(t)
        y = ops.selective_linear(**leaf, threshold=THRESHOLD, scaling=SCALING)
        with torch.autocast("cpu", torch.bfloat16, enabled=inside):
            y.backward(dy)
        found.append({name: leaf[name].grad for name in NAMES})
    assert all(torch.equal(found[0][name], found[1][name]) for name in NAMES)


@pytest.mark.parametrize("active", ["some", "all"])
def test_gradients_come_in_batches_too(active: str) -> None:
    t = trainable(("x", "lora_A", "lora_B"), make((5,), active=active))
    y = ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING, active=active_of(t))
    leaves_, dys = [t["x"], t["lora_A"], t["lora_B"]], torch.randn(4, 5, 36)
    batched = torch.autograd.grad(y, leaves_, dys, is_grads_batched=True, retain_graph=True)
    for i, dy in enumerate(dys):
        for all_, one in zip(batched, torch.autograd.grad(y, leaves_, dy, retain_graph=True), strict=True):
            torch.testing.assert_close(all_[i], one)


def test_without_gradients_the_values_are_the_same() -> None:
    t = make((2, 7))
    with torch.no_grad():
        y = ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING)
    assert torch.equal(y, ops.selective_linear(**leaves(t), threshold=THRESHOLD, scaling=SCALING).detach())


def test_S_is_a_result_without_a_gradient() -> None:
    t = trainable(("x", "lora_A", "lora_B", "gate"), make())
    y, S = torch.ops.slora.selective_linear(*(t[name] for name in NAMES), THRESHOLD, SCALING, [0, 2])
    assert y.requires_grad
    assert not S.requires_grad


def test_x_is_not_kept_where_no_gradient_needs_it() -> None:
    t = trainable(("x", "lora_B", "gate"), make((123,)))
    _, kept = kept_by(lambda: ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING))
    assert not any(k.data_ptr() == t["x"].data_ptr() for k in kept)


def test_S_is_not_kept_where_no_gradient_needs_it() -> None:
    t = trainable(("x", "lora_A"), make((123,), active="all"))
    _, kept = kept_by(lambda: ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING))
    assert not any(tuple(k.shape) == (123, 12) for k in kept)


def test_nothing_is_kept_without_gradients() -> None:
    t = make((5,))
    with torch.no_grad():
        _, kept = kept_by(lambda: ops.selective_linear(**leaves(t), threshold=THRESHOLD, scaling=SCALING))
    assert kept == []
    _, kept = kept_by(lambda: ops.selective_linear(**trainable((), t), threshold=THRESHOLD, scaling=SCALING))
    assert kept == []


@pytest.mark.parametrize("active", [[], [0, 2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("dropout", [0.0, 0.2], ids=["no dropout", "dropout"])
def test_nothing_of_size_M_x_N_is_allocated_but_the_output(active: list[int], dropout: float) -> None:
    M, K, N = 123, 37, 36
    t = trainable(("x", "lora_A", "lora_B", "gate"), make((M,), active="all"))
    t["gate"].data = torch.tensor([0.15 if i in active else 0.05 for i in range(3)])
    args = [t[name] for name in NAMES]
    seed = torch.tensor(5) if dropout else None
    with Allocations(*args) as forward:
        _, S = operator._forward(*args, THRESHOLD, SCALING, active, dropout, seed)
    # With dropout also masked x and, by pairs of columns, its mask.
    large = [shape for shape in forward.shapes if math.prod(shape) >= M * N and not {K, (K + 1) // 2} & set(shape)]
    assert large == [(M, N)]
    dy = torch.randn(M, N)
    with Allocations(*args, S, dy) as backward:
        operator._backward(
            dy, t["x"], S, t["weight"], [True] * 4, t["lora_A"], t["lora_B"], t["gate"], THRESHOLD, SCALING, active,
            dropout, seed,
        )  # fmt: skip
    # N = 36 < K = 37, so what is as large as dy either is dx or is something else of M rows: masked x, its mask.
    assert [shape for shape in backward.shapes if shape[-1:] == (N,) and math.prod(shape) >= M * N] == []
    if not dropout:
        assert [shape for shape in backward.shapes if shape[:1] == (M,) and math.prod(shape) >= M * N] == [(M, K)]


GRADIENTS = ("x", "weight", "bias", "lora_A", "lora_B", "gate")


@pytest.mark.parametrize(
    "names",
    [c for n in range(1, 7) for c in itertools.combinations(GRADIENTS, n)],
    ids="-".join,
)
def test_only_the_gradients_asked_for_are_computed(names: tuple[str, ...]) -> None:
    base = make((6,), active="some")
    t = trainable(names, base)
    dy = torch.randn(6, 36)
    y = ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING, active=[0, 2])
    flops.register()
    with FlopCounterMode(display=False) as counter:
        y.backward(dy)
    wanted = exact(base, dy)
    for name in GRADIENTS:
        if name in names:
            torch.testing.assert_close(t[name].grad.double(), wanted[name].double(), rtol=1e-4, atol=1e-4, msg=name)
        else:
            assert t[name].grad is None, name
    M, N, K, r, n = 6, 36, 37, 4, 12
    narrow, wide = 2 * M * n * r, 2 * M * r * K
    per_block = (
        narrow * bool({"x", "lora_A"} & set(names))
        + wide * ("x" in names)
        + wide * ("lora_A" in names)
        + narrow * bool({"lora_B", "gate"} & set(names))
    )
    expected = 2 * M * N * K * (("x" in names) + ("weight" in names)) + 2 * per_block
    assert counter.get_total_flops() == expected


class Products(FlopCounterMode):
    """PyTorch's counter, which by itself overlooks the in-place `addmm_` and `baddbmm_`."""

    def __init__(self) -> None:
        missing = {torch.ops.aten.addmm_: self.addmm, torch.ops.aten.baddbmm_: self.addmm}
        super().__init__(display=False, custom_mapping=missing)

    @staticmethod
    def addmm(y: Any, a: Any, b: Any, out_shape: Any = None, **kwargs: Any) -> int:
        return 2 * math.prod(a) * b[-1]


@pytest.mark.parametrize("active", [[], [1], [0, 2], [0, 1, 2]], ids=str)
@pytest.mark.parametrize("needs", list(itertools.product([False, True], repeat=4)), ids=str)
def test_flop_formulas_count_the_products_that_run(active: list[int], needs: tuple[bool, ...]) -> None:
    t = make((123,), active="all")
    operands = LoRAOperands(t["lora_A"], t["lora_B"], t["gate"], THRESHOLD, SCALING, active)
    with Products() as counter:
        _, S = EAGER.forward(t["x"], t["weight"], t["bias"], operands)
    assert counter.get_total_flops() == flops.forward_flops(123, 36, 37, 4, 3, len(active))
    dy = torch.randn(123, 36)
    with Products() as counter:
        EAGER.backward(dy, t["x"], S, t["weight"], operands, Needs(*needs))
    assert counter.get_total_flops() == flops.backward_flops(123, 36, 37, 4, 3, len(active), needs)


# PyTorch's own checks of operators


def samples() -> Iterator[Any]:
    for dtype, blocks, active, rows in (
        (torch.float32, 1, None, (5,)),
        (torch.float32, 3, [0, 2], (2, 3)),
        (torch.float32, 3, [], (4,)),
        (torch.float64, 4, None, (1,)),
        (torch.bfloat16, 3, None, (2, 3)),
        (torch.float32, 3, [0, 2], (0,)),
        (torch.float32, 1, [0], ()),
    ):
        lora_dtype = torch.float32 if dtype == torch.bfloat16 else dtype
        t = make(rows, blocks=blocks, dtype=dtype, lora_dtype=lora_dtype)
        if active is not None:
            t["gate"] = torch.tensor([0.15 if i in active else 0.05 for i in range(blocks)])
        yield pytest.param(t, active, id=f"{name_of(dtype)}-{blocks}-{active}-{rows}")


@pytest.mark.parametrize(("t", "active"), list(samples()))
def test_opcheck_of_the_forward(t: dict[str, Tensor], active: list[int] | None) -> None:
    args = tuple(trainable(("x", "lora_A", "lora_B", "gate"), t).values())
    torch.library.opcheck(torch.ops.slora.selective_linear, (*args, THRESHOLD, SCALING, active))


@pytest.mark.parametrize(("t", "active"), list(samples()))
@pytest.mark.parametrize("needs", [[True] * 4, [False, True, True, False], [False] * 4], ids=str)
def test_opcheck_of_the_backward(t: dict[str, Tensor], active: list[int] | None, needs: list[bool]) -> None:
    y, S = torch.ops.slora.selective_linear(*t.values(), THRESHOLD, SCALING, active)
    blocks = (t["lora_A"], t["lora_B"], t["gate"], THRESHOLD, SCALING, active)
    torch.library.opcheck(
        torch.ops.slora.selective_linear_backward,
        (torch.randn_like(y), t["x"], S, t["weight"], needs, *blocks),
        test_utils=("test_schema", "test_autograd_registration", "test_faketensor"),
    )


def test_opcheck_with_dropout() -> None:
    args = tuple(trainable(("x", "lora_A", "lora_B", "gate"), make()).values())
    torch.library.opcheck(torch.ops.slora.selective_linear, (*args, THRESHOLD, SCALING, [0, 2], 0.3, torch.tensor(3)))


# Errors

FP8 = torch.float8_e4m3fn
BAD: dict[str, tuple[dict[str, Any], str]] = {
    "K of x": ({"x": torch.randn(5, 36)}, r"x has shape [5, 36] and weight [36, 37]; expected x [..., K]"),
    "scalar x": ({"x": torch.randn(())}, r"x has shape [] and weight [36, 37]"),
    "bias": ({"bias": torch.randn(35)}, r"bias has shape [35]; expected [36], the rows of weight"),
    "gate matrix": ({"gate": torch.randn(3, 1)}, r"gate has shape [3, 1]; expected [blocks]"),
    "no gate": ({"gate": torch.randn(0)}, r"gate has shape [0]; expected [blocks] with at least one block"),
    "blocks that do not divide": (
        {"gate": torch.randn(5)},
        r"gate has 5 blocks, which does not divide the 36 rows of weight",
    ),
    "A of other blocks": ({"lora_A": torch.randn(2, 4, 37)}, r"lora_A has shape [2, 4, 37]; expected [3, r, 37]"),
    "A of another K": ({"lora_A": torch.randn(3, 4, 36)}, r"lora_A has shape [3, 4, 36]; expected [3, r, 37]"),
    "rank 0": ({"lora_A": torch.randn(3, 0, 37)}, r"rank 0; expected a rank from 1 to 256"),
    "rank 257": ({"lora_A": torch.randn(3, 257, 37)}, r"rank 257; expected a rank from 1 to 256"),
    "B": ({"lora_B": torch.randn(3, 12, 5)}, r"lora_B has shape [3, 12, 5]; expected [3, 12, 4]"),
    "dtype of x": (
        {"x": torch.ones(5, 37, dtype=torch.int64)},
        r"x has shape [5, 37] and dtype torch.int64; expected one of",
    ),
    "dtype of weight": (
        {"weight": torch.randn(36, 37).bfloat16()},
        r"weight has shape [36, 37] and dtype torch.bfloat16 but x has shape [5, 37] and dtype torch.float32; run",
    ),
    "dtype of A": (
        {"lora_A": torch.randn(3, 4, 37).bfloat16()},
        r"lora_A has shape [3, 4, 37] and dtype torch.bfloat16 and lora_B has shape [3, 12, 4] and dtype torch."
        r"float32; expected both in torch.float32",
    ),
    "dtype of A and B": (
        {"lora_A": torch.zeros(3, 4, 37).to(FP8), "lora_B": torch.zeros(3, 12, 4).to(FP8)},
        f"lora_B has shape [3, 12, 4] and dtype {FP8}; expected both in torch.float32",
    ),
    "dtype of A beside bf16": (
        {
            "x": torch.randn(5, 37).bfloat16(),
            "weight": torch.randn(36, 37).bfloat16(),
            "bias": None,
            "lora_A": torch.randn(3, 4, 37).half(),
        },
        r"expected both in torch.bfloat16 or torch.float32",
    ),
    "dtype of gate": (
        {"gate": torch.ones(3, dtype=torch.int64)},
        r"gate has shape [3] and dtype torch.int64; expected a floating",
    ),
    "device": (
        {"gate": torch.empty(3, device="meta")},
        r"gate of shape [3] is on meta but x of shape [5, 37] is on cpu; move the module",
    ),
    "no seed": (
        {"dropout": 0.5},
        r"seed is None with dropout=0.5; draw one with torch.randint(2**62, (), device='cpu')",
    ),
    "dtype of seed": (
        {"dropout": 0.5, "seed": torch.tensor(1.0)},
        r"seed has shape [] and dtype torch.float32; expected an int64 scalar",
    ),
    "seeds": (
        {"dropout": 0.5, "seed": torch.tensor([1, 2])},
        r"seed has shape [2] and dtype torch.int64; expected an int64 scalar",
    ),
    "device of seed": (
        {"dropout": 0.5, "seed": torch.empty((), dtype=torch.int64, device="meta")},
        r"seed is on meta but x of shape [5, 37] is on cpu; draw one with torch.randint",
    ),
    "falling active": ({"active": [2, 0]}, r"active is [2, 0]; expected the active ones of 3 blocks in rising order"),
    "active twice": ({"active": [1, 1]}, r"active is [1, 1]; expected"),
    "active block beyond the last": ({"active": [0, 3]}, r"active is [0, 3]; expected"),
    "certain dropout": ({"dropout": 1.0, "seed": torch.tensor(1)}, r"dropout=1.0 is not a probability below 1"),
    "negative dropout": ({"dropout": -0.1, "seed": torch.tensor(1)}, r"dropout=-0.1 is not a probability below 1"),
}
DEVICE_CASES = ("device", "device of seed")


@pytest.mark.parametrize("interpret", ["0", "1"])
@pytest.mark.parametrize("backend", ["auto", "triton", "torch", "reference"])
@pytest.mark.parametrize("case", BAD)
def test_bad_arguments_name_the_tensor_what_it_is_and_what_it_should_be(
    case: str, backend: str, interpret: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    # With 0 the triton backend has no device to run on, which is said only of arguments that fit together.
    monkeypatch.setenv("SLORA_BACKEND", backend)
    monkeypatch.setenv("TRITON_INTERPRET", interpret)
    changed, message = BAD[case]
    arguments = {**make(), **changed}
    with pytest.raises(ShapeError) as raised:
        ops.selective_linear(**arguments, threshold=THRESHOLD, scaling=SCALING)
    assert message in str(raised.value)
    assert isinstance(raised.value, ValueError)


@pytest.mark.parametrize("backend", ["auto", "triton", "torch", "reference"])
@pytest.mark.parametrize("active", [[], [0], [0, 1], [0, 1, 2]], ids=str)
def test_active_blocks_that_the_gates_contradict_are_refused(
    active: list[int], backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SLORA_BACKEND", backend)
    t = make()
    t["gate"] = torch.tensor([THRESHOLD, 0.0, 0.5])
    with pytest.raises(ShapeError) as raised:
        ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING, active=active)
    numbers = t["gate"].tolist()
    assert f"active is {active} but gate {numbers} has [0, 2] at or above threshold=0.1; list" in str(raised.value)


@pytest.mark.parametrize("backend", ["auto", "reference"])
def test_listed_blocks_can_be_traced(backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setenv("SLORA_BACKEND", backend)
    t = make()
    more = {"threshold": THRESHOLD, "scaling": SCALING, "active": [0, 2]}
    with FakeTensorMode() as mode:
        assert ops.selective_linear(**{name: mode.from_tensor(v) for name, v in t.items()}, **more).shape == (5, 36)
    torch._dynamo.reset()
    compiled = torch.compile(lambda t: ops.selective_linear(**t, **more), backend="aot_eager", fullgraph=True)
    torch.testing.assert_close(compiled(t), ops.selective_linear(**t, **more))
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["auto", "triton"])
@pytest.mark.parametrize("case", [case for case in BAD if case not in DEVICE_CASES])
def test_bad_arguments_read_the_same_under_fake_tensors(
    case: str, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from torch._subclasses.fake_tensor import FakeTensorMode

    monkeypatch.setenv("SLORA_BACKEND", backend)
    monkeypatch.delenv("TRITON_INTERPRET", raising=False)
    changed, message = BAD[case]
    with FakeTensorMode(allow_non_fake_inputs=False) as mode:
        fakes = {
            name: mode.from_tensor(t) if isinstance(t, Tensor) else t for name, t in {**make_real(), **changed}.items()
        }
        with pytest.raises(ShapeError) as raised:
            ops.selective_linear(**fakes, threshold=THRESHOLD, scaling=SCALING)
    assert message in str(raised.value)


def make_real() -> dict[str, Tensor | None]:
    from torch._subclasses.fake_tensor import unset_fake_temporarily

    with unset_fake_temporarily():
        return make()


@pytest.mark.parametrize("case", ["K of x", "B", "rank 257", "dtype of weight", "no seed", "seeds"])
def test_bad_arguments_read_the_same_under_torch_compile(case: str) -> None:
    changed, message = BAD[case]
    torch._dynamo.reset()
    compiled = torch.compile(
        lambda t: ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING), backend="eager", fullgraph=True
    )
    with pytest.raises(Exception) as raised:  # noqa: PT011  torch wraps it in an exception of its own
        compiled({**make(), **changed})
    assert message in str(raised.value)
    torch._dynamo.reset()


# torch.compile


@pytest.mark.parametrize("dropout", [0.0, 0.3], ids=["no dropout", "dropout"])
def test_compiled_op_gives_the_same_output_and_gradients(dropout: float, assert_as_exact_as: Any) -> None:
    torch._dynamo.reset()
    seed = torch.tensor(9) if dropout else None

    @torch.compile(fullgraph=True, backend="aot_eager")
    def f(t: dict[str, Tensor]) -> Tensor:
        return ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING, dropout=dropout, seed=seed).square()

    t = make((17,))
    one, two = leaves(t), leaves(t)
    f(one).sum().backward()
    ops.selective_linear(
        **two, threshold=THRESHOLD, scaling=SCALING, dropout=dropout, seed=seed
    ).square().sum().backward()
    for name in NAMES:
        torch.testing.assert_close(one[name].grad, two[name].grad, msg=name)
    torch._dynamo.reset()


def test_compiled_op_serves_moving_gates_and_any_number_of_rows_with_few_graphs() -> None:
    from torch._dynamo.testing import CompileCounter

    torch._dynamo.reset()
    counter = CompileCounter()
    compiled = torch.compile(
        lambda t: ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING), backend=counter, fullgraph=True
    )
    for M, gates in ((5, "all"), (5, "none"), (5, "some"), (7, "all"), (9, "none"), (123, "some")):
        t = make((M,), active=gates)
        wanted = ops.selective_linear(**t, threshold=THRESHOLD, scaling=SCALING)
        torch.testing.assert_close(compiled(t), wanted)
    # One graph for 5 rows, one for any number of rows; none for the gates.
    assert counter.frame_count == 2
    torch._dynamo.reset()
