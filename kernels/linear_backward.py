"""The gradient of an adapted linear layer's input in one kernel."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from slora.dropout import drop_units, rescaling
from slora.kernels import dropout as counter
from slora.kernels import launch
from slora.kernels import slots as activity


@triton.jit
def _kernel(
    dy, W, A, B, T, dx, gate, seed, threshold, scaling, drop,
    M, K, n, r, blocks, slots, stride_dy, stride_w, m_tiles, k_tiles,
    DROPOUT: tl.constexpr, GIVEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    m, j = tl.program_id(0) // k_tiles, tl.program_id(0) % k_tiles
    rows = m * BM + tl.arange(0, BM)
    columns = j * BN + tl.arange(0, BN)
    low = tl.arange(0, R)
    acc = tl.zeros((BM, BN), tl.float32)
    for block in range(blocks):
        slot, active = activity.slot_of(block, gate, threshold, blocks, slots)
        t = tl.zeros((BM, R), tl.float32)
        for k in range(0, n, BK):
            at = block * n + k + tl.arange(0, BK)
            inside = k + tl.arange(0, BK) < n
            dy_tile = tl.load(
                dy + rows[:, None].to(tl.int64) * stride_dy + at[None, :],
                mask=(rows < M)[:, None] & inside[None, :],
                other=0.0,
            )
            w_tile = tl.load(
                W + at[:, None].to(tl.int64) * stride_w + columns[None, :],
                mask=inside[:, None] & (columns < K)[None, :],
                other=0.0,
            )
            acc = tl.dot(dy_tile, w_tile, acc, input_precision=PRECISION)
            if active and not GIVEN:
                b_tile = tl.load(
                    B + at[:, None].to(tl.int64) * r + low[None, :],
                    mask=inside[:, None] & (low < r)[None, :],
                    other=0.0,
                )
                t = tl.dot(dy_tile, b_tile, t, input_precision=PRECISION)
        place = T + rows[:, None].to(tl.int64) * (slots * r) + slot * r + low[None, :]
        narrow = t.to(dx.dtype.element_ty)
        if active:
            for start in range(0, r, R):
                valid = (start + low) < r
                if GIVEN:
                    narrow = tl.load(place + start, mask=(rows < M)[:, None] & valid[None, :], other=0.0)
                a_tile = tl.load(
                    A + (block * r + start + low)[:, None].to(tl.int64) * K + columns[None, :],
                    mask=valid[:, None] & (columns < K)[None, :],
                    other=0.0,
                )
                a_tile = (a_tile.to(tl.float32) * scaling).to(narrow.dtype)
                update = tl.dot(narrow, a_tile, input_precision=PRECISION)
                if DROPOUT:
                    key0, key1, key2 = counter.keys(tl.load(seed))
                    a, b = counter.row_keys(key0, key1, rows)
                    update = tl.where(counter.keep(a, b, key2, j * BN, drop, BN), update, 0.0)
                acc += update
        if not GIVEN and j == 0 and (active or slots == blocks):
            tl.store(place, narrow, mask=(rows < M)[:, None] & (low < r)[None, :])
    tl.store(
        dx + rows[:, None].to(tl.int64) * K + columns[None, :],
        acc.to(dx.dtype.element_ty),
        mask=(rows < M)[:, None] & (columns < K)[None, :],
    )


def input_gradient(
    dy: Tensor,
    W: Tensor,
    A: Tensor,
    B: Tensor,
    gate: Tensor,
    threshold: float,
    scaling: float,
    slots: int,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    T: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `(dx [M, K], T [M, slots * r])`."""
    M, N = dy.shape
    blocks, r, K = A.shape
    n = N // blocks
    dx = dy.new_empty(M, K)
    given = T is not None
    if T is None:
        T = dy.new_empty(M, slots * r)
    if M == 0:
        return dx, T
    BM, BN, BK, R = 32, 32, 32, min(64, max(16, triton.next_power_of_2(r)))
    m_tiles, k_tiles = triton.cdiv(M, BM), triton.cdiv(K, BN)
    with torch.cuda.device_of(dy):
        _kernel[(m_tiles * k_tiles,)](
            dy, W, A, B.to(dy.dtype), T, dx, gate, seed, threshold, scaling * rescaling(dropout),
            drop_units(dropout), M, K, n, r, blocks, slots, dy.stride(0), W.stride(0), m_tiles, k_tiles,
            DROPOUT=dropout > 0.0, GIVEN=given, PRECISION=launch.precision(dy.dtype), BM=BM, BN=BN, BK=BK, R=R,
        )  # fmt: skip
    return dx, T
