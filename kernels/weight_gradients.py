"""Gradients of the LoRA matrices and of the gates in one pass over x and dy.

    dA_i    = c * T_i^T (x . mask)                  [r, K]
    dB_i    = c * dy[:, block i]^T S_i              [n, r]
    dgate_i = <dB_i, B_i>                           from the fp32 sums, before dB is rounded

for the active blocks, 0 for the others. `x [M, K]` and `dy [M, N]` are read once from device memory (x once per 128
columns of T, dy once per 128 of S_i), by programs that each own a tile of columns of x or of dy and every `splits`-th
step of rows; S and T, a few columns wide, come from the L2 cache. All programs walk from the last rows to the first,
because the input gradient has read dy in the other direction and the cache still holds its end. A program leaves its
fp32 sum in a buffer of partial sums, and its part of <dB_i, B_i>; a second, small kernel adds both in the order of the
splits. There are no atomics: two runs give the same bits. An inactive block costs an empty program: neither its columns
of dy nor those of S and T are read.

The partial sums take `4 * splits * packed * r * (K + n)` bytes. `splits` is such that `splits * (x_tiles + dy_tiles)`
programs fill the GPU at most twice, or 1 where the tiles alone do: with 132 SMs, TILE = 128 and r = 16, 4.3 MB at most,
whatever M is.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

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

# The widest group of columns of S or T that one program multiplies with: its sums are TILE x this in registers.
WIDEST = 128
# Elements of a gradient that one program of the reduction adds up, and how many splits it loads at once.
CHUNK, AT_ONCE = 512, 8


@triton.jit
def _sum_over_rows(
    source, low, low_columns, low_valid, first, split, splits, M, columns, stride, stride_low, seed, drop,
    DROPOUT: tl.constexpr, DESCRIBED: tl.constexpr, TILE: tl.constexpr, LOW: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Return `source[rows, first:first + TILE]^T low[rows, low_columns]` over the split's rows, [TILE, LOW] in fp32.

    wgmma wants the product as TILE x LOW; mma.sync can pipeline it as LOW x TILE.
    """
    acc = tl.zeros((TILE, LOW) if DESCRIBED else (LOW, TILE), tl.float32)
    if DROPOUT:
        key0, key1, key2 = counter.keys(tl.load(seed))
    steps = tl.cdiv(M, ROWS)
    for step in range(split, steps, splits):
        row = (steps - 1 - step) * ROWS
        rows = row + tl.arange(0, ROWS)
        tile = tiles.load(source, row, first, M, columns, stride, ROWS, TILE, DESCRIBED)
        if DROPOUT:
            a, b = counter.row_keys(key0, key1, rows)
            tile = tl.where(counter.keep(a, b, key2, first, drop, TILE), tile, 0.0)
        narrow = tl.load(
            low + rows[:, None].to(tl.int64) * stride_low + low_columns[None, :],
            mask=(rows < M)[:, None] & low_valid[None, :],
            other=0.0,
        )
        acc = tl.dot(tl.trans(tile), narrow, acc) if DESCRIBED else tl.dot(tl.trans(narrow), tile, acc)
    return acc if DESCRIBED else tl.trans(acc)


@triton.jit(do_not_specialize=["drop", "M", "blocks", "packed", "splits", "x_tiles", "dy_tiles"])
def partial_sums(
    x, dy, S, T, B, gate, seed, partial_A, partial_B, dots, threshold, drop,
    M, K, N, n, r, blocks, packed, stride_x, stride_dy, splits, x_tiles, dy_tiles,
    DROPOUT: tl.constexpr, DESCRIBED: tl.constexpr,
    TILE: tl.constexpr, LOW_A: tl.constexpr, LOW_B: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (split, tile): one tile of columns of x (the first `x_tiles`) or of dy, over the rows of the split.

    Tiles of x: `k * groups + g`, g the group of LOW_A columns of T. Tiles of dy: `(index * n_tiles + j) * groups + g`,
    g the group of LOW_B columns of that packed block's S; j counts within the block, so that a tile's sums belong to
    one block. `dots [splits, dy_tiles]` gets the inner product of each with B, where it is asked for.
    """
    K, N, n, r = tiles.eights(K), tiles.eights(N), tiles.eights(n), tiles.eights(r)
    stride_x, stride_dy = tiles.eights(stride_x), tiles.eights(stride_dy)
    tile = tl.program_id(0) % (x_tiles + dy_tiles)
    split = tl.program_id(0) // (x_tiles + dy_tiles)
    wide, low = tl.arange(0, TILE)[:, None], tl.arange(0, LOW_B)
    if tile < x_tiles:
        groups = tl.cdiv(packed * r, LOW_A)
        columns = (tile % groups) * LOW_A + tl.arange(0, LOW_A)
        valid = columns < packed * r
        if packed == blocks:
            valid &= tl.load(gate + columns // r, mask=valid, other=float("-inf")) >= threshold
        if tl.max(valid.to(tl.int32), 0) > 0:
            first = tile // groups * TILE
            acc = _sum_over_rows(
                x, T, columns, valid, first, split, splits, M, K, stride_x, packed * r, seed, drop,
                DROPOUT, DESCRIBED, TILE, LOW_A, ROWS,
            )  # fmt: skip
            own = partial_A + (split * packed * r + columns)[None, :].to(tl.int64) * K + first + wide
            tl.store(own, acc, mask=(first + wide < K) & valid[None, :])
    else:
        tile -= x_tiles
        groups, n_tiles = tl.cdiv(r, LOW_B), tl.cdiv(n, TILE)
        index = tile // (groups * n_tiles)
        block, active = blocks_of.block_of(index, gate, threshold, blocks, packed)
        dot = 0.0
        if active:
            columns = tile % groups * LOW_B + low
            first = tile // groups % n_tiles * TILE
            acc = _sum_over_rows(
                dy, S + index * r, columns, columns < r, block * n + first, split, splits, M, N, stride_dy, packed * r,
                seed, drop, False, DESCRIBED, TILE, LOW_B, ROWS,
            )  # fmt: skip
            inside = (first + wide < n) & (columns < r)[None, :]
            of_block = (first + wide) * r + columns[None, :]
            tl.store(partial_B + (split * packed + index).to(tl.int64) * n * r + of_block, acc, mask=inside)
            if dots is not None:
                b = tl.load(B + tl.cast(block, tl.int64) * n * r + of_block, mask=inside, other=0.0).to(tl.float32)
                # Beyond the block's end acc may hold what is not finite.
                dot = tl.sum(tl.where(inside, acc * b, 0.0))
        if dots is not None:
            tl.store(dots + split * dy_tiles + tile, dot)


@triton.jit
def _total(
    partial, target, i, size, block, index, active, packed, splits, scaling, CHUNK: tl.constexpr, AT_ONCE: tl.constexpr
):
    """Add the elements `i` of the block's `size` over the splits, in order; 0 where the block is inactive."""
    acc = tl.zeros((CHUNK,), tl.float32)
    if active:
        for first in range(0, splits, AT_ONCE):
            for k in tl.static_range(AT_ONCE):
                # In one comparison of tiles: the interpreter of Triton 3.9 makes no mask of a tile and a scalar.
                mask = tl.where(i < size, first + k, splits) < splits
                at = ((first + k) * packed + index).to(tl.int64) * size + i
                acc += tl.load(partial + at, mask=mask, other=0.0)
    tl.store(target + tl.cast(block, tl.int64) * size + i, (acc * scaling).to(target.dtype.element_ty), mask=i < size)


@triton.jit(do_not_specialize=["blocks", "packed", "splits", "count", "parts_A", "parts_B"])
def reduce(
    partial_A, partial_B, dots, dA, dB, dgate, gate, threshold, scaling,
    K, n, r, blocks, packed, splits, count, parts_A, parts_B, CHUNK: tl.constexpr, AT_ONCE: tl.constexpr,
):  # fmt: skip
    """Program (part, block): CHUNK elements of dA_i (the first `parts_A` parts), then of dB_i, then dgate_i, of `count`
    terms per split; None for each of the three that is not asked for."""
    part, block = tl.program_id(0), tl.program_id(1)
    index, active = blocks_of.index_of(block, gate, threshold, blocks, packed)
    i = tl.arange(0, CHUNK)
    if part < parts_A:
        if dA is not None:
            i += part * CHUNK
            _total(partial_A, dA, i, r * K, block, index, active, packed, splits, scaling, CHUNK, AT_ONCE)
    elif part < parts_A + parts_B:
        if dB is not None:
            i += (part - parts_A) * CHUNK
            _total(partial_B, dB, i, n * r, block, index, active, packed, splits, scaling, CHUNK, AT_ONCE)
    elif dgate is not None:
        sums = tl.zeros((CHUNK,), tl.float32)
        if active:
            for first in range(0, splits * count, CHUNK):
                term = first + i
                at = (term // count * packed + index) * count + term % count
                sums += tl.load(dots + at, mask=term < splits * count, other=0.0)
        tl.store(dgate + block, tl.sum(sums, 0) * scaling)


def weight_gradients(
    x: Tensor | None, dy: Tensor, S: Tensor, T: Tensor | None, operands: LoRAOperands, needs: Sequence[bool],
    tile: configs.Columns,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """Return `(dA [blocks, r, K], dB [blocks, n, r], dgate [blocks])`, None for each that `needs` does not ask for.

    Args:
        x: `[M, K]`, rows of 16 aligned bytes (`launch.aligned`); None where dA is not needed.
        dy: `[M, N]` likewise, in the dtype of x.
        S: `[M, packed * r]` as the forward stored it, contiguous; unread where neither dB nor dgate is needed.
        T: `[M, packed * r]` as the input gradient stored it, contiguous; None where dA is not needed.
        operands: A, B contiguous, gates in fp32; with dropout the mask is drawn again.
        needs: whether dA, dB and dgate are asked for.
        tile: one of `configs.weight_gradients`.

    S holds products of the masked x that are not divided by `1 - dropout`. Sums and results are fp32.
    """
    A, B, gate, threshold, _, _, dropout, seed = operands
    need_A, need_B, need_gate = needs
    M, packed = dy.shape[0], operands.packed
    # Like the gates, all that is made here is in fp32. Half the time of `new_empty` with a shape.
    dA = torch.empty_like(A, dtype=gate.dtype) if need_A else None
    dB = torch.empty_like(B, dtype=gate.dtype) if need_B else None
    dgate = torch.empty_like(gate) if need_gate else None
    if packed == 0:
        return tuple(None if t is None else t.zero_() for t in (dA, dB, dgate))  # type: ignore[return-value]
    # What is not needed is not read, but the kernel wants a tensor in its place.
    x, T = dy if x is None else x, S if T is None else T
    dropped = need_A and dropout > 0.0
    sizes, launch_sums, launch_reduce = _one_pass(
        dy.device, dy.dtype, M, A.shape, B.shape[1], packed, tuple(needs), (x.stride(0), dy.stride(0)), tile, dropped,
        drop_units(dropout),
    )  # fmt: skip
    partial_A, partial_B, dots = (gate.new_empty(size) for size in sizes)
    launch_sums(
        x, dy, S, T, B, gate, seed if dropped else None, partial_A, partial_B, dots if need_gate else None, threshold
    )
    launch_reduce(partial_A, partial_B, dots, dA, dB, dgate, gate, threshold, operands.factor)
    return dA, dB, dgate


@functools.lru_cache(maxsize=1024)
def _one_pass(
    device: torch.device, dtype: torch.dtype, M: int, shape: tuple[int, int, int], n: int, packed: int,
    needs: tuple[bool, bool, bool], strides: tuple[int, int], tile: configs.Columns, dropped: bool, drop: int,
) -> tuple[tuple[int, int, int], Launch, Launch]:  # fmt: skip
    """The sizes of the buffers of partial sums, and both launches; `shape` is that of A."""
    (blocks, r, K), (need_A, need_B, need_gate) = shape, needs
    N, LOW_A, LOW_B = blocks * n, low_width(packed * r), low_width(r)
    x_tiles = launch.cdiv(K, tile.TILE) * launch.cdiv(packed * r, LOW_A) if need_A else 0
    count = launch.cdiv(n, tile.TILE) * launch.cdiv(r, LOW_B) if need_B or need_gate else 0
    tiles_in_all = x_tiles + packed * count
    splits = row_splits(launch.cdiv(M, tile.ROWS), tiles_in_all, 2 * launch.sms(device))
    size_A, size_B, size_dots = (
        splits * packed * size for size in (r * K if need_A else 0, n * r if count else 0, count)
    )
    parts_A, parts_B = launch.cdiv(r * K, CHUNK) * need_A, launch.cdiv(n * r, CHUNK) * need_B
    box = tile.ROWS, tile.TILE
    sums = Launch(
        partial_sums, device, (splits * tiles_in_all, 1, 1),
        (dtype, M >> 31, K, n, r, blocks, LOW_A, strides, need_A, need_gate, dropped, tile),
        [drop, M, K, N, n, r, blocks, packed, *strides, splits, x_tiles, packed * count],
        {"DROPOUT": dropped, "DESCRIBED": launch.described(device), "LOW_A": LOW_A, "LOW_B": LOW_B, **tile.meta()},
        # Where dA is not needed, dy stands for x.
        [Box(0, (M, K if need_A else N), (strides[0], 1), box), Box(1, (M, N), (strides[1], 1), box)],
    )  # fmt: skip
    total = Launch(
        reduce, device, (parts_A + parts_B + need_gate, blocks, 1), (K, n, r, needs),
        [K, n, r, blocks, packed, splits, count, parts_A, parts_B],
        {"CHUNK": CHUNK, "AT_ONCE": AT_ONCE, "num_warps": 2},
    )  # fmt: skip
    return (size_A, size_B, size_dots), sums, total


def low_width(width: int) -> int:
    """Return how many columns of S or T a program multiplies with where there are `width` of them."""
    return min(WIDEST, configs.padded(min(width, WIDEST)))


@functools.lru_cache(maxsize=1024)
def row_splits(steps: int, tiles: int, at_once: int) -> int:
    """Return among how many programs the steps of rows of each tile are dealt.

    Of the splits that start at most two programs for each of the `at_once` places on the GPU, the one with the fewest
    steps in a row is taken, and of several the one with the fewest partial sums.
    """
    splits = range(1, max(1, min(steps, 2 * at_once // tiles)) + 1)
    in_a_row = [launch.cdiv(s * tiles, at_once) * launch.cdiv(steps, s) for s in splits]
    return splits[in_a_row.index(min(in_a_row))]
