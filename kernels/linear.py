"""The base product of an adapted layer and its low-rank update in one pass, forward and backward.

    S_i = x A_i^T                                       [M, r]
    y   = x W^T + bias;   y[:, block i] += S_i (c B_i)^T            for the active blocks
    T_i = dy[:, block i] B_i                            [M, r]
    dx  = dy W + (sum_i T_i (c A_i)) . mask                         over the active blocks

`fused_linear` computes S or T in the loop of the base product, from the tile of x or dy that is on chip: `low [BM, R]`
beside `acc [BM, BN]`, both fp32. After the loop low is rounded to the dtype of x, which is what later passes read, and
multiplied into acc. Programs that have a first tile of columns store it; it is never read here. `precomputed_linear`
reads an S or T that was made before, as the last steps of the loop: S costs `fused_linear` a fifth to a quarter of it,
because wgmma takes hardly less time for 16 columns than for 64. Both round y and dx once.

Each program computes one tile after the other, all of them one pipeline (`flatten`): the loads of the next tile run
during the epilogue of this one. Which blocks are active is read from the gates on the device, so that one CUDA graph
serves while they move. The LoRA part of an inactive block of y is neither read nor computed.

Read: x or dy once per group of row tiles, W once per program wave from L2; A, B, S and T, a few columns wide, from L2.
Written: y or dx once, and S or T when fused: beyond a frozen layer that is `2 M r` bytes. A launch may compute the
first tile of columns of each block alone, or all but the first columns.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

from slora.kernels import configs, launch, tiles
from slora.kernels import dropout as counter
from slora.kernels import packed as blocks_of
from slora.kernels.launch import Box, Launch
from slora.ops.dropout import drop_units
from slora.ops.operands import LoRAOperands


@triton.jit
def _times(
    acc, left, right, k, column, depth, columns, stride,
    FORWARD: tl.constexpr, DESCRIBED: tl.constexpr, BK: tl.constexpr, BN: tl.constexpr,
):  # fmt: skip
    """Return acc + left times the tile at `(k, column)` of right, which is stored transposed for the FORWARD."""
    if FORWARD:
        acc = tl.dot(left, tiles.load(right, column, k, columns, depth, stride, BN, BK, DESCRIBED).T, acc)
    else:
        acc = tl.dot(left, tiles.load(right, k, column, depth, columns, stride, BK, BN, DESCRIBED), acc)
    return acc


@triton.jit
def _finish(
    acc, bias, out, dtype: tl.constexpr, row, block, column, M, n, stride,
    BM: tl.constexpr, BN: tl.constexpr, HALVES: tl.constexpr, DESCRIBED: tl.constexpr,
):  # fmt: skip
    """Add the bias, round and store."""
    if bias is not None:
        columns = column + tl.arange(0, BN)
        acc += tl.load(bias + block * n + columns, mask=columns < n, other=0.0).to(tl.float32)[None, :]
    tiles.store(out, acc.to(dtype), row, block, column, M, n, stride, BM, BN, HALVES, DESCRIBED)


@triton.jit(do_not_specialize=["M", "blocks", "packed", "end"])
def fused_linear(
    rows, W, bias, inner, outer, low, out, gate, threshold, scaling,
    M, N, K, n, r, blocks, packed, stride_rows, stride_w, end,
    FORWARD: tl.constexpr, DESCRIBED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, R: tl.constexpr,
    GROUP: tl.constexpr, HALVES: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """See the head of this file. rows is x, inner A, outer B, low S and out y (FORWARD), or dy, B, A, T and dx.

    rows, W, inner and out are descriptors or pointers. Of each block of y, or of dx, the columns up to `end` are
    computed. dx is that of a single block.
    """
    N, K, n, r = tiles.eights(N), tiles.eights(K), tiles.eights(n), tiles.eights(r)
    stride_rows, stride_w = tiles.eights(stride_rows), tiles.eights(stride_w)
    dtype: tl.constexpr = low.dtype.element_ty
    order, count = blocks_of.in_order(gate, threshold, blocks, packed)
    depth, columns, groups = (K, n, blocks) if FORWARD else (N, K, 1)
    tl.assume(depth > 0)
    height, per_block = tl.cdiv(M, BM), tl.cdiv(end, BN)
    # Tiles with an update come first, then those without, in a loop of their own.
    first, last, before, across, place = tl.program_id(0), height * per_block * count, 0, per_block * count, 0
    for rest in tl.static_range(2):
        for tile in tl.range(first, last, tl.num_programs(0), flatten=FLATTEN):
            m, j = tiles.grouped(tile - before, height, across, GROUP)
            row, column, here = m * BM, j % per_block * BN, place + j // per_block
            block = blocks_of.at_place(order, here) if FORWARD else 0
            at = block * columns + column
            acc, t = tl.zeros((BM, BN), tl.float32), tl.zeros((BM, R), tl.float32)
            for k in range(0, depth, BK):
                left = tiles.load(rows, row, k, M, depth, stride_rows, BM, BK, DESCRIBED)
                acc = _times(acc, left, W, k, at, depth, columns * groups, stride_w, FORWARD, DESCRIBED, BK, BN)
                if rest == 0:
                    # Of A, rows of the next block may come along; the columns that they make are dropped below.
                    t = _times(
                        t, left, inner, k, block * r, depth, groups * r, K if FORWARD else r, FORWARD, DESCRIBED, BK, R
                    )
            t = tl.where((tl.arange(0, R) < r)[None, :], t, 0.0)
            if column == 0 and (rest == 0 or packed == blocks):
                index = block if packed == blocks else here
                tiles.store_low(low + index * r, t.to(dtype), row, M, r, packed * r, BM, R)
            if rest == 0:
                if FORWARD:
                    b = tiles.load_low(outer, at, 0, block * n + n, r, r, BN, R)
                    acc = tl.dot(t.to(dtype), (b.to(tl.float32) * scaling).to(dtype).T, acc)
                else:
                    a = tiles.load_low(outer, 0, at, r, K, K, R, BN)
                    acc = tl.dot(t.to(dtype), (a.to(tl.float32) * scaling).to(dtype), acc)
            _finish(acc, bias, out, dtype, row, block, column, M, columns, columns * groups, BM, BN, HALVES, DESCRIBED)
        # The program whose turn it is goes on.
        first += tl.cdiv(max(last - first, 0), tl.num_programs(0)) * tl.num_programs(0)
        before, place = last, count
        last, across = height * per_block * groups, per_block * (groups - count)


@triton.jit
def _masked_update(
    low, factor, seed, drop, row, column, M, K, width,
    BM: tl.constexpr, BN: tl.constexpr, R: tl.constexpr,
):  # fmt: skip
    """Return a tile of low times factor, both pointers, with the dropout mask of x."""
    update = tl.zeros((BM, BN), tl.float32)
    for k in tl.range(0, width, R, num_stages=1):
        left = tiles.load_low(low, row, k, M, width, width, BM, R)
        update = tl.dot(left, tiles.load_low(factor, k, column, width, K, K, R, BN), update)
    key0, key1, key2 = counter.keys(tl.load(seed))
    a, b = counter.row_keys(key0, key1, row + tl.arange(0, BM))
    return tl.where(counter.keep(a, b, key2, column, drop, BN), update, 0.0)


@triton.jit(do_not_specialize=["drop", "M", "blocks", "packed", "begin"])
def precomputed_linear(
    rows, W, bias, low, factor, out, gate, seed, threshold, drop,
    M, N, K, n, r, blocks, packed, stride_rows, stride_w, begin,
    FORWARD: tl.constexpr, DROPOUT: tl.constexpr, DESCRIBED: tl.constexpr,
    BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, R: tl.constexpr,
    GROUP: tl.constexpr, HALVES: tl.constexpr, FLATTEN: tl.constexpr,
):  # fmt: skip
    """See the head of this file. rows is x, low S, factor c B and out y (FORWARD), or dy, T, c A and dx.

    rows `[1, M, columns]`, W, out, low and factor are descriptors or pointers; with DROPOUT low and factor are
    pointers, R columns of low at a time. low is `[packed, M, r]` (FORWARD), else `[1, M, packed * r]`: all packed
    blocks of dx are one update. Of each block of y, or of dx, the columns from `begin` on are computed.
    """
    N, K, n, r = tiles.eights(N), tiles.eights(K), tiles.eights(n), tiles.eights(r)
    stride_rows, stride_w = tiles.eights(stride_rows), tiles.eights(stride_w)
    order, count = blocks_of.in_order(gate, threshold, blocks, packed)
    depth, columns, groups = (K, n, blocks) if FORWARD else (N, K, 1)
    width = r if FORWARD else packed * r
    main = tl.cdiv(depth, BK)
    tl.assume(main > 0)
    height, per_block = tl.cdiv(M, BM), tl.cdiv(columns - begin, BN)
    # Tiles with an update come first, as in `fused_linear`.
    updated = count if FORWARD else min(count, 1)
    first, last, before, across, place = tl.program_id(0), height * per_block * updated, 0, per_block * updated, 0
    for rest in tl.static_range(2):
        steps = main + tl.cdiv(width, BK) if rest == 0 and not DROPOUT else main
        for tile in tl.range(first, last, tl.num_programs(0), flatten=FLATTEN and not (DROPOUT and rest == 0)):
            m, j = tiles.grouped(tile - before, height, across, GROUP)
            row, column, here = m * BM, begin + j % per_block * BN, place + j // per_block
            block = blocks_of.at_place(order, here) if FORWARD else 0
            index = (block if packed == blocks else here) if FORWARD else 0
            at = block * columns + column
            acc = tl.zeros((BM, BN), tl.float32)
            for step in range(0, steps):
                # After the last columns of x come those of S, after those of W those of B: one pipeline.
                k, limit, left, right, group, stride_left, stride_right = step, depth, rows, W, 0, stride_rows, stride_w
                if rest == 0 and not DROPOUT:  # noqa: SIM102 (known when compiled; the other is not)
                    if step >= main:
                        k, limit, left, right, group = step - main, width, low, factor, index
                        stride_left, stride_right = packed * r, r if FORWARD else K
                if DESCRIBED:
                    a = tl.reshape(left.load([group, row, k * BK]), (BM, BK))
                else:
                    a = tiles.load(left + group * r, row, k * BK, M, limit, stride_left, BM, BK, False)
                acc = _times(
                    acc, a, right, k * BK, at, limit, columns * groups, stride_right, FORWARD, DESCRIBED, BK, BN
                )
            if DROPOUT and rest == 0:
                acc += _masked_update(low, factor, seed, drop, row, column, M, K, width, BM, BN, R)
            _finish(
                acc, bias, out, out.dtype if DESCRIBED else out.dtype.element_ty, row, block, column, M, columns,
                columns * groups, BM, BN, HALVES, DESCRIBED,
            )  # fmt: skip
        first += tl.cdiv(max(last - first, 0), tl.num_programs(0)) * tl.num_programs(0)
        before, place = last, updated
        last, across = height * per_block * groups, per_block * (groups - updated)


def fused(
    rows: Tensor, W: Tensor, bias: Tensor | None, operands: LoRAOperands, tile: configs.Gemm, *, forward: bool,
    first_tile: bool = False,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """Return `(y [M, N], S [M, packed * r])` of x, or `(dx [M, K], T [M, packed * r])` of dy.

    Args:
        rows: x `[M, K]` (forward) or dy `[M, N]`, not empty, rows of 16 aligned bytes (`launch.aligned`).
        W: `[N, K]` likewise, in the dtype of rows.
        bias: `[N]` in the dtype of x, contiguous, at a multiple of 16 bytes, or None, as it is for dx.
        operands: A, B contiguous in the dtype of rows, gates in fp32, r at most `configs.MAX_FUSED_RANK`, no dropout.
            In the backward there is one block.
        tile: one of `configs.gemm(arch, "fused", R)`.
        first_tile: fill only the first `tile.BN` columns of each block of y, or of dx.
    """
    M, (N, K) = rows.shape[0], W.shape
    A, B, gate, threshold, scaling, *_ = operands
    (blocks, r, _), packed = A.shape, operands.packed
    out, low = rows.new_empty(M, N if forward else K), rows.new_empty(M, packed * r)
    inner, outer = (A, B) if forward else (B, A)
    strides = rows.stride(0), W.stride(0)
    launch_fused = _fused(
        rows.device, rows.dtype, bias is None, M, N, K, blocks, r, packed, strides, forward, tile, first_tile
    )
    launch_fused(rows, W, bias, inner, outer, low, out, gate, threshold, scaling)
    return out, low


@functools.lru_cache(maxsize=1024)
def _fused(
    device: torch.device, dtype: torch.dtype, no_bias: bool, M: int, N: int, K: int, blocks: int, r: int, packed: int,
    strides: tuple[int, int], forward: bool, tile: configs.Gemm, first_tile: bool,
) -> Launch:  # fmt: skip
    n, R = N // blocks, configs.padded(r)
    groups, columns, depth = (blocks, n, K) if forward else (1, K, N)
    end = min(tile.BN, columns) if first_tile else columns
    return Launch(
        fused_linear, device, launch.persistent(device, tile, M, end, groups),
        (dtype, no_bias, M >> 31, N, K, n, r, strides, forward, tile),
        [M, N, K, n, r, blocks, packed, *strides, end],
        {"FORWARD": forward, "DESCRIBED": launch.described(device), "R": R, **tile.meta()},
        [
            Box(0, (M, depth), (strides[0], 1), (tile.BM, tile.BK)),
            Box(1, (N, K), (strides[1], 1), tile.of_weight(forward)),
            Box(3, (blocks * r, K), (K, 1), (R, tile.BK)) if forward else Box(3, (N, r), (r, 1), (tile.BK, R)),
            Box(6, (M, groups, columns), (groups * columns, columns, 1), (tile.BM, 1, tile.store_width)),
        ],
    )  # fmt: skip


def precomputed(
    rows: Tensor, W: Tensor, bias: Tensor | None, low: Tensor, factor: Tensor, operands: LoRAOperands,
    tile: configs.Gemm, *, forward: bool, out: Tensor | None = None, begin: int = 0,
) -> Tensor:  # fmt: skip
    """Return y `[M, N]` of x and S, or dx `[M, K]` of dy and T; rows, W, bias and operands are as for `fused`.

    Args:
        low: S or T `[M, packed * r]`, contiguous.
        factor: B, or the A of the packed blocks, `[packed * r, K]`, without what is inactive.
        tile: one of `configs.gemm(arch, "precomputed", R)`, for dx with dropout of "masked".
        out: filled from the column `begin` of each block of y, or of dx, on; by default a new one is filled whole.
    """
    M, (N, K) = rows.shape[0], W.shape
    _, B, gate, threshold, _, _, p, seed = operands
    (blocks, n, r), packed = B.shape, operands.packed
    out = rows.new_empty(M, N if forward else K) if out is None else out
    if begin >= (n if forward else K):
        return out
    # Rounded as in `fused`. To scale S would save a launch, but could overflow.
    factor = factor if operands.factor == 1.0 else factor * operands.factor
    dropout, strides = not forward and p > 0.0, (rows.stride(0), W.stride(0))
    launch_precomputed = _precomputed(
        rows.device, rows.dtype, bias is None, M, N, K, blocks, r, packed, strides, forward, tile, dropout,
        drop_units(p), begin,
    )  # fmt: skip
    launch_precomputed(rows, W, bias, low, factor, out, gate, seed if dropout else None, threshold)
    return out


@functools.lru_cache(maxsize=1024)
def _precomputed(
    device: torch.device, dtype: torch.dtype, no_bias: bool, M: int, N: int, K: int, blocks: int, r: int, packed: int,
    strides: tuple[int, int], forward: bool, tile: configs.Gemm, dropout: bool, drop: int, begin: int,
) -> Launch:  # fmt: skip
    n, width = N // blocks, packed * r
    groups, columns, depth = (blocks, n, K) if forward else (1, K, N)
    boxes = [
        Box(0, (1, M, depth), (strides[0], strides[0], 1), (1, tile.BM, tile.BK)),
        Box(1, (N, K), (strides[1], 1), tile.of_weight(forward)),
        Box(5, (M, groups, columns), (groups * columns, columns, 1), (tile.BM, 1, tile.store_width)),
    ]
    if not dropout:
        # Of y, each packed block is an update of its own; of dx, all of them are one.
        low, factor = ((packed, M, r), (N, r)) if forward else ((1, M, width), (width, K))
        boxes += [
            Box(3, low, (low[2], width, 1), (1, tile.BM, tile.BK)),
            Box(4, factor, (factor[1], 1), tile.of_weight(forward)),
        ]
    return Launch(
        precomputed_linear, device, launch.persistent(device, tile, M, columns - begin, groups),
        (dtype, no_bias, M >> 31, N, K, n, r, strides, forward, dropout, dropout and width, tile),
        [drop, M, N, K, n, r, blocks, packed, *strides, begin],
        {
            "FORWARD": forward, "DROPOUT": dropout, "DESCRIBED": launch.described(device),
            "R": min(configs.padded(width), 32) if dropout else 0, **tile.meta(),
        },
        boxes,
    )  # fmt: skip
