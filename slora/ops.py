"""`torch.ops.slora`: the operator behind every adapted layer, its gradient, its FLOPs and its backends.

    selective_linear(x, weight, bias, lora_A, lora_B, gate, threshold, scaling, active, dropout, seed) -> (y, S)

computes `slora.reference.selective_lora_linear`; `S` is what the backward keeps besides `x`. `active` lists the
active blocks where the host knows them, so that nothing has to be read from the device; None means "read the
gates" and is what `torch.compile` sees, so that a moving gate never changes the graph.

Who computes it is said in `slora.backends`.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from slora import addmm, forms, reference
from slora.arguments import check_active, check_inputs
from slora.backends import backend, check_device, kernels_serve
from slora.dropout import kept, rescaling
from slora.errors import StateError

_library: Any = torch.library.Library("slora", "DEF")
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
        active: the active blocks in rising order if the host knows them; must agree with `gate`, which is
            checked on the CPU only: on CUDA it would cost a copy, and results differ by backend if it does not.
        dropout: probability of dropping an element of `x` on the LoRA path; needs `seed`.
        seed: int64 scalar on the device of `x`, where a CUDA graph can draw a new one per replay. The backward draws
            the same mask from it, so none is stored; every backend draws the same one (`slora.dropout`).

    The gate gradient of active blocks is straight-through; that of inactive ones is 0 here (`slora.gate`
    supplies it). In the backward only what `requires_grad` asks for is computed.

    Raises:
        ShapeError: shapes, dtypes or devices disagree, or `active` is no rising list of blocks or disagrees with
            `gate`; names the argument, what it is and what it should be.
        ConfigError: `SLORA_BACKEND` is unknown, or asks for kernels that cannot run on the device of `x` or in
            its dtype.
    """
    if backend() == "reference":
        return _reference(x, weight, bias, lora_A, lora_B, gate, threshold, scaling, active, dropout, seed)
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
    active: Sequence[int] | None,
    dropout: float,
    seed: Tensor | None,
) -> Tensor:
    check_inputs(x, weight, bias, lora_A, lora_B, gate, dropout, seed, active)
    check_active(gate, threshold, active)
    x_lora = None
    if dropout:
        assert seed is not None
        keep = kept(math.prod(x.shape[:-1]), x.shape[-1], dropout, seed, x.dtype)
        x_lora = x * keep.view(x.shape) * rescaling(dropout)
    # The gate keeps its dtype: rounded to that of x, a score next to the threshold would change sides.
    on = gate >= threshold
    gate = torch.where(on, gate, gate.detach())
    # What inactive blocks hold is not read: 0 times infinity is not 0.
    A, B = addmm.gated(lora_A, on).to(x.dtype), addmm.gated(lora_B, on).to(x.dtype)
    return reference.selective_lora_linear(x, weight, bias, A, B, gate, threshold, scaling, x_lora).to(x.dtype)


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
    check_inputs(x, weight, bias, lora_A, lora_B, gate, dropout, seed, active)
    check_active(gate, threshold, active)
    check_device(x)
    compute = forms.forward if x.numel() and weight.numel() and kernels_serve(x, gate) else addmm.gated_forward
    return compute(x, weight, bias, lora_A, lora_B, gate, threshold, scaling, active, dropout, seed)


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
    dy_rows = addmm.rows(dy)
    x_rows = None if x is None else addmm.rows(x)
    compute = forms.backward if dy.numel() and weight.numel() and kernels_serve(dy, gate) else addmm.gated_backward
    dx, dA, dB, dgate = compute(
        dy_rows, x_rows, weight, lora_A, lora_B, gate, S, threshold, scaling, active, dropout, seed, needs
    )
    # An operator returns tensors; what is not needed is an empty one.
    return (
        dy.new_empty(0) if dx is None else dx.view(*dy.shape[:-1], weight.shape[1]),
        dy.new_empty(0) if dA is None else dA,
        dy.new_empty(0) if dB is None else dB,
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
    check_inputs(x, weight, bias, lora_A, lora_B, gate, dropout, seed, active)
    check_device(x)
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
