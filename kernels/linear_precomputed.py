"""y and dx where S and T were computed before: a base product whose sums start from the low-rank update.

    y  = x W^T + bias;  y[:, block i] += S_i (c B_i)^T           for the active blocks
    dx = dy W + (T (c A)) . mask                                 T [M, packed r], A [packed r, K], all blocks at once

A program computes one tile after the other, all of them one pipeline (`flatten`). The update, S or T read once per tile
from L2, is where the fp32 sums `acc [BM, BN]` of the main loop start; they are rounded once.

Read: x or dy once per group of row tiles, W once per program wave from L2, S or T and the low-rank factor per tile.
Written: y or dx once. A launch may leave out the first columns, which `split` has from the fused kernel.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from slora.kernels import configs, launch, tiles
from slora.kernels import dropout as counter
from slora.kernels import packed as blocks_of
from slora.kernels.linear_forward import finish
from slora.ops.dropout import drop_units, rescaling
from slora.ops.operands import LoRAOperands


@triton.jit
def _add(
    acc, low, right, j, row, column, stop, M, width, stride_low, stride_right, scaling,
    FORWARD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Return acc with AT_ONCE columns of low, from column j on, times as many of the scaled right."""
    dtype: tl.constexpr = low.dtype.element_ty
    left = tiles.load_low(low, row, j, M, width, stride_low, BM, AT_ONCE)
    if FORWARD:
        b = tiles.load_low(right, column, j, stop, width, stride_right, BN, AT_ONCE)
        acc = tl.dot(left, (b.to(tl.float32) * scaling).to(dtype).T, acc)
    else:
        a = tiles.load_low(right, j, column, width, stop, stride_right, AT_ONCE, BN)
        acc = tl.dot(left, (a.to(tl.float32) * scaling).to(dtype), acc)
    return acc


@triton.jit
def _update(
    low, right, row, column, stop, M, width, stride_low, stride_right, scaling,
    FORWARD: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Return `low (c right)`, `width` columns of low; right is B^T (FORWARD) or A.

    For at most R columns without a loop at run time, which would cost the tiles their one pipeline; with R = 0 in one.
    """
    acc = tl.zeros((BM, BN), tl.float32)
    if R > 0:
        for j in tl.static_range(0, R, AT_ONCE):
            acc = _add(
                acc, low, right, j, row, column, stop, M, width, stride_low, stride_right, scaling,
                FORWARD, BM, BN, AT_ONCE,
            )  # fmt: skip
    else:
        for j in tl.range(0, width, AT_ONCE, num_stages=1):
            acc = _add(
                acc, low, right, j, row, column, stop, M, width, stride_low, stride_right, scaling,
                FORWARD, BM, BN, AT_ONCE,
            )  # fmt: skip
    return acc


@triton.jit(do_not_specialize=["drop", "M", "blocks", "packed", "begin"])
def linear_precomputed(
    rows, W, bias, low, right, out, gate, seed, threshold, scaling, drop,
    M, N, K, n, r, blocks, packed, stride_rows, stride_w, begin,
    FORWARD: tl.constexpr, DROPOUT: tl.constexpr, DESCRIBED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, R: tl.constexpr, AT_ONCE: tl.constexpr,
    GROUP: tl.constexpr, HALVES: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """See the head of this file. rows is x or dy, low S or T, right B or A; rows, W, out: descriptors or pointers.

    Of each block of y, or of dx, the n columns from `begin` on are computed.
    """
    N, K, n, r = tiles.eights(N), tiles.eights(K), tiles.eights(n), tiles.fours(r)
    stride_rows, stride_w = tiles.eights(stride_rows), tiles.eights(stride_w)
    dtype: tl.constexpr = low.dtype.element_ty
    depth = K if FORWARD else N
    tl.assume(depth > 0)
    bits = blocks_of.as_bits(gate, threshold, blocks, packed)
    row_tiles, per_block = tl.cdiv(M, BM), tl.cdiv(n - begin, BN)
    column_tiles = per_block * (blocks if FORWARD else 1)
    if DROPOUT:
        key0, key1, key2 = counter.keys(tl.load(seed))

    for tile in tl.range(tl.program_id(0), row_tiles * column_tiles, tl.num_programs(0), flatten=FLATTEN):
        m, j = tiles.grouped(tile, row_tiles, column_tiles, GROUP)
        block = j // per_block
        row, column = m * BM, begin + j % per_block * BN
        first = block * n + column
        # The update is where the sums start, not where they end: behind the main loop ptxas 12.9 makes every wgmma
        # wait for the last, as it does behind a branch. So zeros are added, and nothing read, of an inactive block.
        if FORWARD:
            index, active = blocks_of.in_bits(bits, block, blocks, packed)
            acc = _update(
                low + index * r, right, row, first, block * n + n, M, tl.where(active, r, 0), packed * r, r,
                scaling, FORWARD, BM, BN, R, AT_ONCE,
            )  # fmt: skip
        else:
            acc = _update(
                low, right, row, column, n, M, tl.where(bits != 0, packed * r, 0), packed * r, n, scaling,
                FORWARD, BM, BN, R, AT_ONCE,
            )  # fmt: skip
        if DROPOUT:
            a_key, b_key = counter.row_keys(key0, key1, row + tl.arange(0, BM))
            acc = tl.where(counter.keep(a_key, b_key, key2, column, drop, BN), acc, 0.0)
        for k in range(0, depth, BK):
            left = tiles.load(rows, row, k, M, depth, stride_rows, BM, BK, DESCRIBED)
            if FORWARD:
                w_tile = tiles.load(W, first, k, N, K, stride_w, BN, BK, DESCRIBED)
                acc = tl.dot(left, w_tile.T, acc)
            else:
                w_tile = tiles.load(W, k, first, N, K, stride_w, BK, BN, DESCRIBED)
                acc = tl.dot(left, w_tile, acc)
        finish(acc, bias, out, dtype, row, block, column, M, n, N if FORWARD else K, BM, BN, HALVES, DESCRIBED)


def forward(
    x: Tensor, W: Tensor, bias: Tensor | None, S: Tensor, operands: LoRAOperands, tile: configs.Gemm,
    y: Tensor | None = None, begin: int = 0,
) -> Tensor:  # fmt: skip
    """Return `y [M, N]` for `S [M, packed * r]`, contiguous; x, W, bias and operands are as for `linear_forward.fused`.

    Args:
        tile: one of `configs.gemm(arch, "precomputed", R)`.
        y: filled from the column `begin` of each block on; by default a new one is filled whole.
    """
    y = x.new_empty(x.shape[0], W.shape[0]) if y is None else y
    _launch(True, x, W, bias, S, operands.lora_B, y, operands, tile, begin)
    return y


def backward(
    dy: Tensor, W: Tensor, T: Tensor, A: Tensor, operands: LoRAOperands, tile: configs.Gemm, dx: Tensor | None = None,
    begin: int = 0,
) -> Tensor:  # fmt: skip
    """Return `dx [M, K]` for `T [M, packed * r]`, contiguous; dy, W and operands are as for `linear_backward.fused`.

    Args:
        A: those of the packed blocks, `[packed * r, K]`, without what is inactive.
        tile: one of `configs.gemm(arch, "precomputed", R)`, with dropout of "masked".
        dx: filled from the column `begin` on; by default a new one is filled whole.
    """
    dx = dy.new_empty(dy.shape[0], W.shape[1]) if dx is None else dx
    _launch(False, dy, W, None, T, A, dx, operands, tile, begin)
    return dx


def unrolled(width: int, tile: configs.Gemm) -> dict[str, int]:
    """Return the constants by which `width` columns of S or T are read: at most 32 at once, in how many pieces."""
    R = configs.padded(width)
    return {"AT_ONCE": min(R, 32), "R": R if tile.FLATTEN and R != configs.ANY_WIDTH else 0}


def _launch(
    forward: bool, rows: Tensor, W: Tensor, bias: Tensor | None, low: Tensor, right: Tensor, out: Tensor,
    operands: LoRAOperands, tile: configs.Gemm, begin: int,
) -> None:  # fmt: skip
    M, blocks, width = rows.shape[0], *((operands.blocks, operands.r) if forward else (1, right.shape[0]))
    n, dropout, box = out.shape[1] // blocks, not forward and operands.dropout > 0.0, (tile.BK, tile.BN)
    as_tiles = launch.described(rows.device)
    if begin >= n:
        return
    with launch.on(rows.device):
        linear_precomputed[launch.persistent(rows.device, tile, M, n - begin, blocks)](
            as_tiles(rows, tile.BM, tile.BK), as_tiles(W, *(reversed(box) if forward else box)), bias, low, right,
            as_tiles(out.view(M, blocks, n), tile.BM, 1, tile.store_width), operands.gate,
            operands.seed if dropout else None, operands.threshold, operands.scaling * rescaling(operands.dropout),
            drop_units(operands.dropout), M, *W.shape, n, operands.r, operands.blocks, operands.packed, rows.stride(0),
            W.stride(0), begin, FORWARD=forward, DROPOUT=dropout, DESCRIBED=as_tiles is not launch.pointer,
            **unrolled(width, tile), **tile.meta(),
        )  # fmt: skip
