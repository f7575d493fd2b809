"""Gradients of the LoRA matrices and of the gates in one pass over x and dy.

    dA_i    = c * T_i^T (x . mask)                  [r, K]
    dB_i    = c * dy[:, block i]^T S_i              [n, r]
    dgate_i = <dB_i, B_i>                           from the fp32 sums, before dB is rounded

for the active blocks, 0 for the others. `x [M, K]` and `dy [M, N]` are read once from device memory (x once per 128
columns of T, dy once per 128 of S_i), by programs that each own a tile of columns of x or of dy and a range of rows; S
and T, a few columns wide, come from the L2 cache. A program leaves its fp32 sum in a buffer of partial sums, and a
second, small kernel adds those in the order of their rows. There are no atomics: two runs give the same bits. An
inactive block costs an empty program: neither its columns of dy nor those of S and T are read.

The buffer holds `4 * splits * TILE * (x_tiles * LOW_A + dy_tiles * LOW_B)` bytes, where LOW_A and LOW_B are the padded
widths of T and of S_i, at most 128. `splits` shares the rows out so that `splits * (x_tiles + dy_tiles)` programs fill
the GPU at most twice, or is 1 where the tiles alone do: with 132 multiprocessors, TILE = 128 and r = 16, 4.3 MB at
most, whatever M is.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from slora.dropout import drop_units, rescaling
from slora.kernels import dropout as counter
from slora.kernels import launch, narrow_configs
from slora.kernels import slots as activity

# The widest group of columns of S or T that one program multiplies with: its sums are TILE x this in registers.
WIDEST = 128
# Elements of a gradient that one program of the reduction adds up.
WIDE, NARROW = 32, 16


@triton.jit
def _sum_over_rows(
    source, low, low_columns, low_valid, first, start, stop, M, columns, stride, stride_low, seed, drop,
    DROPOUT: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, TALL: tl.constexpr,
    TILE: tl.constexpr, LOW: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Return `source[start:stop, first:first + TILE]^T low[start:stop, low_columns]`, [TILE, LOW] in fp32."""
    acc = tl.zeros((TILE, LOW) if TALL else (LOW, TILE), tl.float32)
    if DROPOUT:
        key0, key1, key2 = counter.keys(tl.load(seed))
    for row in range(start, stop, ROWS):
        rows = row + tl.arange(0, ROWS)
        inside = rows < M
        if DESCRIPTORS:
            tile = source.load([row, first])
        else:
            at = first + tl.arange(0, TILE)
            tile = tl.load(
                source + rows[:, None].to(tl.int64) * stride + at[None, :],
                mask=inside[:, None] & (at < columns)[None, :],
                other=0.0,
            )
        if DROPOUT:
            a, b = counter.row_keys(key0, key1, rows)
            tile = tl.where(counter.keep(a, b, key2, first, drop, TILE), tile, 0.0)
        narrow = tl.load(
            low + rows[:, None].to(tl.int64) * stride_low + low_columns[None, :],
            mask=inside[:, None] & low_valid[None, :],
            other=0.0,
        )
        if TALL:
            acc = tl.dot(tl.trans(tile), narrow, acc, input_precision=PRECISION)
        else:
            acc = tl.dot(tl.trans(narrow), tile, acc, input_precision=PRECISION)
    return acc if TALL else tl.trans(acc)


@triton.jit(do_not_specialize=["drop", "M", "blocks", "slots", "rows_per_split", "x_tiles", "dy_tiles"])
def _partial_sums(
    x, dy, S, T, gate, seed, partial_A, partial_B, threshold, drop,
    M, K, N, n, r, blocks, slots, stride_x, stride_dy, rows_per_split, x_tiles, dy_tiles,
    DROPOUT: tl.constexpr, DESCRIPTORS: tl.constexpr, PRECISION: tl.constexpr, TALL: tl.constexpr,
    TILE: tl.constexpr, LOW_A: tl.constexpr, LOW_B: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Program (split, tile): one tile of columns of x (the first `x_tiles`) or of dy, over the rows of the split.

    Tiles of x: `k * groups + g`, g the group of LOW_A columns of T. Tiles of dy: `(slot * n_tiles + j) * groups + g`, g
    the group of LOW_B columns of that slot's S; j counts within the block, so that a tile's sums belong to one block.
    """
    tile = tl.program_id(0) % (x_tiles + dy_tiles)
    split = tl.program_id(0) // (x_tiles + dy_tiles)
    start = split * rows_per_split
    stop = min(start + rows_per_split, M)
    stride_low = slots * r
    if tile < x_tiles:
        groups = tl.cdiv(stride_low, LOW_A)
        columns = (tile % groups) * LOW_A + tl.arange(0, LOW_A)
        valid = columns < stride_low
        if slots == blocks:
            valid &= tl.load(gate + columns // r, mask=valid, other=float("-inf")) >= threshold
        if tl.max(valid.to(tl.int32), 0) > 0:
            acc = _sum_over_rows(
                x, T, columns, valid, tile // groups * TILE, start, stop, M, K, stride_x, stride_low, seed, drop,
                DROPOUT, DESCRIPTORS, PRECISION, TALL, TILE, LOW_A, ROWS,
            )  # fmt: skip
            own = partial_A + (split * x_tiles + tile).to(tl.int64) * TILE * LOW_A
            tl.store(own + tl.arange(0, TILE)[:, None] * LOW_A + tl.arange(0, LOW_A)[None, :], acc)
    else:
        tile -= x_tiles
        groups = tl.cdiv(r, LOW_B)
        n_tiles = tl.cdiv(n, TILE)
        slot = tile // (groups * n_tiles)
        block, active = activity.block_of(slot, gate, threshold, blocks, slots)
        if active:
            columns = tile % groups * LOW_B + tl.arange(0, LOW_B)
            first = block * n + tile // groups % n_tiles * TILE
            acc = _sum_over_rows(
                dy, S + slot * r, columns, columns < r, first, start, stop, M, N, stride_dy, stride_low, seed, drop,
                False, DESCRIPTORS, PRECISION, TALL, TILE, LOW_B, ROWS,
            )  # fmt: skip
            own = partial_B + (split * dy_tiles + tile).to(tl.int64) * TILE * LOW_B
            tl.store(own + tl.arange(0, TILE)[:, None] * LOW_B + tl.arange(0, LOW_B)[None, :], acc)


@triton.jit
def _total(partial, at, active, inside, size, splits, WIDE: tl.constexpr, NARROW: tl.constexpr):
    """Add the elements `at` of every split, in order; 0 where the block is inactive."""
    acc = tl.zeros((WIDE, NARROW), tl.float32)
    place = partial + at
    if active:
        for _ in range(splits):
            acc += tl.load(place, mask=inside, other=0.0)
            place += size
    return acc


@triton.jit(do_not_specialize=["blocks", "slots", "splits", "x_tiles", "dy_tiles", "parts_A", "parts_B"])
def _reduce(
    partial_A, partial_B, dA, dB, B, dots, gate, threshold, scaling,
    K, n, r, blocks, slots, splits, x_tiles, dy_tiles, parts_A, parts_B,
    NEED_A: tl.constexpr, NEED_B: tl.constexpr, NEED_GATE: tl.constexpr,
    TILE: tl.constexpr, LOW_A: tl.constexpr, LOW_B: tl.constexpr, WIDE: tl.constexpr, NARROW: tl.constexpr,
):  # fmt: skip
    """Program (part, block): WIDE x NARROW elements of dA_i^T (the first `parts_A` parts) or of dB_i."""
    part = tl.program_id(0)
    block = tl.program_id(1)
    slot, active = activity.slot_of(block, gate, threshold, blocks, slots)
    narrow_parts = tl.cdiv(r, NARROW)
    if part < parts_A:
        if NEED_A:
            wide = part // narrow_parts * WIDE + tl.arange(0, WIDE)
            j = part % narrow_parts * NARROW + tl.arange(0, NARROW)
            inside = (wide < K)[:, None] & (j < r)[None, :]
            column = slot * r + j
            tile = (wide // TILE * tl.cdiv(slots * r, LOW_A))[:, None] + (column // LOW_A)[None, :]
            at = (tile.to(tl.int64) * TILE + (wide % TILE)[:, None]) * LOW_A + (column % LOW_A)[None, :]
            acc = _total(partial_A, at, active, inside, x_tiles.to(tl.int64) * TILE * LOW_A, splits, WIDE, NARROW)
            tl.store(
                dA + (block * r + j)[None, :].to(tl.int64) * K + wide[:, None],
                (acc * scaling).to(dA.dtype.element_ty),
                mask=inside,
            )
    elif NEED_B or NEED_GATE:
        part -= parts_A
        wide = part // narrow_parts * WIDE + tl.arange(0, WIDE)
        j = part % narrow_parts * NARROW + tl.arange(0, NARROW)
        inside = (wide < n)[:, None] & (j < r)[None, :]
        tile = (slot * tl.cdiv(n, TILE) + wide // TILE)[:, None] * tl.cdiv(r, LOW_B) + (j // LOW_B)[None, :]
        at = (tile.to(tl.int64) * TILE + (wide % TILE)[:, None]) * LOW_B + (j % LOW_B)[None, :]
        acc = _total(partial_B, at, active, inside, dy_tiles.to(tl.int64) * TILE * LOW_B, splits, WIDE, NARROW)
        acc *= scaling
        of_B = (block * n + wide)[:, None].to(tl.int64) * r + j[None, :]
        if NEED_B:
            tl.store(dB + of_B, acc.to(dB.dtype.element_ty), mask=inside)
        if NEED_GATE:
            dot = 0.0
            if active:
                product = acc * tl.load(B + of_B, mask=inside, other=0.0).to(tl.float32)
                dot = tl.sum(tl.sum(product, 1), 0)
            tl.store(dots + block * parts_B + part, dot)


def weight_gradients(
    x: Tensor | None,
    dy: Tensor,
    S: Tensor | None,
    T: Tensor | None,
    lora_A: Tensor,
    lora_B: Tensor,
    gate: Tensor,
    threshold: float,
    scaling: float,
    needs: Sequence[bool],
    dropout: float = 0.0,
    seed: Tensor | None = None,
    config: narrow_configs.Columns | None = None,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Return `(dA [blocks, r, K], dB [blocks, n, r], dgate [blocks])`, None for each that `needs` does not ask for.

    Args:
        x: `[M, K]` with unit column stride; None where dA is not needed.
        dy: `[M, N]` in the dtype of x, with unit column stride.
        S: `[M, slots * r]` as the forward stored it, contiguous; None where neither dB nor dgate is needed.
        T: `[M, slots * r]` as the input gradient stored it, contiguous; None where dA is not needed.
        lora_A: `[blocks, r, K]`; dA gets its dtype.
        lora_B: `[blocks, n, r]`, contiguous; dB gets its dtype.
        gate: `[blocks]` fp32. Block i is active while `gate[i] >= threshold`.
        scaling: the factor c.
        needs: whether dA, dB and dgate are asked for.
        dropout, seed: those of the forward; the mask is drawn anew.
        config: tile sizes; by default those for the shape.

    S holds products of the masked x that are not divided by `1 - dropout`. Sums are fp32; dA and dB are rounded once.
    """
    need_A, need_B, need_gate = needs
    M, N = dy.shape
    blocks, r, K = lora_A.shape
    n = N // blocks
    need_dy = need_B or need_gate
    dA = torch.empty_like(lora_A, memory_format=torch.contiguous_format) if need_A else None
    dB = torch.empty_like(lora_B, memory_format=torch.contiguous_format) if need_B else None
    low = S if need_dy else T
    if low is None or low.numel() == 0:
        dgate = torch.zeros(blocks, dtype=torch.float32, device=dy.device) if need_gate else None
        return None if dA is None else dA.zero_(), None if dB is None else dB.zero_(), dgate
    slots = low.shape[1] // r
    # What is not needed is not read, but the kernel wants a tensor in its place.
    x, S, T = dy if x is None else x, low if S is None else S, low if T is None else T
    LOW_A, LOW_B = _padded(slots * r), _padded(r)
    config = config or candidates(lora_A, dy, slots, needs)[0]
    x_tiles = triton.cdiv(K, config.TILE) * triton.cdiv(slots * r, LOW_A) if need_A else 0
    dy_tiles = slots * triton.cdiv(n, config.TILE) * triton.cdiv(r, LOW_B) if need_dy else 0
    splits, rows_per_split = row_splits(M, x_tiles + dy_tiles, config.ROWS, 2 * launch.multiprocessors(dy.device))
    partial_A, partial_B = (
        torch.empty(splits * tiles * config.TILE * low, dtype=torch.float32, device=dy.device)
        for tiles, low in ((x_tiles, LOW_A), (dy_tiles, LOW_B))
    )
    # Triton wants a copy to start at a multiple of 16 bytes, so the blocks have to.
    described = launch.describable(x) and launch.describable(dy) and n * dy.element_size() % 16 == 0
    shape = [config.ROWS, config.TILE]
    with launch.on(dy.device):
        _partial_sums[(splits * (x_tiles + dy_tiles),)](
            launch.descriptor(x, shape) if described else x, launch.descriptor(dy, shape) if described else dy,
            S, T, gate, seed, partial_A, partial_B, threshold, drop_units(dropout),
            M, K, N, n, r, blocks, slots, x.stride(0), dy.stride(0), rows_per_split, x_tiles, dy_tiles,
            DROPOUT=dropout > 0.0, DESCRIPTORS=described, PRECISION=launch.precision(dy.dtype),
            LOW_A=LOW_A, LOW_B=LOW_B, **config.meta(),
        )  # fmt: skip
        narrow_parts = triton.cdiv(r, NARROW)
        parts_A = triton.cdiv(K, WIDE) * narrow_parts if need_A else 0
        parts_B = triton.cdiv(n, WIDE) * narrow_parts if need_dy else 0
        dots = torch.empty(blocks, parts_B, dtype=torch.float32, device=dy.device) if need_gate else None
        _reduce[(parts_A + parts_B, blocks)](
            partial_A, partial_B, dA, dB, lora_B, dots, gate, threshold, scaling * rescaling(dropout),
            K, n, r, blocks, slots, splits, x_tiles, dy_tiles, parts_A, parts_B,
            NEED_A=need_A, NEED_B=need_B, NEED_GATE=need_gate,
            TILE=config.TILE, LOW_A=LOW_A, LOW_B=LOW_B, WIDE=WIDE, NARROW=NARROW, num_warps=2,
        )  # fmt: skip
    return dA, dB, None if dots is None else dots.sum(1)


def candidates(lora_A: Tensor, dy: Tensor, slots: int, needs: Sequence[bool]) -> tuple[narrow_configs.Columns, ...]:
    """Return the tile sizes that a measurement may choose from, the default first."""
    r = lora_A.shape[1]
    low = _padded(slots * r) if needs[0] else _padded(r)
    return narrow_configs.weight_gradients(launch.part(dy.device), launch.kind(dy.dtype), low)


def _padded(width: int) -> int:
    return min(WIDEST, int(triton.next_power_of_2(max(16, width))))


@functools.lru_cache(maxsize=1024)
def row_splits(M: int, tiles: int, rows: int, at_once: int) -> tuple[int, int]:
    """Return into how many ranges the rows are split, and the rows of each: a multiple of `rows`.

    Of the splits that start at most two programs for each of the `at_once` places on the GPU, the one with the fewest
    steps in a row is taken, and of several the one with the fewest partial sums.
    """
    steps = triton.cdiv(M, rows)
    splits = range(1, max(1, min(steps, 2 * at_once // tiles)) + 1)
    in_a_row = [triton.cdiv(s * tiles, at_once) * triton.cdiv(steps, s) for s in splits]
    per_split = triton.cdiv(steps, splits[in_a_row.index(min(in_a_row))])
    return triton.cdiv(steps, per_split), per_split * rows
