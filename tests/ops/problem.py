"""Random arguments of the operator, and its output and gradients: ours, in eager PyTorch, and exact in fp64."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from slora import ops, reference

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
    """The reference in fp64; the operator leaves the gates of inactive blocks to `slora.gates`."""
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


def trainable(names: tuple[str, ...], t: dict[str, Tensor | None]) -> dict[str, Tensor | None]:
    return {name: None if value is None else value.detach().requires_grad_(name in names) for name, value in t.items()}
