"""The gradient of an adapted linear layer's input in one kernel: base product, T and the low-rank update in one pass.

    T_i = dy[:, block i] B_i                                     [M, r]
    dx  = dy W + sum_i T_i (c A_i)                               over the active blocks

A program computes one tile of dx after the other, block by block. In the loop over a block's columns the tile of dy on
chip is multiplied with a tile of W into `acc [BM, BN]` and with one of B_i into `t [BM, R]`, both fp32. Where the block
ends, t is rounded to the dtype of dy, which is what the gradient of A will read, and `t (c A_i)` is added to acc, which
is rounded once, after the last block. The programs that have the first tile of columns store T; it is never read here.

Read: dy once per group of row tiles, W once per program wave from L2; A and B, a few columns wide, from L2.
Written: dx and T once. Beyond a frozen layer that is `2 M r` bytes.

All tiles of a program are one pipeline where there is one block (`flatten`): the next loads run during the epilogue.
With several blocks the pipeline ends with each; `split` has but the first tile of columns from there. Where no block is
active, as the gates on the device say, the loop runs without anything of LoRA; where some are, the `t` of an inactive
block is computed and dropped.
"""

from __future__ import annotations

import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor

from slora.kernels import configs, launch, tiles
from slora.kernels import packed as blocks_of_T
from slora.ops.operands import LoRAOperands


@triton.jit
def _add_block(
    acc, dy, W, A, B, T, bits, row, column, block, scaling, M, K, n, r, blocks, packed, stride_dy, stride_w,
    UPDATE: tl.constexpr, ONE_BLOCK: tl.constexpr, DESCRIBED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Return acc with the base product and the update of one block; the first tile of columns stores its T."""
    dtype: tl.constexpr = T.dtype.element_ty
    first = block * n
    t = tl.zeros((BM, R), tl.float32)
    for k in range(0, n, BK):
        dy_tile = tiles.load(dy, row, first + k, M, first + n, stride_dy, BM, BK, DESCRIBED)
        w_tile = tiles.load(W, first + k, column, first + n, K, stride_w, BK, BN, DESCRIBED)
        acc = tl.dot(dy_tile, w_tile, acc)
        if UPDATE:
            b_tile = tiles.load(B, first + k, 0, first + n, r, r, BK, R, DESCRIBED)
            t = tl.dot(dy_tile, b_tile, t)
    if ONE_BLOCK:
        index, rank, there = 0, r, packed == 1
    else:
        index, active = blocks_of_T.in_bits(bits, block, blocks, packed)
        rank, there = tl.where(active, r, 0), active | (packed == blocks)
    if column == 0 and there:
        low = tl.where((tl.arange(0, R) < rank)[None, :], t, 0.0)
        tiles.store_low(T + index * r, low.to(dtype), row, M, r, packed * r, BM, R)
    if UPDATE:
        # Without a branch, which would end the pipeline: zeros are added for an inactive block, and its A is not read.
        t = tl.where((tl.arange(0, R) < rank)[None, :], t, 0.0)
        a = tiles.load_low(A + tl.cast(block, tl.int64) * r * K, 0, column, rank, K, K, R, BN)
        acc = tl.dot(t.to(dtype), (a.to(tl.float32) * scaling).to(dtype), acc)
    return acc


@triton.jit
def _tiles_of_dx(
    dy, W, A, B, T, dx, bits, scaling, M, K, n, r, blocks, packed, stride_dy, stride_w, end,
    UPDATE: tl.constexpr, ONE_BLOCK: tl.constexpr, DESCRIBED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr,
    BK: tl.constexpr, R: tl.constexpr, GROUP: tl.constexpr, HALVES: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """All tiles of this program, where any block is active (UPDATE) or none."""
    row_tiles, column_tiles = tl.cdiv(M, BM), tl.cdiv(end, BN)
    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=FLATTEN and ONE_BLOCK):
        m, j = tiles.grouped(tile, row_tiles, column_tiles, GROUP)
        row, column = m * BM, j * BN
        acc = tl.zeros((BM, BN), tl.float32)
        if ONE_BLOCK:
            acc = _add_block(
                acc, dy, W, A, B, T, bits, row, column, 0, scaling, M, K, n, r, blocks, packed, stride_dy, stride_w,
                UPDATE, ONE_BLOCK, DESCRIBED, BM, BN, BK, R,
            )  # fmt: skip
        else:
            for block in range(blocks):
                acc = _add_block(
                    acc, dy, W, A, B, T, bits, row, column, block, scaling, M, K, n, r, blocks, packed,
                    stride_dy, stride_w, UPDATE, ONE_BLOCK, DESCRIBED, BM, BN, BK, R,
                )  # fmt: skip
        tiles.store(dx, acc.to(T.dtype.element_ty), row, 0, column, M, K, K, BM, BN, HALVES, DESCRIBED)


@triton.jit(do_not_specialize=["M", "blocks", "packed", "end"])
def fused_backward(
    dy, W, A, B, T, dx, gate, threshold, scaling,
    M, N, K, n, r, blocks, packed, stride_dy, stride_w, end,
    ONE_BLOCK: tl.constexpr, DESCRIBED: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr,
    R: tl.constexpr, GROUP: tl.constexpr, HALVES: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """See the head of this file. dy [M, N], W [N, K], B [N, r] and dx [M, 1, K] are descriptors or pointers.

    The columns of dx up to `end` are computed: all K, or those of the first tile alone.
    """
    tl.assume(n > 0)
    N, K, n, r = tiles.eights(N), tiles.eights(K), tiles.eights(n), tiles.fours(r)
    stride_dy, stride_w = tiles.eights(stride_dy), tiles.eights(stride_w)
    bits = blocks_of_T.as_bits(gate, threshold, blocks, packed)
    if bits != 0:
        _tiles_of_dx(
            dy, W, A, B, T, dx, bits, scaling, M, K, n, r, blocks, packed, stride_dy, stride_w, end,
            True, ONE_BLOCK, DESCRIBED, BM, BN, BK, R, GROUP, HALVES, FLATTEN,
        )  # fmt: skip
    else:
        _tiles_of_dx(
            dy, W, A, B, T, dx, bits, scaling, M, K, n, r, blocks, packed, stride_dy, stride_w, end,
            False, ONE_BLOCK, DESCRIBED, BM, BN, BK, R, GROUP, HALVES, FLATTEN,
        )  # fmt: skip


def fused(
    dy: Tensor, W: Tensor, operands: LoRAOperands, tile: configs.Gemm, first_tile: bool = False
) -> tuple[Tensor, Tensor]:
    """Return `(dx [M, K], T [M, packed * r])`; with `first_tile` only the first `tile.BN` columns of dx.

    Args:
        dy: `[M, N]`, not empty, rows of 16 aligned bytes (`launch.aligned`).
        W: `[N, K]` likewise, in the dtype of dy.
        operands: A, B contiguous in the dtype of dy, gates in fp32, r at most `configs.MAX_FUSED_RANK`, no dropout.
            Where r is no multiple of 8, rows of B are padded to 16 bytes for TMA: `2 N r` bytes.
        tile: one of `configs.gemm(arch, "fused", R)`; `tile.BK` divides n where there are several blocks, because a
            tile that TMA brings must not reach over the end of one.
    """
    M, N = dy.shape
    A, B, gate, threshold, scaling, *_ = operands
    blocks, r, n, packed, K = operands.blocks, operands.r, operands.n, operands.packed, W.shape[1]
    dx, T = dy.new_empty(M, K), dy.new_empty(M, packed * r)
    end = min(tile.BN, K) if first_tile else K
    as_tiles = launch.described(dy.device)
    B = B.view(N, r)
    if r % 8 and as_tiles is not launch.pointer:
        B = F.pad(B, (0, -r % 8))
    with launch.on(dy.device):
        fused_backward[launch.persistent(dy.device, tile, M, end, 1)](
            as_tiles(dy, tile.BM, tile.BK), as_tiles(W, tile.BK, tile.BN), A,
            as_tiles(B, tile.BK, configs.padded(r)), T,
            as_tiles(dx.view(M, 1, K), tile.BM, 1, tile.store_width), gate, threshold, scaling,
            M, N, K, n, r, blocks, packed, dy.stride(0), W.stride(0), end,
            ONE_BLOCK=blocks == 1, DESCRIBED=as_tiles is not launch.pointer, R=configs.padded(r), **tile.meta(),
        )  # fmt: skip
    return dx, T
