"""The forward of an adapted linear layer in one kernel: base product, S and the low-rank update in one pass.

    S_i = x A_i^T                                                [M, r]
    y   = x W^T + bias;   y[:, block i] += S_i (c B_i)^T         for the active blocks

A program computes one tile of y after the other. Each tile belongs to one block. In one loop over K the tile of x on
chip is multiplied with a tile of W into `acc [BM, BN]` and with one of A_i into `s [BM, R]`, both fp32. Then s is
rounded to the dtype of x, which is what the backward will read, `s (c B_i)^T` is added to acc, and acc is rounded once.
The program that has the first tile of columns of a block stores s; S is never read here.

Read: x once per group of row tiles, W once per program wave from L2; A and B, a few columns wide, from L2.
Written: y and S once. Beyond a frozen layer that is `2 M r` bytes.

Tiles of active blocks come first, then those of inactive ones, in a second loop that neither loads nor multiplies
anything of LoRA; which is which is read from the gates on the device, so that one CUDA graph serves while they move.
Each of the two loops is one pipeline over all its tiles (`flatten`): the loads of the next tile run during the
epilogue of this one.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from slora.kernels import configs, launch, tiles
from slora.kernels import packed as blocks_of_S
from slora.ops.operands import LoRAOperands


@triton.jit
def finish(
    acc, bias, y, dtype: tl.constexpr, row, block, column, M, n, N,
    BM: tl.constexpr, BN: tl.constexpr, HALVES: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Add the bias, round and store."""
    if bias is not None:
        columns = column + tl.arange(0, BN)
        acc += tl.load(bias + block * n + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    tiles.store(y, acc.to(dtype), row, block, column, M, n, N, BM, BN, HALVES, DESCRIBED)


@triton.jit(do_not_specialize=["M", "blocks", "packed", "end"])
def fused_forward(
    x, W, bias, A, B, S, y, gate, threshold, scaling,
    M, N, K, n, r, blocks, packed, stride_x, stride_w, end,
    DESCRIBED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, R: tl.constexpr,
    GROUP: tl.constexpr, HALVES: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """See the head of this file. x [M, K], W [N, K], A [blocks r, K] and y [M, blocks, n]: descriptors or pointers.

    Of each block the columns up to `end` are computed: all n, or those of the first tile alone.
    """
    tl.assume(K > 0)
    N, K, n, r = tiles.eights(N), tiles.eights(K), tiles.eights(n), tiles.fours(r)
    stride_x, stride_w = tiles.eights(stride_x), tiles.eights(stride_w)
    dtype: tl.constexpr = S.dtype.element_ty
    order, count = blocks_of_S.in_order(gate, threshold, blocks, packed)
    row_tiles, per_block = tl.cdiv(M, BM), tl.cdiv(end, BN)
    low = tl.arange(0, R)

    with_update = row_tiles * per_block * count
    for tile in tl.range(tl.program_id(0), with_update, tl.num_programs(0), flatten=FLATTEN):
        m, j = tiles.grouped(tile, row_tiles, per_block * count, GROUP)
        place = j // per_block
        block = blocks_of_S.at_place(order, place)
        row, column, stop = m * BM, block * n + j % per_block * BN, block * n + n
        index = block if packed == blocks else place
        acc = tl.zeros((BM, BN), tl.float32)
        s = tl.zeros((BM, R), tl.float32)
        for k in range(0, K, BK):
            x_tile = tiles.load(x, row, k, M, K, stride_x, BM, BK, DESCRIBED)
            w_tile = tiles.load(W, column, k, N, K, stride_w, BN, BK, DESCRIBED)
            acc = tl.dot(x_tile, w_tile.T, acc)
            # Rows of the next block may come along; the columns that they make of s are dropped below.
            a_tile = tiles.load(A, block * r, k, blocks * r, K, K, R, BK, DESCRIBED)
            s = tl.dot(x_tile, a_tile.T, s)
        s = tl.where((low < r)[None, :], s, 0.0)
        if j % per_block == 0:
            tiles.store_low(S + index * r, s.to(dtype), row, M, r, packed * r, BM, R)
        b = tiles.load_low(B, column, 0, stop, r, r, BN, R)
        acc = tl.dot(s.to(dtype), (b.to(tl.float32) * scaling).to(dtype).T, acc)
        finish(acc, bias, y, dtype, row, block, column - block * n, M, n, N, BM, BN, HALVES, DESCRIBED)

    # The program whose turn it is goes on.
    turns = tl.cdiv(max(with_update - tl.program_id(0), 0), tl.num_programs(0))
    next_tile = tl.program_id(0) + turns * tl.num_programs(0)
    for tile in tl.range(next_tile, row_tiles * per_block * blocks, tl.num_programs(0), flatten=FLATTEN):
        m, j = tiles.grouped(tile - with_update, row_tiles, per_block * (blocks - count), GROUP)
        block = blocks_of_S.at_place(order, count + j // per_block)
        row, column = m * BM, block * n + j % per_block * BN
        acc = tl.zeros((BM, BN), tl.float32)
        for k in range(0, K, BK):
            x_tile = tiles.load(x, row, k, M, K, stride_x, BM, BK, DESCRIBED)
            w_tile = tiles.load(W, column, k, N, K, stride_w, BN, BK, DESCRIBED)
            acc = tl.dot(x_tile, w_tile.T, acc)
        if packed == blocks and j % per_block == 0:
            tiles.store_low(S + block * r, tl.zeros((BM, R), dtype), row, M, r, packed * r, BM, R)
        finish(acc, bias, y, dtype, row, block, column - block * n, M, n, N, BM, BN, HALVES, DESCRIBED)


def fused(
    x: Tensor, W: Tensor, bias: Tensor | None, operands: LoRAOperands, tile: configs.Gemm, first_tile: bool = False
) -> tuple[Tensor, Tensor]:
    """Return `(y [M, N], S [M, packed * r])`; with `first_tile` only the first `tile.BN` columns of each block of y.

    Args:
        x: `[M, K]`, not empty, rows of 16 aligned bytes (`launch.aligned`).
        W: `[N, K]` likewise, in the dtype of x.
        bias: `[N]` in the dtype of x, contiguous, or None.
        operands: A, B contiguous in the dtype of x, gates in fp32, r at most `configs.MAX_FUSED_RANK`, no dropout.
        tile: one of `configs.gemm(arch, "fused", R)`.
    """
    M, K = x.shape
    A, B, gate, threshold, scaling, *_ = operands
    blocks, r, n, packed = operands.blocks, operands.r, operands.n, operands.packed
    y, S = x.new_empty(M, W.shape[0]), x.new_empty(M, packed * r)
    R, end = configs.padded(r), min(tile.BN, n) if first_tile else n
    as_tiles = launch.described(x.device)
    with launch.on(x.device):
        fused_forward[launch.persistent(x.device, tile, M, end, blocks)](
            as_tiles(x, tile.BM, tile.BK), as_tiles(W, tile.BN, tile.BK), bias,
            as_tiles(A.view(blocks * r, K), R, tile.BK), B, S,
            as_tiles(y.view(M, blocks, n), tile.BM, 1, tile.store_width), gate, threshold, scaling,
            M, W.shape[0], K, n, r, blocks, packed, x.stride(0), W.stride(0), end,
            DESCRIBED=as_tiles is not launch.pointer, R=R, **tile.meta(),
        )  # fmt: skip
    return y, S
