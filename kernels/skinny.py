"""The products with the few columns of a LoRA block, by themselves: S beside a GEMM of the vendor, T where dx is not
asked for.

    S_i = (x . mask) A_i^T              x [M, K],  A [blocks, r, K]
    T_i = dy[:, block i] B_i            dy [M, N], B [blocks, n, r]

in the slots of `kernels/slots.py`, side by side: [M, slots * r]. x and dy are read once (x once per 128 columns of S);
A and B, small, come from the L2 cache and are rounded to the dtype of x as they are loaded. Sums are fp32, rounded
once. The columns of an inactive block that has a slot are written as 0 without reading its A, B or columns of dy.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slora.dropout import drop_units
from slora.kernels import dropout as counter
from slora.kernels import launch, narrow_configs, slots

# The widest group of columns of S or T that one program computes.
WIDEST = 128


@triton.jit(do_not_specialize=["drop", "M", "blocks", "n_slots", "room_columns"])
def _S(
    x, A, S, room, gate, seed, threshold, drop, factor, M, K, r, blocks, n_slots, stride_x, room_columns,
    ROOM: tl.constexpr, DROPOUT: tl.constexpr, PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr,
    LOW: tl.constexpr,
):  # fmt: skip
    """Program (row tile, group): BM rows times LOW columns of S."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    column = tl.program_id(1) * LOW + tl.arange(0, LOW)
    inside = rows < M
    valid = column < n_slots * r
    block, active = slots.blocks_of(column // r, valid, gate, threshold, blocks, n_slots)
    acc = tl.zeros((BM, LOW), tl.float32)
    if tl.max(active.to(tl.int32), 0) > 0:
        A_columns = A + (block * r + column % r)[None, :].to(tl.int64) * K
        x_rows = x + rows[:, None].to(tl.int64) * stride_x
        if DROPOUT:
            key0, key1, key2 = counter.keys(tl.load(seed))
            a, b = counter.row_keys(key0, key1, rows)
        for first in range(0, K, BK):
            k = first + tl.arange(0, BK)
            tile = tl.load(x_rows + k[None, :], mask=inside[:, None] & (k < K)[None, :], other=0.0)
            if DROPOUT:
                tile = tl.where(counter.keep(a, b, key2, first, drop, BK), tile, 0.0)
            low = tl.load(A_columns + k[:, None], mask=(k < K)[:, None] & active[None, :], other=0.0)
            acc = tl.dot(tile, low.to(tile.dtype), acc, input_precision=PRECISION)
    place = S + rows[:, None].to(tl.int64) * (n_slots * r) + column[None, :]
    tl.store(place, acc.to(S.dtype.element_ty), mask=inside[:, None] & valid[None, :])
    if ROOM:
        # Beside x, whose row stride it has. What is left of the room up to its aligned width is 0.
        place = room + rows[:, None].to(tl.int64) * stride_x + column[None, :]
        scaled = tl.where(valid[None, :], acc * factor, 0.0).to(S.dtype.element_ty)
        tl.store(place, scaled, mask=inside[:, None] & (column < room_columns)[None, :])


@triton.jit(do_not_specialize=["M", "blocks", "n_slots"])
def _T(
    dy, B, T, gate, threshold, M, n, r, blocks, n_slots, stride_dy,
    PRECISION: tl.constexpr, BM: tl.constexpr, BK: tl.constexpr, LOW: tl.constexpr,
):  # fmt: skip
    """Program (row tile, slot, group): BM rows times LOW columns of the T of one block."""
    rows = tl.program_id(0) * BM + tl.arange(0, BM)
    slot = tl.program_id(1)
    j = tl.program_id(2) * LOW + tl.arange(0, LOW)
    inside = rows < M
    valid = j < r
    block, active = slots.block_of(slot, gate, threshold, blocks, n_slots)
    acc = tl.zeros((BM, LOW), tl.float32)
    if active:
        dy_rows = dy + rows[:, None].to(tl.int64) * stride_dy + block * n
        B_columns = B + block.to(tl.int64) * n * r + j[None, :]
        for first in range(0, n, BK):
            k = first + tl.arange(0, BK)
            tile = tl.load(dy_rows + k[None, :], mask=inside[:, None] & (k < n)[None, :], other=0.0)
            low = tl.load(B_columns + k[:, None] * r, mask=(k < n)[:, None] & valid[None, :], other=0.0)
            acc = tl.dot(tile, low.to(tile.dtype), acc, input_precision=PRECISION)
    place = T + rows[:, None].to(tl.int64) * (n_slots * r) + (slot * r + j)[None, :]
    tl.store(place, acc.to(T.dtype.element_ty), mask=inside[:, None] & valid[None, :])


def products_S(
    x: Tensor,
    lora_A: Tensor,
    gate: Tensor,
    threshold: float,
    n_slots: int,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    room: Tensor | None = None,
    factor: float = 1.0,
) -> Tensor:
    """Return `S [M, n_slots * r]` in the dtype of x.

    `x [M, K]` of unit column stride; `lora_A [blocks, r, K]` contiguous, of any floating dtype; `gate [blocks]` fp32;
    `room [M, at least n_slots * r]` a view with the strides of x, to be filled with `factor * S` and zeros behind it.
    """
    M, K = x.shape
    blocks, r, _ = lora_A.shape
    S = torch.empty(M, n_slots * r, dtype=x.dtype, device=x.device)
    if S.numel() == 0:
        return S
    LOW = min(WIDEST, triton.next_power_of_2(max(16, n_slots * r)))
    rows = M // launch.multiprocessors(x.device)
    tile = narrow_configs.skinny(launch.kind(x.dtype), rows, LOW, launch.in_vectors(x))
    with launch.on(x.device):
        _S[(triton.cdiv(M, tile.BM), triton.cdiv(n_slots * r, LOW))](
            x, lora_A, S, room, gate, seed, threshold, drop_units(dropout), factor, M, K, r, blocks, n_slots,
            x.stride(0), 0 if room is None else room.shape[1],
            ROOM=room is not None, DROPOUT=dropout > 0.0, PRECISION=launch.precision(x.dtype), LOW=LOW, **tile.meta(),
        )  # fmt: skip
    return S


def products_T(dy: Tensor, lora_B: Tensor, gate: Tensor, threshold: float, n_slots: int) -> Tensor:
    """Return `T [M, n_slots * r]` in the dtype of dy.

    `dy [M, N]` of unit column stride; `lora_B [blocks, n, r]` contiguous, of any floating dtype; `gate [blocks]` fp32.
    """
    M = dy.shape[0]
    blocks, n, r = lora_B.shape
    T = torch.empty(M, n_slots * r, dtype=dy.dtype, device=dy.device)
    if T.numel() == 0:
        return T
    LOW = min(WIDEST, triton.next_power_of_2(max(16, r)))
    rows = M // launch.multiprocessors(dy.device)
    tile = narrow_configs.skinny(launch.kind(dy.dtype), rows, LOW, launch.in_vectors(dy) and n % 16 == 0)
    with launch.on(dy.device):
        _T[(triton.cdiv(M, tile.BM), n_slots, triton.cdiv(r, LOW))](
            dy, lora_B, T, gate, threshold, M, n, r, blocks, n_slots, dy.stride(0),
            PRECISION=launch.precision(dy.dtype), LOW=LOW, **tile.meta(),
        )  # fmt: skip
    return T
