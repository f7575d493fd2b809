"""The operator of `slora.ops` in PyTorch calls: the vendor's GEMM for the base, `addmm_` for the update.

The update is added in place to the base product, so nothing of size M x N is allocated beyond `y`, and only
`x` and `S` have to live until the backward. Shapes are those of `slora.reference`, with `x` and `dy` as rows:
`x [M, K]`, `dy [M, N]`; `S [M, len(active) * r]` holds the products of the active blocks side by side.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from slora import dropout as counter


def gated_forward(
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
) -> tuple[Tensor, Tensor]:
    """Return `(y [..., N], S [M, slots * r])` as `torch.ops.slora.selective_linear` states them.

    Where nobody on the host knows the active blocks (`active` None on a GPU), all are computed, with A = B = 0 for
    the inactive ones.
    """
    blocks, r, in_features = lora_A.shape
    M = math.prod(x.shape[:-1])
    keep = _mask(M, in_features, dropout, seed, x.dtype)
    scaling = scaling * counter.rescaling(dropout)
    present = known_active(gate, threshold, active)
    if present is None:
        on = gate >= threshold
        return forward(x, weight, bias, gated(lora_A, on), gated(lora_B, on), range(blocks), scaling, keep)
    y, S = forward(x, weight, bias, lora_A, lora_B, present, scaling, keep)
    if active is None and len(present) < blocks:
        S = scattered(S.view(M, len(present), r).transpose(0, 1), blocks, present)
        S = S.transpose(0, 1).reshape(M, blocks * r)
    return y, S


def gated_backward(
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
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return `(dx [M, K], dA, dB, dgate)` for `dy [M, N]`, `x [M, K]` and the S of `gated_forward`."""
    blocks, r, in_features = lora_A.shape
    M = dy.shape[0]
    keep = _mask(M, in_features, dropout, seed, dy.dtype)
    scaling = scaling * counter.rescaling(dropout)
    present = known_active(gate, threshold, active)
    if present is None:
        on = gate >= threshold
        A, B = gated(lora_A, on), gated(lora_B, on)
        dx, *gradients = backward(dy, x, weight, A, B, S, range(blocks), scaling, needs, keep)
        # Again, because 0 times what is not finite in x or dy is not 0.
        dA, dB, dgate = (None if gradient is None else gated(gradient, on) for gradient in gradients)
        return dx, dA, dB, dgate
    if active is None and len(present) < blocks and S.dim() == 2:
        S = S.view(M, blocks, r)[:, present].reshape(M, len(present) * r)
    return backward(dy, x, weight, lora_A, lora_B, S, present, scaling, needs, keep)


def known_active(gate: Tensor, threshold: float, active: Sequence[int] | None) -> list[int] | None:
    """Return the active blocks if the host can know them for free, else None."""
    if active is not None:
        return list(active)
    if gate.device.type == "cpu":
        return [i for i, on in enumerate((gate >= threshold).tolist()) if on]
    return None


def gated(values: Tensor, on: Tensor) -> Tensor:
    """Return `values [blocks, ...]` with 0 in place of the blocks that are not `on [blocks]`, whatever they hold."""
    return torch.where(on.view(-1, *(1,) * (values.dim() - 1)), values, 0)


def _mask(M: int, K: int, dropout: float, seed: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    if dropout == 0.0:
        return None
    assert seed is not None
    return counter.kept(M, K, dropout, seed, dtype)


def forward(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    active: Sequence[int],
    scaling: float,
    keep: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `(y [..., N], S)`; `x [..., K]`. `keep [M, K]` is the dropout mask of zeros and ones; what makes up
    for the dropped elements is part of `scaling`."""
    y = base(x, weight, bias)
    x_rows = rows(x) if keep is None else rows(x) * keep
    S = x_rows @ stacked(lora_A, active, x.dtype).T
    y_rows = y.view(S.shape[0], y.shape[-1])
    for S_i, y_i, i in zip(blocks_of(S, len(active)), active_columns(y_rows, lora_B, active), active, strict=True):
        y_i.addmm_(S_i, lora_B[i].to(x.dtype).T, alpha=scaling)
    return y, S


def backward(
    dy: Tensor,
    x: Tensor | None,
    weight: Tensor,
    lora_A: Tensor,
    lora_B: Tensor,
    S: Tensor,
    active: Sequence[int],
    scaling: float,
    needs: Sequence[bool],
    keep: Tensor | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None, Tensor | None]:
    """Return `(dx [M, K], dA, dB, dgate)`, None for each that `needs` does not ask for.

    `x [M, K]` may be None where dA is not needed. Gradients of inactive blocks are 0. dA, dB and dgate have
    the dtype of `lora_A` and `lora_B`; dgate uses `dgate_i = <dB_i, B_i>`, exact for active blocks.
    """
    need_dx, need_dA = needs[:2]
    dx = T = None
    if need_dx or need_dA:
        dy_blocks = active_columns(dy, lora_B, active)
        parts = [dy_i @ lora_B[i].to(dy.dtype) for dy_i, i in zip(dy_blocks, active, strict=True)]
        T = parts[0] if len(parts) == 1 else torch.cat(parts, 1) if parts else dy.new_empty(dy.shape[0], 0)
    if need_dx:
        assert T is not None
        dx = dy @ weight
        A = stacked(lora_A, active, dy.dtype)
        if keep is None:
            dx.addmm_(T, A, alpha=scaling)
        else:
            dx.addcmul_(T @ A, keep, value=scaling)
    x_kept = x if keep is None or x is None or not need_dA else x * keep
    dA, dB, dgate = weight_gradients(x_kept, dy, S, T, lora_A, lora_B, active, scaling, needs[1:])
    return dx, dA, dB, dgate


def weight_gradients(
    x: Tensor | None,
    dy: Tensor,
    S: Tensor,
    T: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    active: Sequence[int],
    scaling: float,
    needs: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return `(dA, dB, dgate)` of `x [M, K]` (masked where dropout is on), `dy [M, N]` and the S and T of the active
    blocks; None for each that `needs` does not ask for."""
    need_dA, need_dB, need_dgate = needs
    dA = dB = dgate = None
    if need_dA:
        assert x is not None
        assert T is not None
        dA = (T.T @ x).mul_(scaling).view(len(active), *lora_A.shape[1:])
        dA = scattered(dA.to(lora_A.dtype), lora_A.shape[0], active)
    if need_dB or need_dgate:
        dy_blocks = active_columns(dy, lora_B, active)
        parts = [_dB(dy_i, S_i) for dy_i, S_i in zip(dy_blocks, blocks_of(S, len(active)), strict=True)]
        if parts:
            dB = torch.stack(parts).to(lora_B.dtype).mul_(scaling)
        else:
            dB = lora_B.new_empty(0, *lora_B.shape[1:])
        if need_dgate:
            dgate = scattered((dB * chosen(lora_B, active)).sum((1, 2)), lora_B.shape[0], active)
        dB = scattered(dB, lora_B.shape[0], active) if need_dB else None
    return dA, dB, dgate


def gate_probe(dy: Tensor, x: Tensor, lora_A: Tensor, lora_B: Tensor, blocks: Sequence[int], scaling: float) -> Tensor:
    """Return `dgate_i = c * <S_i, T_i>` over the rows given, for `blocks` in their order, in fp32 (fp64 of fp64).

    `dy [m, N]`, `x [m, K]`: all rows for the exact gradient, a sample of them for an estimate.
    """
    wide = torch.promote_types(dy.dtype, torch.float32)
    S = x @ stacked(lora_A, blocks, x.dtype).T
    dgate = [
        torch.sum(S_i.to(wide) * (dy_i @ lora_B[i].to(dy.dtype)).to(wide))
        for S_i, dy_i, i in zip(blocks_of(S, len(blocks)), active_columns(dy, lora_B, blocks), blocks, strict=True)
    ]
    return torch.stack(dgate).mul_(scaling)


def base(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Return `F.linear(x, weight, bias)` with the bits that it has where `weight` is trainable.

    Over rows that are not contiguous PyTorch multiplies a frozen weight batch by batch, which rounds otherwise:
    merely freezing a model would change its output.
    """
    if x.dim() <= 2 or (bias is not None and x.is_contiguous()):
        return F.linear(x, weight, bias)
    y = rows(x) @ weight.T
    if bias is not None:
        y = y.add_(bias)
    return y.view(*x.shape[:-1], weight.shape[0])


def rows(x: Tensor) -> Tensor:
    """Return `x [..., K]` as `[M, K]`."""
    # No -1, which says nothing where another size is 0.
    return x.reshape(math.prod(x.shape[:-1]), x.shape[-1])


def unit_stride(x_rows: Tensor) -> Tensor:
    """Return `x_rows [M, C]`, copied only where neighbouring columns are not neighbours in memory."""
    return x_rows if x_rows.stride(1) == 1 else x_rows.contiguous()


def fp32_gate(gate: Tensor, threshold: float) -> tuple[Tensor, float]:
    """Return gates in fp32 with their threshold. Those of another dtype become ones and zeros: rounded, a score next
    to the threshold could change sides."""
    if gate.dtype == torch.float32:
        return gate.contiguous(), threshold
    return (gate >= threshold).float(), 0.5


def stacked(lora_A: Tensor, active: Sequence[int], dtype: torch.dtype) -> Tensor:
    """Return the A matrices of the active blocks on top of each other, `[len(active) * r, K]`."""
    return chosen(lora_A, active).to(dtype).reshape(len(active) * lora_A.shape[1], lora_A.shape[2])


def chosen(matrices: Tensor, active: Sequence[int]) -> Tensor:
    """Return the matrices of the active blocks, `[len(active), ...]`."""
    if len(active) == matrices.shape[0]:
        return matrices
    # Indexing with a list would upload it, which a CUDA graph being captured does not allow.
    return torch.stack([matrices[i] for i in active]) if active else matrices[:0]


def scattered(values: Tensor, blocks: int, active: Sequence[int]) -> Tensor:
    """Return `values [len(active), ...]` at their places among `blocks` blocks, 0 elsewhere."""
    if len(active) == blocks:
        return values
    result = values.new_zeros(blocks, *values.shape[1:])
    for value, i in zip(values, active, strict=True):
        result[i] = value
    return result


def blocks_of(S: Tensor, count: int) -> tuple[Tensor, ...]:
    """Split `S [M, count * r]` into the `[M, r]` of each block."""
    return S.chunk(count, dim=1) if count else ()


def active_columns(y: Tensor, lora_B: Tensor, active: Sequence[int]) -> list[Tensor]:
    """Return the columns of `y [M, N]` that each active block writes, as views."""
    n = lora_B.shape[1]
    return [y[:, i * n : (i + 1) * n] for i in active]


def _dB(dy: Tensor, S: Tensor) -> Tensor:
    # Which operand is transposed changes nothing but the time: on CPU the 16-bit GEMM wants the short side
    # as rows (0.65 ms against 1.08 at 3152 x 1536, r = 16), the fp32 one as columns (0.91 against 1.56).
    return (S.T @ dy).T if dy.dtype in (torch.bfloat16, torch.float16) else dy.T @ S
