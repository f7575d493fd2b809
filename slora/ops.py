"""`torch.ops.slora`: the operator behind every adapted layer, its gradient, its FLOPs and its backends.

    selective_linear(x, weight, bias, lora_A, lora_B, gate, threshold, scaling, active, dropout, seed) -> (y, S)

computes `slora.reference.selective_lora_linear`; `S` is what the backward keeps besides `x`. `active` lists the
active blocks where the host knows them, so that nothing has to be read from the device; None means "read the
gates" and is what `torch.compile` sees, so that a moving gate never changes the graph.

Backends are chosen by `SLORA_BACKEND`: "auto" (the fastest there is), "torch" (`slora.addmm`) or "reference".
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slora import addmm, reference
from slora.errors import ConfigError, ShapeError, StateError

BACKENDS = ("auto", "torch", "reference")
MAX_RANK = 256
_DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)

_library: Any = torch.library.Library("slora", "DEF")  # type: ignore[no-untyped-call]
_library.define(
    "selective_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor gate, "
    "float threshold, float scaling, int[]? active=None, float dropout=0.0, Tensor? seed=None) -> (Tensor, Tensor)"
)
_library.define(
    "selective_linear_backward(Tensor dy, Tensor? x, Tensor weight, Tensor lora_A, Tensor lora_B, Tensor gate, "
    "Tensor S, float threshold, float scaling, int[]? active, float dropout, Tensor? seed, bool[] needs) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)


def selective_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gate: Tensor,
    threshold: float,
    scaling: float,
    active: Sequence[int] | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> Tensor:
    """Return `y [..., N]`: the base linear plus the update of the active blocks.

    Args:
        x: `[..., K]`, any strides, zero rows included.
        weight: `[N, K]`, dtype and device of `x`; usually frozen.
        bias: `[N]`, dtype of `x`, or None.
        lora_A: `[blocks, r, K]`, dtype of `x` or fp32; r from 1 to 256.
        lora_B: `[blocks, N / blocks, r]`, dtype of `lora_A`.
        gate: `[blocks]`, floating.
        threshold: block i is active while `gate[i] >= threshold`.
        scaling: factor in front of every update.
        active: the active blocks in rising order if the host knows them; must agree with `gate`.
        dropout: probability of dropping an element of `x` on the LoRA path; needs `seed`.
        seed: int64 scalar on the CPU; the backward draws the same mask from it, so none is stored.

    The gate gradient of active blocks is straight-through; that of inactive ones is 0 here (`slora.gate`
    supplies it). In the backward only what `requires_grad` asks for is computed.

    Raises:
        ShapeError: shapes, dtypes or devices disagree; names the tensor, what it is and what it should be.
    """
    if backend() == "reference":
        return _reference(x, weight, bias, lora_A, lora_B, gate, threshold, scaling, dropout, seed)
    y: Tensor = torch.ops.slora.selective_linear(
        x, weight, bias, lora_A, lora_B, gate, threshold, scaling, active, dropout, seed
    )[0]
    return y


def _reference(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gate: Tensor,
    threshold: float,
    scaling: float,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    check_inputs(x, weight, bias, lora_A, lora_B, gate)
    keep = _dropout_mask((math.prod(x.shape[:-1]), x.shape[-1]), x, dropout, seed)
    x_lora = None if keep is None else x * keep.view(x.shape)
    # The gate keeps its dtype: rounded to that of x, a score next to the threshold would change sides.
    gate = torch.where(gate >= threshold, gate, gate.detach())
    A, B = lora_A.to(x.dtype), lora_B.to(x.dtype)
    return reference.selective_lora_linear(x, weight, bias, A, B, gate, threshold, scaling, x_lora).to(x.dtype)


def backend() -> str:
    """Return the backend that `SLORA_BACKEND` asks for.

    Raises:
        ConfigError: the variable holds an unknown name.
    """
    name = os.environ.get("SLORA_BACKEND", "auto").strip().lower() or "auto"
    if name not in BACKENDS:
        raise ConfigError(f"SLORA_BACKEND={name!r} is unknown; use one of {', '.join(BACKENDS)}")
    return name


def check_inputs(x: Tensor, weight: Tensor, bias: Tensor | None, lora_A: Tensor, lora_B: Tensor, gate: Tensor) -> None:
    """Raise `ShapeError` unless the tensors fit together; the same text on every backend and under tracing."""
    if x.dtype not in _DTYPES:
        raise ShapeError(f"x has dtype {x.dtype}; expected one of {', '.join(map(str, _DTYPES))}")
    if x.dim() < 1 or weight.dim() != 2 or x.shape[-1] != weight.shape[1]:
        raise ShapeError(
            f"x has shape {_shape(x)} and weight {_shape(weight)}; expected x [..., K] and weight [N, K] of one K"
        )
    out_features, in_features = weight.shape
    if bias is not None and (bias.dim() != 1 or bias.shape[0] != out_features):
        raise ShapeError(f"bias has shape {_shape(bias)}; expected [{out_features}], the rows of weight")
    if gate.dim() != 1 or gate.shape[0] < 1:
        raise ShapeError(f"gate has shape {_shape(gate)}; expected [blocks] with at least one block")
    blocks = gate.shape[0]
    if out_features % blocks:
        raise ShapeError(f"gate has {blocks} blocks, which does not divide the {out_features} rows of weight")
    if lora_A.dim() != 3 or lora_A.shape[0] != blocks or lora_A.shape[2] != in_features:
        raise ShapeError(f"lora_A has shape {_shape(lora_A)}; expected [{blocks}, r, {in_features}]")
    r = lora_A.shape[1]
    if not 1 <= r <= MAX_RANK:
        raise ShapeError(f"lora_A has shape {_shape(lora_A)}, rank {r}; expected a rank from 1 to {MAX_RANK}")
    if tuple(lora_B.shape) != (blocks, out_features // blocks, r):
        raise ShapeError(f"lora_B has shape {_shape(lora_B)}; expected [{blocks}, {out_features // blocks}, {r}]")
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and tensor.dtype != x.dtype:
            raise ShapeError(
                f"{name} has dtype {tensor.dtype} but x has {x.dtype}; run under torch.autocast or cast one of them"
            )
    if lora_A.dtype not in (x.dtype, torch.float32) or lora_B.dtype != lora_A.dtype:
        raise ShapeError(
            f"lora_A has dtype {lora_A.dtype} and lora_B {lora_B.dtype}; expected both {x.dtype} or torch.float32"
        )
    for name, tensor in (
        ("weight", weight),
        ("bias", bias),
        ("lora_A", lora_A),
        ("lora_B", lora_B),
        ("gate", gate),
    ):
        if tensor is not None and tensor.device != x.device:
            raise ShapeError(f"{name} is on {tensor.device} but x is on {x.device}; move the module or the input")


def _shape(tensor: Tensor) -> list[int]:
    return list(tensor.shape)


def _dropout_mask(shape: tuple[int, int], like: Tensor, dropout: float, seed: Tensor | None) -> Tensor | None:
    if dropout == 0.0:
        return None
    if seed is None:
        raise ShapeError(f"seed is None with dropout={dropout}; expected an int64 scalar tensor on the CPU")
    generator = torch.Generator(like.device).manual_seed(int(seed.item()))
    kept = torch.rand(shape, device=like.device, generator=generator) >= dropout
    return kept.to(like.dtype) / (1.0 - dropout)


def _known_active(gate: Tensor, threshold: float, active: Sequence[int] | None) -> list[int] | None:
    """The active blocks if the host can know them for free, else None."""
    if active is not None:
        return list(active)
    if gate.device.type == "cpu":
        return [i for i, on in enumerate((gate >= threshold).tolist()) if on]
    return None


def _forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gate: Tensor,
    threshold: float,
    scaling: float,
    active: Sequence[int] | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_inputs(x, weight, bias, lora_A, lora_B, gate)
    blocks, r, in_features = lora_A.shape
    M = math.prod(x.shape[:-1])
    keep = _dropout_mask((M, in_features), x, dropout, seed)
    chosen = _known_active(gate, threshold, active)
    if chosen is None:
        gated_B = lora_B * (gate >= threshold).to(lora_B.dtype)[:, None, None]
        return addmm.forward(x, weight, bias, lora_A, gated_B, range(blocks), scaling, keep)
    y, S = addmm.forward(x, weight, bias, lora_A, lora_B, chosen, scaling, keep)
    if active is None and len(chosen) < blocks:
        S = addmm.scattered(S.view(M, len(chosen), r).transpose(0, 1), blocks, chosen)
        S = S.transpose(0, 1).reshape(M, blocks * r)
    return y, S


def _backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gate: Tensor,
    S: Tensor,
    threshold: float,
    scaling: float,
    active: Sequence[int] | None,
    dropout: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    blocks, r, in_features = lora_A.shape
    dy_rows = addmm.rows(dy)
    M = dy_rows.shape[0]
    x_rows = None if x is None else addmm.rows(x)
    keep = _dropout_mask((M, in_features), dy, dropout, seed)
    chosen = _known_active(gate, threshold, active)
    if chosen is None:
        on = (gate >= threshold).to(lora_B.dtype)
        all_blocks = range(blocks)
        need_B = [needs[0], needs[1], needs[2] or needs[3], False]
        gated_B = lora_B * on[:, None, None]
        dx, dA, dB, _ = addmm.backward(dy_rows, x_rows, weight, lora_A, gated_B, S, all_blocks, scaling, need_B, keep)
        dgate = None
        if dB is not None:
            dB = dB * on[:, None, None]
            dgate = (dB * lora_B).sum((1, 2)) if needs[3] else None
    else:
        if active is None and len(chosen) < blocks:
            S = S.view(M, blocks, r)[:, chosen].reshape(M, len(chosen) * r)
        dx, dA, dB, dgate = addmm.backward(dy_rows, x_rows, weight, lora_A, lora_B, S, chosen, scaling, needs, keep)
    empty = dy.new_empty(0)
    return (
        empty if dx is None else dx.view(*dy.shape[:-1], in_features),
        dy.new_empty(0) if dA is None else dA,
        dy.new_empty(0) if dB is None or not needs[2] else dB,
        dy.new_empty(0) if dgate is None else dgate.to(gate.dtype),
    )


def _forward_fake(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gate: Tensor,
    threshold: float,
    scaling: float,
    active: Sequence[int] | None = None,
    dropout: float = 0.0,
    seed: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    check_inputs(x, weight, bias, lora_A, lora_B, gate)
    count = gate.shape[0] if active is None else len(active)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, x.new_empty(math.prod(x.shape[:-1]), count * lora_A.shape[1])


def _backward_fake(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gate: Tensor,
    S: Tensor,
    threshold: float,
    scaling: float,
    active: Sequence[int] | None,
    dropout: float,
    seed: Tensor | None,
    needs: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    def result(needed: bool, like: Tensor) -> Tensor:
        return torch.empty_like(like, memory_format=torch.contiguous_format) if needed else dy.new_empty(0)

    dx = dy.new_empty(*dy.shape[:-1], weight.shape[1]) if needs[0] else dy.new_empty(0)
    return dx, result(needs[1], lora_A), result(needs[2], lora_B), result(needs[3], gate)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, lora_A, lora_B, gate, ctx.threshold, ctx.scaling, ctx.active, ctx.dropout, seed = inputs
    S = output[1]
    ctx.mark_non_differentiable(S)
    ctx.set_materialize_grads(False)
    _, need_weight, _, need_A, need_B, need_gate = ctx.needs_input_grad[:6]
    keep_x = need_weight or need_A
    keep_S = need_B or need_gate
    ctx.save_for_backward(x if keep_x else None, weight, lora_A, lora_B, gate, S if keep_S else S.new_empty(0), seed)


def _autograd(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    if dy is None:
        return (None,) * 11
    x, weight, lora_A, lora_B, gate, S, seed = ctx.saved_tensors
    need_x, need_weight, need_bias, need_A, need_B, need_gate = ctx.needs_input_grad[:6]
    needs = [need_x, need_A, need_B, need_gate]
    dx, dA, dB, dgate = torch.ops.slora.selective_linear_backward(
        dy,
        x,
        weight,
        lora_A,
        lora_B,
        gate,
        S,
        ctx.threshold,
        ctx.scaling,
        ctx.active,
        ctx.dropout,
        seed,
        needs,
    )
    dW = addmm.rows(dy).T @ addmm.rows(x) if need_weight else None
    db = addmm.rows(dy).sum(0) if need_bias else None
    grads = [grad if needed else None for grad, needed in zip((dx, dA, dB, dgate), needs, strict=True)]
    return grads[0], dW, db, grads[1], grads[2], grads[3], None, None, None, None, None


def _refuse_twice(ctx: Any, *grads: Tensor | None) -> None:
    raise StateError(
        "slora.selective_linear is differentiable once; set SLORA_BACKEND=reference for second derivatives"
    )


torch.library.impl(_library, "selective_linear", "CompositeExplicitAutograd")(_forward)
torch.library.impl(_library, "selective_linear_backward", "CompositeExplicitAutograd")(_backward)
torch.library.register_fake("slora::selective_linear", _forward_fake, lib=_library)
torch.library.register_fake("slora::selective_linear_backward", _backward_fake, lib=_library)
torch.library.register_autograd("slora::selective_linear", _autograd, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("slora::selective_linear_backward", _refuse_twice, lib=_library)
