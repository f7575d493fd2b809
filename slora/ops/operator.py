"""Values and gradients of the operator behind every adapted layer.

Eager mode goes through a `torch.autograd.Function`. Where something observes the calls (torch.compile, export, a FLOP
counter, fake tensors), or a backward is differentiated, it is the torch.library operator

    torch.ops.slora.selective_linear(x, weight, bias, lora_A, lora_B, gate, threshold, scaling, active, dropout, seed)
        -> (y, S)

whose schema is `x, weight, bias` and then the fields of `LoRAOperands`. Both call the same backend
(`slora.ops.dispatch`). `S` is saved for the backward besides `x`. Under the transforms of torch.func, and where
torch.jit or torch.onnx record, `apply_reference` takes its place: PyTorch calls for which they have rules.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import is_in_torch_dispatch_mode

from slora import reference
from slora.errors import StateError
from slora.ops.backends import Backend, Gradients, Needs
from slora.ops.backends.eager import EAGER
from slora.ops.checks import check_operands
from slora.ops.dispatch import backend_for, check_device, setting
from slora.ops.dropout import keep_mask, rescaling
from slora.ops.layout import rows, zero_inactive
from slora.ops.operands import LoRAOperands

_library: Any = torch.library.Library("slora", "DEF")
_library.define(
    "selective_linear(Tensor x, Tensor weight, Tensor? bias, Tensor lora_A, Tensor lora_B, Tensor gate, "
    "float threshold, float scaling, int[]? active=None, float dropout=0.0, Tensor? seed=None) -> (Tensor, Tensor)"
)
_library.define(
    "selective_linear_backward(Tensor dy, Tensor? x, Tensor S, Tensor weight, bool[] needs, Tensor lora_A, "
    "Tensor lora_B, Tensor gate, float threshold, float scaling, int[]? active=None, float dropout=0.0, "
    "Tensor? seed=None) -> (Tensor, Tensor, Tensor, Tensor)"
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
    """Return `y [..., N]`: the base linear plus the update of the active blocks, as `slora.reference` states it.

    Args:
        x: `[..., K]`, any strides, zero rows included.
        weight: `[N, K]`, dtype and device of `x`; usually frozen.
        bias: `[N]`, dtype of `x`, or None.
        lora_A, lora_B, gate, threshold, scaling, active, dropout, seed: see `LoRAOperands`.

    The gate gradient of active blocks is straight-through; that of inactive ones is 0 here (`slora.ops.gate_probe`
    supplies it). In the backward only what `requires_grad` asks for is computed.

    Raises:
        ShapeError: shapes, dtypes or devices disagree, or `active` is not a rising list of blocks or disagrees with
            `gate`; names the argument, its value and what is expected.
        ConfigError: `SLORA_BACKEND` is unknown, or asks for kernels that cannot run on the device of `x` or in
            its dtype.
    """
    operands = LoRAOperands(lora_A, lora_B, gate, threshold, scaling, active, dropout, seed)
    if needs_reference():
        return apply_reference(x, weight, bias, operands)
    if not torch.compiler.is_compiling():
        check_operands(x, weight, bias, operands)
    return apply(x, weight, bias, operands)


def apply(x: Tensor, weight: Tensor, bias: Tensor | None, operands: LoRAOperands) -> Tensor:
    """Compute `selective_linear` with operands that were checked already; not to be called where `needs_reference`."""
    if torch.compiler.is_compiling():
        if setting() == "reference":
            return apply_reference(x, weight, bias, operands)
        return _as_operator(x, weight, bias, operands)
    backend = backend_for(x, operands)
    if backend is None:
        return apply_reference(x, weight, bias, operands)
    if is_in_torch_dispatch_mode():
        # An observer has to see one operator with a schema rather than the calls that compute it.
        return _as_operator(x, weight, bias, operands)
    if not torch.is_grad_enabled():
        return backend.forward(x, weight, bias, backend.cast(operands, x.dtype))[0]
    A, B, gate = operands[:3]
    y: Tensor = _apply(x, weight, bias, A, B, gate, operands, backend)
    return y


def _as_operator(x: Tensor, weight: Tensor, bias: Tensor | None, operands: LoRAOperands) -> Tensor:
    y: Tensor = torch.ops.slora.selective_linear(x, weight, bias, *operands)[0]
    return y


class _Eager(torch.autograd.Function):
    """`apply(x, weight, bias, lora_A, lora_B, gate, operands, backend)`; A, B and gate are those of `operands`, passed
    for autograd to see them."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, *rest: Any) -> Tensor:
        operands: LoRAOperands = rest[3]
        backend: Backend = rest[4]
        low = backend.cast(operands, x.dtype)
        y, S = backend.forward(x, weight, bias, low)
        if any(ctx.needs_input_grad):
            ctx.save_for_backward(*_saved_tensors(ctx.needs_input_grad, x, weight, S, operands))
            # The casts are the backward's, too. A change of A or B in between is seen in what is saved of them above.
            ctx.call, ctx.backend, ctx.cast = operands[3:7], backend, None if low is operands else low[:2]
        # Autograd forbids in-place changes of a view that a custom function returns.
        return y.detach() if y._is_view() else y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        device = grads[0].device.type
        if device != "meta" and torch.is_autocast_enabled(device):
            # The backward runs under an autocast that the forward was not under, and that would cast some products.
            with torch.autocast(device, enabled=False):
                return _Eager.backward(ctx, *grads)
        # By the operator where the backward is itself differentiated, which the operator refuses, or observed.
        as_operator = torch.is_grad_enabled() or is_in_torch_dispatch_mode()
        by = (None, None) if as_operator else (ctx.backend, ctx.cast)
        return *_gradients_of(ctx, grads[0], *by), None, None


def _saved_tensors(
    needs: Sequence[bool], x: Tensor, weight: Tensor, S: Tensor, operands: LoRAOperands
) -> tuple[Tensor | None, ...]:
    """What is saved for the backward. The same in eager mode and in the operator: activation checkpointing compares."""
    _, need_weight, _, need_A, need_B, need_gate = needs[:6]
    saved_x = x if need_weight or need_A else None
    saved_S = S if need_B or need_gate else None
    return saved_x, weight, saved_S, *operands[:3], operands.seed


def _gradients_of(
    ctx: Any, dy: Tensor, backend: Backend | None, cast: tuple[Tensor, Tensor] | None = None
) -> tuple[Tensor | None, ...]:
    """The gradients of x, weight, bias, A, B and gates by `backend`, or by the operator where that is None.

    `cast`: A and B in the dtype of dy, where the forward has made them.
    """
    x, weight, S, lora_A, lora_B, gate, seed = ctx.saved_tensors
    need_x, need_weight, need_bias, need_A, need_B, need_gate = ctx.needs_input_grad[:6]
    A, B = cast or (lora_A, lora_B)
    threshold, scaling, active, dropout = ctx.call
    operands = LoRAOperands(A, B, gate, threshold, scaling, active, dropout, seed)
    needs = Needs(need_x, need_A, need_B, need_gate)
    S = dy.new_empty(0) if S is None else S
    dx = dA = dB = dgate = None
    if backend is None:
        found = torch.ops.slora.selective_linear_backward(dy, x, S, weight, needs, *operands)
        dx, dA, dB, dgate = (gradient if needed else None for gradient, needed in zip(found, needs, strict=True))
    elif any(needs):
        dx, dA, dB, dgate = _backend_gradients(backend, dy, x, S, weight, needs, operands, lora_A.dtype)
    dW = rows(dy).T @ rows(x) if need_weight else None
    db = rows(dy).sum(0) if need_bias else None
    return dx, dW, db, dA, dB, dgate


def _backend_gradients(
    backend: Backend, dy: Tensor, x: Tensor | None, S: Tensor, weight: Tensor, needs: Needs, operands: LoRAOperands,
    dtype: torch.dtype,
) -> Gradients:  # fmt: skip
    """The gradients by a backend, each in the shape and dtype of its tensor: A and B are parameters of `dtype`."""
    low = backend.cast(operands, dy.dtype)
    dx, dA, dB, dgate = backend.backward(rows(dy), None if x is None else rows(x), S, weight, low, needs)
    if dx is not None and dy.dim() != 2:
        dx = dx.view(*dy.shape[:-1], weight.shape[1])
    return Gradients(dx, _in(dtype, dA), _in(dtype, dB), _in(operands.gate.dtype, dgate))


def _in(dtype: torch.dtype, gradient: Tensor | None) -> Tensor | None:
    return gradient if gradient is None or gradient.dtype == dtype else gradient.to(dtype)


# `Function.apply` without its search for transforms of torch.func: `needs_reference` has made that already.
_apply: Any = super(torch.autograd.Function, _Eager).apply


def needs_reference() -> bool:
    """Whether a transform of torch.func is active, or torch.jit or torch.onnx records."""
    if torch.compiler.is_compiling():
        return torch.onnx.is_in_onnx_export() or torch._C._are_functorch_transforms_active()
    return torch._C._are_functorch_transforms_active() or torch._C._is_tracing()


def apply_reference(
    x: Tensor, weight: Tensor, bias: Tensor | None, operands: LoRAOperands, every_gate: bool = False
) -> Tensor:
    """Return `selective_linear` by `slora.reference`, differentiable any number of times, and by torch.func.

    With `every_gate` inactive gates get their gradient, too, which reads the matrices of inactive blocks. Dropout
    without a seed is PyTorch's own, which follows the `randomness` argument of vmap.
    """
    lora_A, lora_B, gate, threshold, scaling, _, dropout, seed = operands
    x_lora = None
    if dropout:
        if seed is None:
            x_lora = torch.nn.functional.dropout(x, dropout)
        else:
            keep = keep_mask(math.prod(x.shape[:-1]), x.shape[-1], dropout, seed, x.dtype)
            x_lora = x * keep.view(x.shape) * rescaling(dropout)
    # The gate keeps its dtype: rounded to that of x, a score next to the threshold could change sides.
    on = gate >= threshold
    if every_gate:
        A, B = (torch.where(on[:, None, None], t, t.detach()) for t in (lora_A, lora_B))
    else:
        gate = torch.where(on, gate, gate.detach())
        # Zeros in place of the matrices of inactive blocks, which may hold infinity: 0 times infinity is NaN.
        A, B = zero_inactive(lora_A, on), zero_inactive(lora_B, on)
    y = reference.selective_lora_linear(x, weight, bias, A.to(x.dtype), B.to(x.dtype), gate, threshold, scaling, x_lora)
    return y.to(x.dtype)


def _forward(x: Tensor, weight: Tensor, bias: Tensor | None, *blocks: Any) -> tuple[Tensor, Tensor]:
    operands = LoRAOperands(*blocks)
    check_operands(x, weight, bias, operands)
    backend = backend_for(x, operands) or EAGER
    return backend.forward(x, weight, bias, backend.cast(operands, x.dtype))


def _backward(
    dy: Tensor, x: Tensor | None, S: Tensor, weight: Tensor, needs: Sequence[bool], *blocks: Any
) -> tuple[Tensor, ...]:
    operands = LoRAOperands(*blocks)
    backend = backend_for(dy, operands) or EAGER
    found = _backend_gradients(backend, dy, x, S, weight, Needs(*needs), operands, operands.lora_A.dtype)
    # An operator cannot return None: an empty tensor stands for a gradient that is not needed.
    return tuple(dy.new_empty(0) if gradient is None else gradient for gradient in found)


def _forward_fake(x: Tensor, weight: Tensor, bias: Tensor | None, *blocks: Any) -> tuple[Tensor, Tensor]:
    operands = LoRAOperands(*blocks)
    check_operands(x, weight, bias, operands)
    check_device(x.device, x.dtype)
    y = x.new_empty(*x.shape[:-1], weight.shape[0])
    return y, x.new_empty(math.prod(x.shape[:-1]), operands.packed * operands.r)


def _backward_fake(
    dy: Tensor, x: Tensor | None, S: Tensor, weight: Tensor, needs: Sequence[bool], *blocks: Any
) -> tuple[Tensor, ...]:
    dx = dy.new_empty(*dy.shape[:-1], weight.shape[1])
    return tuple(
        t.new_empty(t.shape) if needed else dy.new_empty(0) for t, needed in zip((dx, *blocks[:3]), needs, strict=True)
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    x, weight, _, *blocks = inputs
    operands, S = LoRAOperands(*blocks), output[1]
    ctx.mark_non_differentiable(S)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*_saved_tensors(ctx.needs_input_grad, x, weight, S, operands))
    ctx.call = operands[3:7]


def _gradients(ctx: Any, dy: Tensor | None, _: Tensor | None) -> tuple[Tensor | None, ...]:
    found = (None,) * 6 if dy is None else _gradients_of(ctx, dy, None)
    return *found, None, None, None, None, None


def _refuse_twice(ctx: Any, *grads: Tensor | None) -> None:
    raise StateError(
        "slora.selective_linear is differentiable once; set SLORA_BACKEND=reference for second derivatives"
    )


torch.library.impl(_library, "selective_linear", "CompositeExplicitAutograd")(_forward)
torch.library.impl(_library, "selective_linear_backward", "CompositeExplicitAutograd")(_backward)
torch.library.register_fake("slora::selective_linear", _forward_fake, lib=_library)
torch.library.register_fake("slora::selective_linear_backward", _backward_fake, lib=_library)
torch.library.register_autograd("slora::selective_linear", _gradients, setup_context=_setup_context, lib=_library)
torch.library.register_autograd("slora::selective_linear_backward", _refuse_twice, lib=_library)
