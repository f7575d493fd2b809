"""Selective low-rank adaptation in plain PyTorch: the one statement of the mathematics.

For a linear layer with frozen weight `W [N, K]`, bias `b [N]`, input `x [..., K]`, `blocks` blocks of
`n = N / blocks` consecutive outputs each, rank `r`, scaling `c` and threshold `tau`:

    I_i = 1 if gate_i >= tau else 0
    S_i = x @ A_i.T
    y   = x @ W.T + b;    y[..., block i] += I_i * c * S_i @ B_i.T

Given `dy [..., N]`:

    T_i     = dy[..., block i] @ B_i
    dx      = dy @ W + sum_i I_i * c * T_i @ A_i
    dA_i    = I_i * c * T_i.T @ x
    dB_i    = I_i * c * dy[..., block i].T @ S_i
    dgate_i = c * <S_i, T_i>                       straight-through, for inactive blocks too

Source: arXiv 2501.15377 for the method; the straight-through indicator is that of TAPS (arXiv 2203.16708).
Every kernel is tested against this file. It is written to be read, not to be fast.
"""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def indicator(gate: Tensor, threshold: float) -> Tensor:
    """Return `1` where `gate >= threshold`, else `0`, with the straight-through gradient `d I / d gate := 1`.

    `gate [blocks]` of any floating dtype; the result has its shape and dtype.
    """
    step = (gate >= threshold).to(gate.dtype)
    # Of value 0, for infinity too, and derivative 1, in calls that everything can differentiate, transform and record.
    return step + (gate - gate.detach()).nan_to_num()


def selective_lora_linear(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gate: Tensor,
    threshold: float,
    scaling: float,
    x_lora: Tensor | None = None,
) -> Tensor:
    """Return the output of a linear layer with gated LoRA blocks, differentiable in every tensor.

    Shapes: `x [..., K]`, `weight [N, K]`, `bias [N]` or None, `lora_A [blocks, r, K]`,
    `lora_B [blocks, N / blocks, r]`, `gate [blocks]`; result `[..., N]`. All tensors share one floating dtype.
    `scaling` is `lora_alpha / r`, or `lora_alpha / sqrt(r)` with rank-stabilised LoRA. `x_lora` is what the
    LoRA path reads in place of `x` where dropout is on.
    """
    active = indicator(gate, threshold)
    S = torch.einsum("...k,brk->...br", x if x_lora is None else x_lora, lora_A)
    update = torch.einsum("...br,bnr->...bn", S, lora_B) * (scaling * active[:, None])
    return F.linear(x, weight, bias) + update.flatten(-2)


def selective_lora_linear_backward(
    dy: Tensor,
    x: Tensor,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    gate: Tensor,
    threshold: float,
    scaling: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return `(dx, dA, dB, dgate)` by the formulas above, without autograd.

    Shapes: `dy [..., N]`, the rest as in `selective_lora_linear`; each gradient has the shape of its tensor.
    """
    active = (gate >= threshold).to(dy.dtype)
    M = math.prod(x.shape[:-1])
    x_rows = x.reshape(M, x.shape[-1])
    dy_blocks = dy.reshape(M, *lora_B.shape[:2])
    S = torch.einsum("mk,brk->mbr", x_rows, lora_A)
    T = torch.einsum("mbn,bnr->mbr", dy_blocks, lora_B)
    gated_T = T * (scaling * active[:, None])
    dx = dy @ weight + torch.einsum("mbr,brk->mk", gated_T, lora_A).reshape(x.shape)
    dA = torch.einsum("mbr,mk->brk", gated_T, x_rows)
    dB = torch.einsum("mbn,mbr->bnr", dy_blocks, S) * (scaling * active[:, None, None])
    dgate = scaling * torch.einsum("mbr,mbr->b", S, T)
    return dx, dA, dB, dgate
