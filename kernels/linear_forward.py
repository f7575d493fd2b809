"""The forward of an adapted linear layer in one kernel."""

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
    x, W, bias, A, B, S, y, gate, seed, threshold, scaling, drop,
    M, N, K, n, r, blocks, slots, stride_x, stride_w, m_tiles, n_tiles,
    DROPOUT: tl.constexpr, GIVEN: tl.constexpr, PRECISION: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    m, j = tl.program_id(0) // n_tiles, tl.program_id(0) % n_tiles
    per_block = n_tiles // blocks
    block = j // per_block
    first = (j % per_block) * BN
    slot, active = activity.slot_of(block, gate, threshold, blocks, slots)
    rows = m * BM + tl.arange(0, BM)
    columns = block * n + first + tl.arange(0, BN)
    inside = (first + tl.arange(0, BN)) < n
    low = tl.arange(0, R)
    if DROPOUT:
        key0, key1, key2 = counter.keys(tl.load(seed))
        a, b = counter.row_keys(key0, key1, rows)
    acc = tl.zeros((BM, BN), tl.float32)
    s = tl.zeros((BM, R), tl.float32)
    for k in range(0, K, BK):
        at = k + tl.arange(0, BK)
        x_tile = tl.load(
            x + rows[:, None].to(tl.int64) * stride_x + at[None, :],
            mask=(rows < M)[:, None] & (at < K)[None, :],
            other=0.0,
        )
        w_tile = tl.load(
            W + columns[:, None].to(tl.int64) * stride_w + at[None, :],
            mask=inside[:, None] & (at < K)[None, :],
            other=0.0,
        )
        acc = tl.dot(x_tile, w_tile.T, acc, input_precision=PRECISION)
        if active and not GIVEN:
            a_tile = tl.load(
                A + (block * r + low)[:, None].to(tl.int64) * K + at[None, :],
                mask=(low < r)[:, None] & (at < K)[None, :],
                other=0.0,
            )
            if DROPOUT:
                x_tile = tl.where(counter.keep(a, b, key2, k, drop, BK), x_tile, 0.0)
            s = tl.dot(x_tile, a_tile.T, s, input_precision=PRECISION)
    kept = (rows < M)[:, None] & (low < r)[None, :]
    place = S + rows[:, None].to(tl.int64) * (slots * r) + slot * r + low[None, :]
    narrow = s.to(y.dtype.element_ty)
    if active:
        for start in range(0, r, R):
            valid = (start + low) < r
            if GIVEN:
                narrow = tl.load(place + start, mask=(rows < M)[:, None] & valid[None, :], other=0.0)
            b_tile = tl.load(
                B + columns[:, None].to(tl.int64) * r + start + low[None, :],
                mask=inside[:, None] & valid[None, :],
                other=0.0,
            )
            b_tile = (b_tile.to(tl.float32) * scaling).to(narrow.dtype)
            acc = tl.dot(narrow, b_tile.T, acc, input_precision=PRECISION)
    if not GIVEN and first == 0 and (active or slots == blocks):
        tl.store(place, narrow, mask=kept)
    if bias is not None:
        acc += tl.load(bias + columns, mask=inside, other=0.0)[None, :].to(tl.float32)
    tl.store(
        y + rows[:, None].to(tl.int64) * N + columns[None, :],
        acc.to(y.dtype.element_ty),
        mask=(rows < M)[:, None] & inside[None, :],
    )


def forward(
    x: Tensor,
    W: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    gate: Tensor,
    threshold: float,
    scaling: float,
    slots: int,
    dropout: float = 0.0,
    seed: Tensor | None = None,
    S: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return `(y [M, N], S [M, slots * r])`."""
    M, K = x.shape
    N = W.shape[0]
    blocks, r, _ = A.shape
    n = N // blocks
    y = x.new_empty(M, N)
    given = S is not None
    if S is None:
        S = x.new_empty(M, slots * r)
    if M == 0:
        return y, S
    BM, BN, BK, R = 32, 32, 32, min(64, max(16, triton.next_power_of_2(r)))
    m_tiles, n_tiles = triton.cdiv(M, BM), blocks * triton.cdiv(n, BN)
    with torch.cuda.device_of(x):
        _kernel[(m_tiles * n_tiles,)](
            x, W, bias, A.to(x.dtype), B, S, y, gate, seed, threshold, scaling * rescaling(dropout),
            drop_units(dropout), M, N, K, n, r, blocks, slots, x.stride(0), W.stride(0), m_tiles, n_tiles,
            DROPOUT=dropout > 0.0, GIVEN=given, PRECISION=launch.precision(x.dtype), BM=BM, BN=BN, BK=BK, R=R,
        )  # fmt: skip
    return y, S
